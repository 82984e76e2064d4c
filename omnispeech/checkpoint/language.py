"""One decoder language model on disk, read piece by piece: a part of an OpenS2S directory, or a
plain Hugging Face directory of the types that `models/qwen3.py` knows.

Outside this file it has one form: the tensor names and the config.json of a model that stands
alone. Nothing that belongs to another part of the checkpoint is read.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from omnispeech.checkpoint.files import assign_weights, build_on_meta, check_weights
from omnispeech.checkpoint.lora import merged
from omnispeech.checkpoint.shards import Shards, TensorFiles
from omnispeech.errors import CheckpointError
from omnispeech.json_file import read_json
from omnispeech.models.qwen3 import Block, CausalLM, Qwen3Config, with_defaults
from omnispeech.models.speech_lm import SpeechLM

PartName = Literal["llm", "speech_lm"]

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
UNUSED = "rotary_emb.inv_freq"  # old Llama files store what is computed
CPU = torch.device("cpu")

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*",
    "chat_template*",
    "generation_config.json",
    "*.tiktoken",
)
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}
PRIVATE = ("_attn_implementation_autoset", "_name_or_path", "dtype")


@dataclass(frozen=True, slots=True)
class Part:
    prefix: str  # of its tensors
    config: str  # key of its nested config; "" where config.json is its own
    folder: str  # where its tokenizer lies
    model: Callable[[Qwen3Config], CausalLM]
    code: bool = False  # whether *.py files are of this model


PARTS: dict[PartName | None, Part] = {
    "llm": Part("llm_model.", "llm_config", ".", CausalLM),
    "speech_lm": Part("tts_lm_model.", "tts_lm_config", "tts", SpeechLM),
    None: Part("", "", ".", CausalLM, code=True),
}


class LanguageFiles:
    """Made by `LanguageFiles.open`. Names are those of the model alone: `model.norm.weight`."""

    def __init__(self, directory: Path, part: Part, shards: Shards, composite: Mapping[str, Any]):
        self.directory = directory
        self._part = part
        self._shards = shards
        self._lora_config = composite.get("lora_config")
        self._tensors: TensorFiles = merged(shards, directory, composite)
        self._names = _relative(self._tensors, part.prefix)
        self.tied = HEAD not in self._names
        self.stored_dtype = self._usual_dtype()
        nested = composite[part.config] if part.config else composite
        self.config = Qwen3Config.from_dict(nested)
        self.raw = _stand_alone(nested, self.config, self.stored_dtype, tied=self.tied)
        self._check(nested)

    @classmethod
    def open(cls, directory: Path, part: PartName | None = None) -> "LanguageFiles":
        """Reads headers and config.json; raises CheckpointError if they do not fit each other.

        part: which model of an OpenS2S directory; None for a directory that holds one text model.
        """
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is not a directory; it should hold a model")
        raw = read_json(directory / "config.json")
        _refuse_quantized(directory, raw)
        if (composite := "llm_config" in raw) != (part is not None):
            kind = "an OpenS2S model" if composite else "one text model"
            known = "'llm' or 'speech_lm'" if composite else "none"
            raise CheckpointError(f"{directory} holds {kind}: part {part!r}; allowed: {known}")
        key = PARTS[part].config
        if key and not isinstance(raw.get(key), dict):
            raise CheckpointError(f"{directory / 'config.json'} has no {key}")
        return cls(directory, PARTS[part], Shards(directory, CPU), raw)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that were read so far, headers not counted."""
        return self._shards.bytes_read

    def layer_names(self, index: int) -> list[str]:
        """Sorted names of the tensors of one decoder layer: `model.layers.0.mlp.up_proj.weight`."""
        prefix = f"model.layers.{index}."
        return sorted(name for name in self._names if name.startswith(prefix))

    def outside_names(self) -> list[str]:
        """Sorted names of what is stored beside the layers: embedding, norm, head unless tied."""
        return sorted(name for name in self._names if not name.startswith("model.layers."))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(self._stored(name))

    def dtype(self, name: str) -> torch.dtype:
        """As stored; `stored_dtype` is that of most numbers."""
        return self._tensors.dtype(self._stored(name))

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """On the CPU."""
        return self._tensors.read(self._stored(name), CPU, dtype)

    def embed(self, ids: Tensor) -> Tensor:
        """[T] -> [T, D] float32 on the CPU; only these rows of the embedding are read."""
        return self._tensors.read_rows(self._stored(EMBEDDING), ids).float()

    def block(self, index: int, device: torch.device) -> Block:
        """One decoder layer in float32, for inference, in memory of its own."""
        block = cast(Block, build_on_meta(lambda: Block(self.config)))
        prefix = f"model.layers.{index}."
        weights = {
            name.removeprefix(prefix): self._tensors.read(self._names[name], device, torch.float32)
            for name in self.layer_names(index)
        }
        assign_weights(block, weights, f"layer {index} of {self.directory}")
        return block

    def fingerprint(self) -> str:
        """sha256 over config, headers, file sizes and the first bytes of each of its tensors."""
        digest = hashlib.sha256(json.dumps([self.raw, self._lora_config], sort_keys=True).encode())
        for part in self._shards.identity(self._part.prefix):
            digest.update(part)
        return digest.hexdigest()

    def tokenizer_files(self) -> list[Path]:
        """What lies beside the weights of a text model: tokenizer, chat template, generation."""
        folder = self.directory / self._part.folder
        patterns = (*TOKENIZER_FILES, *(["*.py"] if self._part.code else []))
        found = {path for pattern in patterns for path in folder.glob(pattern)}
        return sorted(path for path in found if path.is_file())

    def _stored(self, name: str) -> str:
        if name not in self._names:
            raise CheckpointError(f"{self.directory} holds no tensor {self._part.prefix}{name}")
        return self._names[name]

    def _usual_dtype(self) -> torch.dtype:
        numbers: Counter[torch.dtype] = Counter()
        for stored in self._names.values():
            numbers[self._tensors.dtype(stored)] += torch.Size(self._tensors.shape(stored)).numel()
        return max(numbers, key=lambda dtype: (numbers[dtype], str(dtype)), default=torch.float32)

    def _check(self, nested: Mapping[str, Any]) -> None:
        model = build_on_meta(lambda: self._part.model(self.config))
        shapes = {name: self.shape(name) for name in self._names}
        if self.tied and nested.get("tie_word_embeddings") and EMBEDDING in shapes:
            shapes[HEAD] = shapes[EMBEDDING]
        check_weights(model, shapes, str(self.directory))


