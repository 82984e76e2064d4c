"""Which LLM of a models directory is loaded, and what is done about one that is not whole."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quantized_models import INT8, quantize_language_model, quantize_opens2s

from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.models_directory import COMMANDS, Sources, choose_sources
from omnispeech.cli import main
from omnispeech.errors import CheckpointError, ConfigError

OPENS2S = Path(__file__).parent / "golden" / "opens2s" / "opens2s-tiny"
PLAIN = Path(__file__).parent / "golden" / "awq" / "tiny-qwen3-fp16"
NAMES = {"awq": "OpenS2S-llm-awq", "gptq": "OpenS2S-llm-gptq", "8bit": "OpenS2S-8bit"}
SPEECH = "OpenS2S-speech-lm-awq"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("OpenS2S", "glm-4-voice-decoder"):
        (tmp_path / name).mkdir()
    return tmp_path


def make(models: Path, name: str, *, entered: bool = True) -> Path:
    """A directory that stands for a quantized model."""
    path = models / name
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    if entered:
        Manifest(models).enter(name, {"by": "a test"})
    return path


# what is chosen


def test_the_best_one_that_is_there_is_taken(models: Path) -> None:
    assert choose_sources(models).llm is None
    assert choose_sources(models).base == models / "OpenS2S"
    eight_bit = make(models, "OpenS2S-8bit")
    assert (choose_sources(models).base, choose_sources(models).llm) == (eight_bit, None)
    for method in ("gptq", "awq"):
        path = make(models, NAMES[method])
        assert (choose_sources(models).base, choose_sources(models).llm) == (
            models / "OpenS2S",
            path,
        )


@pytest.mark.parametrize("name", ["bf16", "awq", "gptq", "8bit"])
def test_one_that_is_named_is_taken_though_others_are_there(models: Path, name: str) -> None:
    for other in NAMES.values():
        make(models, other)
    sources = choose_sources(models, name)
    assert sources == Sources(
        base=models / ("OpenS2S-8bit" if name == "8bit" else "OpenS2S"),
        decoder=models / "glm-4-voice-decoder",
        llm=models / NAMES[name] if name in ("awq", "gptq") else None,
    )


def test_the_speech_lm_is_taken_from_elsewhere_only_when_asked_for(models: Path) -> None:
    path = make(models, SPEECH)
    assert choose_sources(models).speech_lm is None
    assert choose_sources(models, speech_lm="awq").speech_lm == path


def test_the_original_may_be_gone_where_an_eight_bit_model_is(models: Path) -> None:
    (models / "OpenS2S").rmdir()
    eight_bit = make(models, "OpenS2S-8bit")
    assert choose_sources(models).base == eight_bit
    with pytest.raises(CheckpointError, match="OpenS2S is missing.*--llm 8bit"):
        choose_sources(models, "bf16")
    llm = make(models, NAMES["awq"])
    assert (choose_sources(models).base, choose_sources(models).llm) == (eight_bit, llm)


# what is refused


@pytest.mark.parametrize("name", ["awq", "gptq", "8bit"])
def test_one_that_is_named_and_not_there_is_an_error_with_its_command(
    models: Path, name: str
) -> None:
    with pytest.raises(CheckpointError) as error:
        choose_sources(models, name)
    assert f"{models / NAMES[name]} is missing" in str(error.value)
    assert COMMANDS[NAMES[name]] in str(error.value)


def cut(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"weight")


def change(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"WEIGHTS")
    os.utime(path / "model.safetensors", ns=(1, 1))


def lose(path: Path) -> None:
    (path / "model.safetensors").unlink()


def empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


@pytest.mark.parametrize("damage", [cut, change, lose, empty])
@pytest.mark.parametrize("method", ["awq", "gptq", "8bit"])
@pytest.mark.parametrize("asked", ["auto", "by name"])
def test_a_damaged_one_is_refused_and_no_other_taken_instead(
    models: Path, damage: Callable[[Path], None], method: str, asked: str
) -> None:
    path = make(models, NAMES[method])
    damage(path)
    with pytest.raises(CheckpointError) as error:
        choose_sources(models, "auto" if asked == "auto" else method)
    assert str(path) in str(error.value)
    assert f"omnispeech verify --models {models} {NAMES[method]}" in str(error.value)
    assert COMMANDS[NAMES[method]] in str(error.value)


def copy(path: Path) -> None:
    os.utime(path / "model.safetensors", ns=(1, 1))


@pytest.mark.parametrize("method", ["awq", "gptq", "8bit"])
def test_equal_bytes_of_another_time_are_taken_where_nothing_can_be_written(
    models: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(make(models, NAMES[method]))

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Manifest, "_put", refuse)
    choose_sources(models, method)


def test_a_link_to_nowhere_is_no_reason_to_take_another_precision(models: Path) -> None:
    (models / NAMES["awq"]).symlink_to(models / "unmounted")
    with pytest.raises(CheckpointError, match=r"OpenS2S-llm-awq is missing"):
        choose_sources(models)


def test_one_that_was_never_entered_is_refused(models: Path) -> None:
    make(models, NAMES["awq"], entered=False)
    with pytest.raises(CheckpointError, match="not in .*omnispeech verify"):
        choose_sources(models)


def test_a_damaged_model_around_a_whole_llm_is_refused(models: Path) -> None:
    (models / "OpenS2S").rmdir()
    cut(make(models, "OpenS2S-8bit"))
    make(models, NAMES["awq"])
    with pytest.raises(CheckpointError, match="omnispeech verify .*OpenS2S-8bit"):
        choose_sources(models)


def test_a_damaged_speech_lm_is_refused(models: Path) -> None:
    cut(make(models, SPEECH))
    with pytest.raises(CheckpointError, match=f"omnispeech verify .*{SPEECH}"):
        choose_sources(models, speech_lm="awq")


def test_a_damaged_one_that_is_not_used_does_no_harm(models: Path) -> None:
    cut(make(models, NAMES["gptq"]))
    make(models, NAMES["awq"])
    assert choose_sources(models).llm == models / NAMES["awq"]
    assert choose_sources(models, "bf16").llm is None


@pytest.mark.parametrize("name", ["OpenS2S-llm-awq.partial", ".OpenS2S-llm-awq.partial"])
def test_leftovers_are_told_and_not_used(
    models: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    make(models, name, entered=False)
    assert choose_sources(models).llm is None
    assert f"{models / name} is not finished and not used" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"llm": "int4"}, "--llm 'int4'; allowed: auto"), ({"speech_lm": "gptq"}, "allowed: bf16")],
)
def test_unknown_names_are_refused(models: Path, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_sources(models, **settings)


def test_the_log_says_what_is_used_in_the_words_of_the_guides(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    choose_sources(models)
    assert "No AWQ-quantized LLM found" in caplog.text
    assert "python quantize_llm_awq.py" in caplog.text
    caplog.clear()
    choose_sources(models, "bf16")
    assert "No AWQ" not in caplog.text
    make(models, "OpenS2S-8bit")
    choose_sources(models)
    assert f"Using pre-quantized model: {models / 'OpenS2S-8bit'}" in caplog.text


# omnispeech verify


@pytest.fixture
def quantized(models: Path) -> Path:
    """Real files: an LLM, a speech LM and a whole model, none of them entered."""
    quantize_language_model(OPENS2S, models / NAMES["awq"])
    quantize_language_model(OPENS2S, models / SPEECH, INT8, part="speech_lm")
    quantize_opens2s(OPENS2S, models / NAMES["8bit"])
    return models


def verify(models: Path, *arguments: str) -> int:
    return main(["verify", "--models", str(models), *arguments])


def test_verify_enters_what_is_whole(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(quantized) == 0
    whole = sorted([NAMES["awq"], NAMES["8bit"], SPEECH])
    assert capsys.readouterr().out.splitlines() == [f"{name}: whole" for name in whole]
    assert Manifest(quantized).names() == whole
    assert choose_sources(quantized, speech_lm="awq").llm == quantized / NAMES["awq"]


@pytest.mark.parametrize("name", [NAMES["awq"], NAMES["8bit"], SPEECH])
def test_verify_does_not_enter_what_is_not_whole(
    quantized: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = quantized / name / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert verify(quantized) == 1
    assert re.search(rf"^{name}: .*is damaged", capsys.readouterr().out, re.MULTILINE)
    assert name not in Manifest(quantized).names()
    assert len(Manifest(quantized).names()) == 2


def test_verify_does_not_enter_a_model_that_is_not_quantized(
    quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(PLAIN, quantized / NAMES["gptq"])
    assert verify(quantized, NAMES["gptq"], NAMES["awq"]) == 1
    assert f"{NAMES['gptq']} holds nothing quantized" in capsys.readouterr().out
    assert Manifest(quantized).names() == [NAMES["awq"]]


def test_verify_does_not_enter_what_could_not_be_read(
    quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((quantized / NAMES["awq"] / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "fp8"
    (quantized / NAMES["awq"] / "config.json").write_text(json.dumps(config))
    assert verify(quantized, NAMES["awq"]) == 1
    assert f"{NAMES['awq']}: quant_method='fp8' cannot be read" in capsys.readouterr().out
    assert not Manifest(quantized).names()


def test_verify_accepts_the_same_bytes_after_a_copy(
    quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify(quantized)
    os.utime(quantized / NAMES["awq"] / "model.safetensors", ns=(1, 1))
    assert verify(quantized, NAMES["awq"] + "/") == 0
    Manifest(quantized).check(NAMES["awq"])
    assert choose_sources(quantized).llm == quantized / NAMES["awq"]


@pytest.mark.parametrize("deep", [True, False])
def test_only_a_deep_look_finds_bytes_that_changed_in_secret(quantized: Path, deep: bool) -> None:
    verify(quantized)
    path = quantized / NAMES["awq"] / "model.safetensors"
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    os.utime(path, ns=times)
    assert verify(quantized, *(["--deep"] if deep else [])) == deep


@pytest.mark.parametrize("name", ["OpenS2S", "nothing", "glm-4-voice-decoder", "../elsewhere"])
def test_verify_of_what_it_does_not_know_fails(
    models: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(models, name) == 1
    assert f"{name}: " in (shown := capsys.readouterr().out)
    assert "known: OpenS2S-llm-awq" in shown


def test_verify_of_an_empty_directory_finds_nothing_wrong(models: Path) -> None:
    assert verify(models) == 0


def test_verify_of_no_directory_fails(models: Path) -> None:
    assert verify(models / "elsewhere") == 1
