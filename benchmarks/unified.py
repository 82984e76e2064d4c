"""M3: a checkpoint of the OpenS2S form in which the language model is only a part.

Beside its LLM lie tensors that must not be read: they make the file as large as wanted.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from omnispeech.json_file import read_json
from omnispeech.tiny.opens2s import write_opens2s
from omnispeech.tiny.shape import LanguageShape, TinyShape
from omnispeech.tiny.tokenizer import write_json

INDEX = "model.safetensors.index.json"
DECOY_BYTES = 1 << 27  # of one shard
DTYPES = (torch.bfloat16, torch.float32)  # in turn
SHAPES = {
    # layers as those of M2
    "small": TinyShape(
        llm=LanguageShape(hidden=256, inner=768, layers=6, heads=8, kv_heads=2, head_width=32)
    ),
    # a layer is 1.2 % of 2 GB; of the published checkpoint it is 1.9 %
    "large": TinyShape(
        llm=LanguageShape(hidden=1024, inner=3072, layers=8, heads=16, kv_heads=8, head_width=64)
    ),
}
SMALL = SHAPES["small"]


def write_unified(directory: Path, shape: TinyShape, size: int) -> int:
    """Bytes of the shards together: at least `size`."""
    directory.mkdir(parents=True)
    write_opens2s(directory, 0, shape)
    index = read_json(directory / INDEX)
    written = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    number = 0
    while written < size:
        file = f"decoy-{number:05}.safetensors"
        dtype = DTYPES[number % len(DTYPES)]
        name = f"audio_encoder_model.decoy.{number}.weight"
        tensor = torch.empty(DECOY_BYTES // dtype.itemsize // 1024, 1024, dtype=dtype).normal_()
        save_file({name: tensor}, directory / file, metadata={"format": "pt"})
        index["weight_map"][name] = file
        written += (directory / file).stat().st_size
        number += 1
    write_json(directory / INDEX, index)
    return written
