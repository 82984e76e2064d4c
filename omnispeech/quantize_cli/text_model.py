"""`quantize.py`: a Hugging Face text model, the result inside its directory."""

from pathlib import Path

from omnispeech.checkpoint.files import size_text
from omnispeech.quantize_cli.calibrate import of_text_model
from omnispeech.quantize_cli.choices import Choices
from omnispeech.quantize_cli.runs import (
    method_name,
    open_model,
    push,
    quantize_model,
    weights_size,
)
from omnispeech.quantize_cli.streams import say

FETCH = "name another with --model_path, or fetch one: hf download Qwen/Qwen3-8B --local-dir {}"


def quantize_text_model(directory: Path, output: Path | None, chosen: Choices) -> None:
    """output: None for `<directory>/AWQ-4bit` and the like."""
    output = output or directory / default_name(chosen)
    source = open_model(directory, None, FETCH.format(directory))
    say(f"Quantizing {directory} to {chosen.method.bits}-bit with {method_name(chosen)}")
    outcome = quantize_model(source, of_text_model(source, chosen.calibrate), chosen, output)
    if outcome is None:
        return
    before, after = weights_size(directory), weights_size(output)
    say(
        *outcome.lines,
        f"Original model: {size_text(before)}",
        f"Quantized model: {size_text(after)}",
        f"Compression ratio: {before / after:.2f}x",
        f"{'Found complete, checked again' if outcome.found else 'Saved and verified'}: {output}",
    )
    push(chosen, output)


def default_name(chosen: Choices) -> str:
    """AWQ-4bit, AWQ-4bit-MAX, GPTQ-8bit, ..."""
    ending = "-MAX" if chosen.max_quality else ""
    return f"{chosen.method.method.upper()}-{chosen.method.bits}bit{ending}"
