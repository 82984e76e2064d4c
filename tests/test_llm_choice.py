"""Which LLM of a models directory is loaded, and what is done about one that is not whole."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from quantized_models import (
    GEMM,
    INT8,
    quantization_config,
    quantize_language_model,
    quantize_opens2s,
)

from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.checkpoint.manifest import FILE_NAME, Manifest
from omnispeech.checkpoint.models_directory import COMMANDS, Sources, choose_sources
from omnispeech.cli import main
from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.layers.packing import Scheme
from omnispeech.quantization.verify import StoredModel
from omnispeech.quantization.whole_model import source_fingerprint

OPENS2S = Path(__file__).parent / "golden" / "opens2s" / "opens2s-tiny"
PLAIN = Path(__file__).parent / "golden" / "awq" / "tiny-qwen3-fp16"
NAMES = {"awq": "OpenS2S-llm-awq", "gptq": "OpenS2S-llm-gptq", "8bit": "OpenS2S-8bit"}
SPEECH = "OpenS2S-speech-lm-awq"
GPTQ, NARROW = Scheme("gptq", 4, 32), Scheme("gemm", 4, 16)
SCHEMES = {NAMES["awq"]: GEMM, NAMES["gptq"]: GPTQ, NAMES["8bit"]: INT8, SPEECH: NARROW}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("OpenS2S", "glm-4-voice-decoder"):
        (tmp_path / name).mkdir()
    return tmp_path


def make(models: Path, name: str, *, entered: bool = True) -> Path:
    """A directory that stands for a quantized model."""
    path = models / name
    path.mkdir()
    scheme = SCHEMES.get(name, GEMM)
    (path / "config.json").write_text(json.dumps(quantization_config(scheme)))
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
    with pytest.raises(CheckpointError, match=r"OpenS2S-llm-awq is a link to .*unmounted, which"):
        choose_sources(models)


def delete(path: Path) -> None:
    shutil.rmtree(path)


def put_aside(path: Path) -> None:
    path.rename(path.with_name(f"{path.name}.partial"))


@pytest.mark.parametrize("take", [delete, put_aside])
@pytest.mark.parametrize("method", ["awq", "gptq", "8bit"])
def test_one_that_went_is_no_reason_to_take_another_precision(
    models: Path, method: str, take: Callable[[Path], None]
) -> None:
    take(make(models, NAMES[method]))
    with pytest.raises(CheckpointError) as error:
        choose_sources(models)
    assert f"{models / NAMES[method]} is missing, but the manifest knows it" in str(error.value)
    forget = f"forget --models {models} {NAMES[method]}"
    assert all(way in str(error.value) for way in ("--llm", COMMANDS[NAMES[method]], forget))
    assert choose_sources(models, "bf16").llm is None
    assert main(["forget", "--models", str(models), NAMES[method]]) == 0
    assert choose_sources(models) == choose_sources(models, "bf16")


def test_one_that_went_does_no_harm_where_a_better_one_is(models: Path) -> None:
    delete(make(models, NAMES["gptq"]))
    assert choose_sources(models, "bf16").llm is None
    awq = make(models, NAMES["awq"])
    assert choose_sources(models).llm == awq


def test_only_what_is_gone_is_forgotten(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(models, NAMES["awq"])
    assert main(["forget", "--models", str(models), f"{NAMES['awq']}/"]) == 1
    assert "is still there; delete it first" in capsys.readouterr().err
    assert choose_sources(models).llm == models / NAMES["awq"]


@pytest.mark.parametrize("name", [*NAMES.values(), SPEECH])
@pytest.mark.parametrize("asked", ["auto", "by name"])
def test_weights_of_another_method_than_the_name_says_are_refused(
    models: Path, name: str, asked: str
) -> None:
    path = make(models, name, entered=False)
    other = {"gptq": GEMM}.get(SCHEMES[name].layout, GPTQ)
    (path / "config.json").write_text(json.dumps(quantization_config(other)))
    Manifest(models).enter(name, {})
    choice = {directory: choice for choice, directory in NAMES.items()}.get(name, "bf16")
    with pytest.raises(CheckpointError, match=rf"{name} should hold .*, its config.json") as error:
        choose_sources(
            models, "auto" if asked == "auto" else choice, "awq" if name == SPEECH else "bf16"
        )
    assert "--overwrite" not in str(error.value)


@pytest.mark.parametrize("name", [NAMES["awq"], NAMES["gptq"], SPEECH])
def test_a_language_model_without_the_model_around_it_asks_for_that(
    models: Path, name: str
) -> None:
    make(models, name)
    (models / "OpenS2S").rmdir()
    with pytest.raises(CheckpointError) as error:
        choose_sources(models, speech_lm="awq" if name == SPEECH else "bf16")
    assert str(error.value) == (
        f"{models / 'OpenS2S'} is missing; {name} is one language model and still needs the audio "
        "encoder, the adapters and the other language model from there; bring it with: "
        f"omnispeech fetch OpenS2S --models {models}"
    )


@pytest.mark.parametrize("name", ["OpenS2S", "glm-4-voice-decoder", *NAMES.values(), SPEECH])
@pytest.mark.parametrize("alone", [True, False])
def test_a_directory_of_one_model_is_one_level_too_deep(
    tmp_path: Path, name: str, alone: bool
) -> None:
    make(tmp_path, name)
    if not alone:
        make(tmp_path, "something else")
    with pytest.raises(CheckpointError, match=f"one level too deep; use --models {tmp_path}$"):
        choose_sources(tmp_path / name)


def test_a_models_directory_may_have_the_name_of_a_model(tmp_path: Path) -> None:
    models = tmp_path / "OpenS2S"
    for name in ("OpenS2S", "glm-4-voice-decoder"):
        (models / name).mkdir(parents=True)
    assert choose_sources(models).base == models / "OpenS2S"


@pytest.mark.parametrize("name", ["OpenS2S", "glm-4-voice-decoder", *NAMES.values(), SPEECH])
def test_a_file_in_the_place_of_a_directory_is_named(models: Path, name: str) -> None:
    if (models / name).is_dir():
        (models / name).rmdir()
    (models / name).write_bytes(b"an archive")
    with pytest.raises(CheckpointError, match=f"{name} is no directory"):
        choose_sources(models, speech_lm="awq" if name == SPEECH else "bf16")


def test_a_manifest_of_another_version_is_a_matter_of_the_manifest(models: Path) -> None:
    make(models, NAMES["awq"])
    (models / FILE_NAME).write_text('{"format": 2, "entries": {}}')
    for choice in ("auto", "awq"):
        with pytest.raises(CheckpointError) as error:
            choose_sources(models, choice)
        assert "use the version of omnispeech that wrote it" in str(error.value)
        assert "to check" not in str(error.value) and "--overwrite" not in str(error.value)


def test_verify_names_no_model_where_the_manifest_cannot_be_read(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (models / FILE_NAME).write_text('{"format": 2, "entries": {}}')
    assert verify(models, NAMES["awq"]) == 1
    shown = capsys.readouterr()
    assert "move the file away" in shown.err
    assert not shown.out


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
    assert "No AWQ-quantized LLM found" in caplog.text
    caplog.clear()
    make(models, NAMES["gptq"])
    choose_sources(models)
    assert "No AWQ-quantized LLM found" in caplog.text
    caplog.clear()
    make(models, NAMES["awq"])
    choose_sources(models)
    assert "No AWQ" not in caplog.text


# omnispeech verify


@pytest.fixture
def quantized(models: Path) -> Path:
    """Real files: an LLM, a speech LM and a whole model, none of them entered."""
    quantize_language_model(OPENS2S, models / NAMES["awq"])
    quantize_language_model(OPENS2S, models / SPEECH, NARROW, part="speech_lm")
    quantize_opens2s(OPENS2S, models / NAMES["8bit"])
    return models


def verify(models: Path, *arguments: str) -> int:
    return main(["verify", "--models", str(models), *arguments])


def test_verify_enters_what_is_whole(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(quantized) == 0
    whole = sorted([NAMES["awq"], NAMES["8bit"], SPEECH])
    entered = "entered: headers fit, no earlier record to compare with"
    assert capsys.readouterr().out.splitlines() == [f"{name}: {entered}" for name in whole]
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


@pytest.mark.parametrize("name", ["nothing", "../elsewhere"])
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


def report(path: Path, scheme: Scheme, source: str) -> None:
    """What a finished run leaves beside the weights."""
    data = {
        "signature": {"source": source},
        "scheme": asdict(scheme),
        "kept": [],
        "digests": dict(StoredModel(path, scheme, []).digests()),
    }
    (path / "quantization_report.json").write_text(json.dumps(data))


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_verify_enters_what_its_report_describes(
    quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (quantized / "OpenS2S").rmdir()
    report(quantized / NAMES["awq"], GEMM, "abc")
    assert verify(quantized, NAMES["awq"]) == 0
    said = f"{NAMES['awq']}: entered: every tensor is as its quantization_report.json says\n"
    assert capsys.readouterr().out == said
    assert Manifest(quantized).entry(NAMES["awq"]).made["source"] == "abc"


def test_verify_does_not_enter_what_its_report_does_not_describe(
    quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(quantized / NAMES["awq"], GEMM, "abc")
    flip_last_byte(quantized / NAMES["awq"] / "model.safetensors")
    assert verify(quantized, NAMES["awq"]) == 1
    assert "1 tensors are not what was quantized" in capsys.readouterr().out
    assert not Manifest(quantized).names()


def test_verify_needs_no_report_of_tensors(quantized: Path) -> None:
    (quantized / NAMES["awq"] / "quantization_report.json").write_text('{"signature": {}}')
    assert verify(quantized, NAMES["awq"]) == 0


@pytest.mark.parametrize("name", [NAMES["awq"], SPEECH])
def test_verify_does_not_enter_another_method_under_the_name(
    quantized: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(quantized / name)
    quantize_language_model(OPENS2S, quantized / name, GPTQ)
    assert verify(quantized, name) == 1
    assert f"{name} should hold awq, its config.json says gptq" in capsys.readouterr().out
    assert not Manifest(quantized).names()


def test_verify_does_not_enter_the_other_language_model_under_the_name(
    quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (NAMES["awq"], SPEECH):
        (quantized / name).rename(quantized / f"was-{name}")
    (quantized / f"was-{SPEECH}").rename(quantized / NAMES["awq"])
    (quantized / f"was-{NAMES['awq']}").rename(quantized / SPEECH)
    assert verify(quantized, NAMES["awq"], SPEECH) == 1
    shown = capsys.readouterr().out
    assert f"{NAMES['awq']} holds a speech LM" in shown
    assert f"{SPEECH} holds no speech LM" in shown


def fingerprint(opens2s: Path, name: str) -> str:
    if name == NAMES["8bit"]:
        return source_fingerprint(opens2s)
    return LanguageFiles.open(opens2s, "speech_lm" if name == SPEECH else "llm").fingerprint()


@pytest.mark.parametrize("name", [NAMES["awq"], NAMES["8bit"], SPEECH])
def test_verify_finds_a_model_that_was_made_from_another(
    quantized: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (quantized / "OpenS2S").rmdir()
    shutil.copytree(OPENS2S, quantized / "OpenS2S")
    Manifest(quantized).enter(name, {"source": fingerprint(OPENS2S, name)})
    assert verify(quantized, name) == 0
    config = quantized / "OpenS2S" / "config.json"
    raw = json.loads(config.read_text())
    raw["tts_lm_config" if name == SPEECH else "llm_config"]["rope_theta"] = 12345.0
    config.write_text(json.dumps(raw))
    capsys.readouterr()
    assert verify(quantized, name) == 1
    assert f"{name} was made from another model than" in capsys.readouterr().out
    shutil.rmtree(quantized / "OpenS2S")
    assert verify(quantized, name) == 0


def test_verify_of_one_that_went_says_how_to_forget_it(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    delete(make(models, NAMES["awq"]))
    assert verify(models) == 1
    assert f"omnispeech forget --models {models} {NAMES['awq']}" in capsys.readouterr().out
    assert Manifest(models).names() == [NAMES["awq"]]
