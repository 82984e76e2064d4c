"""Whether the models that listen to the calibration data fit, known before any of it is read."""

import torch

from omnispeech.checkpoint.files import size_text
from omnispeech.errors import ConfigError
from omnispeech.quantization.memory import free_memory, freeing_advice

ADVICE = "free some, or use a machine with more, or --device cuda where there is a GPU"


def require_room(what: str, size: int, device: torch.device) -> None:
    """Raises ConfigError where `size` bytes are more than is free."""
    free = free_memory(device)
    if size > free:
        kind, advice = ("memory", ADVICE)
        if device.type == "cuda":
            kind, advice = "device memory", freeing_advice(device)
        raise ConfigError(
            f"{what} listen to the calibration data and take {size_text(size)} of {kind}, "
            f"{size_text(free)} are free; {advice}"
        )
