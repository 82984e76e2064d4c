"""Whether the models that listen to the calibration data fit, known before any of it is read."""

from collections.abc import Iterator
from pathlib import Path

import torch

from omnispeech.checkpoint.files import size_text
from omnispeech.checkpoint.models_directory import Sources
from omnispeech.checkpoint.shards import weight_files
from omnispeech.checkpoint.tensor_file import TensorFile
from omnispeech.errors import ConfigError
from omnispeech.quantization.memory import available_memory
from omnispeech.speech_calibration import AUDIO_PARTS

LLM, SPEECH_LM = "llm_model.", "tts_lm_model."
ADVICE = {
    "memory": "free some, or use a machine with more, or --device cuda where there is a GPU",
    "device memory": "free some, or use --device cpu",
}


def encoder_size(directory: Path, dtype: torch.dtype) -> int:
    """Bytes of the audio encoder and the adapter of an OpenS2S directory, as they are loaded."""
    return sum(size for name, size in _sizes(directory, dtype) if name.split(".")[0] in AUDIO_PARTS)


def models_size(sources: Sources, dtype: torch.dtype) -> int:
    """Bytes of all that `load_sources` loads. The decoder stays in the float32 it is stored in."""
    replaced = {LLM: sources.llm, SPEECH_LM: sources.speech_lm}
    without = tuple(prefix for prefix, other in replaced.items() if other is not None)
    total = sum(s for name, s in _sizes(sources.base, dtype) if not name.startswith(without))
    for directory in filter(None, replaced.values()):
        total += sum(size for _, size in _sizes(directory, dtype))
    return total + sum(path.stat().st_size for path in sources.decoder.glob("*.pt"))


def require_room(what: str, size: int, device: torch.device) -> None:
    """Raises ConfigError where `size` bytes are more than is free."""
    if device.type == "cuda":
        kind, free = "device memory", torch.cuda.mem_get_info(device)[0]
    else:
        kind, free = "memory", available_memory()
    if size > free:
        raise ConfigError(
            f"{what} listen to the calibration data and take {size_text(size)} of {kind}, "
            f"{size_text(free)} are free; {ADVICE[kind]}"
        )


def _sizes(directory: Path, dtype: torch.dtype) -> Iterator[tuple[str, int]]:
    """Of each tensor; headers alone are read. Whole numbers keep their type."""
    for path in weight_files(directory):
        for name, entry in TensorFile(path).entries.items():
            kept = not entry.dtype.is_floating_point
            width = (entry.dtype if kept else dtype).itemsize
            yield name, torch.Size(entry.shape).numel() * width
