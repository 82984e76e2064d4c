"""`quantize_llm_awq.py`: one language model of OpenS2S, beside the original, in three steps."""

from pathlib import Path

from omnispeech.checkpoint.files import size_text
from omnispeech.checkpoint.language import LanguageFiles, PartName
from omnispeech.checkpoint.models_directory import LLMS, OPENS2S, SPEECH_LMS
from omnispeech.errors import ConfigError
from omnispeech.quantize_cli.calibrate import of_llm, of_speech_lm
from omnispeech.quantize_cli.choices import Choices
from omnispeech.quantize_cli.runs import (
    FETCH,
    RESTART,
    Outcome,
    method_name,
    open_model,
    part_size,
    push,
    quantize_model,
    weights_size,
)
from omnispeech.quantize_cli.streams import say

BANNER = """\
╔════════════════════════════════════════════════════════════════╗
║{:^64}║
╚════════════════════════════════════════════════════════════════╝
"""
NAMES: dict[PartName, str] = {"llm": "LLM", "speech_lm": "speech LM"}


def quantize_part(models: Path, part: PartName, chosen: Choices) -> None:
    """Raises what the engines raise; nothing is under the final name then."""
    output = models / directory_name(part, chosen)
    source = open_model(models / OPENS2S, part, FETCH.format(models))
    method = chosen.method.method.upper()
    say(BANNER.format(f"{method} Quantization for OmniSpeech {NAMES[part]} (Persistent on Disk)"))
    _tell_extraction(source, NAMES[part], chosen)
    say("", f"🔧 Step 2/3: Quantizing {NAMES[part]} with {method_name(chosen)}")
    if part == "speech_lm":
        calibrator = of_speech_lm(models, chosen.calibrate)
    else:
        calibrator = of_llm(source, chosen.calibrate)
    outcome = quantize_model(source, calibrator, chosen, output)
    if outcome is not None:
        _tell_result(source, NAMES[part], chosen, outcome, output)
        say(f"Next: {RESTART}{_serving_hint(output)}")
        push(chosen, output)


def directory_name(part: PartName, chosen: Choices) -> str:
    """Where the server looks for it; raises ConfigError for what it has no place for."""
    method, bits = chosen.method.method, chosen.method.bits
    if method == "awq" and bits != 4:
        raise ConfigError(f"{LLMS['awq']} holds 4 bits, not {bits}; add --gptq for {bits} bits")
    if part == "llm":
        return LLMS[method]
    if method not in SPEECH_LMS:
        raise ConfigError("the server takes a speech LM quantized with AWQ alone; drop --gptq")
    if chosen.engine == "autoawq":
        raise ConfigError(
            "AutoAWQ reads text, and the speech LM states of the LLM; drop --engine autoawq"
        )
    return SPEECH_LMS[method]


def _tell_extraction(source: LanguageFiles, name: str, chosen: Choices) -> None:
    copied = chosen.engine == "autoawq"
    own, full = part_size(source), weights_size(source.directory)
    say(
        f"📦 Step 1/3: Extracting {name} from OmniSpeech Checkpoint",
        f"{name}: {size_text(own)} of the {size_text(full)} in {source.directory}",
        f"✅ Standalone {name} checkpoint "
        + (
            "saved for AutoAWQ, deleted when it is done"
            if copied
            else "not needed: layers are read one by one where they lie, nothing else is read"
        ),
    )


def _tell_result(
    source: LanguageFiles, name: str, chosen: Choices, outcome: Outcome, output: Path
) -> None:
    full, own, after = weights_size(source.directory), part_size(source), weights_size(output)
    say(
        f"✅ {name} quantized to {chosen.method.bits}-bit",
        f"✅ Quantized {name} {'was there already' if outcome.found else 'saved'}: {output}",
        "",
        "📊 Step 3/3: Verifying Quantization",
        *outcome.lines,
        f"Original checkpoint (full): {size_text(full)}",
        f"Quantized {name} only: {size_text(after)}",
        f"Compression ratio: {full / after:.2f}x ({own / after:.2f}x of the {name} alone)",
        "✅ Quantization successful!",
        "",
        f"🎉 SUCCESS! {name} Quantization Complete",
    )


def _serving_hint(output: Path) -> str:
    if output.name == LLMS["gptq"] and (output.parent / LLMS["awq"]).exists():
        return f", with --llm gptq: {LLMS['awq']} goes first"
    if output.name in SPEECH_LMS.values():
        return ", with --speech-lm awq"
    return ""