def _relative(tensors: TensorFiles, prefix: str) -> dict[str, str]:
    """{name in the model: name in the files}"""
    return {
        name.removeprefix(prefix): name
        for name in tensors.names
        if name.startswith(prefix) and not name.endswith(UNUSED)
    }


def _refuse_quantized(directory: Path, raw: Mapping[str, Any]) -> None:
    for key in ("quantization_config", "omnispeech_quantization"):
        if raw.get(key):
            raise CheckpointError(
                f"{directory} is quantized already ({key} in its config.json); "
                "name the directory of the original model"
            )


def _stand_alone(
    nested: Mapping[str, Any], config: Qwen3Config, dtype: torch.dtype, *, tied: bool
) -> dict[str, Any]:
    """A config.json with nothing left to class defaults, in the spelling that all loaders read.

    transformers 5 understands rope_theta and rope_scaling as 4.51 wrote them.
    """
    kind, values = with_defaults(nested)
    raw = {key: value for key, value in values.items() if key not in PRIVATE}
    raw |= {
        "architectures": [ARCHITECTURES[kind]],
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling(nested),
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    raw.pop("rope_parameters", None)
    return dict(sorted(raw.items()))


def _rope_scaling(nested: Mapping[str, Any]) -> dict[str, Any] | None:
    rope = nested.get("rope_scaling") or nested.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    return {key: rope[key] for key in rope if key not in ("type", "rope_theta")} | {
        "rope_type": kind
    }
