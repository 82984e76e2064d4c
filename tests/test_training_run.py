"""The whole training with a handful of data and steps: it goes on, repeats and can be loaded."""

import fcntl
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from omnispeech.assembly import load_models
from omnispeech.checkpoint.decoder import load_decoder
from omnispeech.config import DecoderConfig
from omnispeech.engine.vocoder import open_stream
from omnispeech.errors import OmniSpeechError
from training import __main__ as command
from training import stages
from training.answers import UNITS, VOICE
from training.export import MOST_BYTES, bytes_in, half, tell_size
from training.fitting import Clock, Fitting, load
from training.recordings import JUDGED, TRAINED
from training.spectrum import log_mel
from training.stages import STAGES
from training.voices import FLITE, RATE_HZ, Voice, speak

MISSING = [program for program in ("espeak-ng", "flite") if shutil.which(program) is None]
needs_voices = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed")
MADE = [stage for stage in STAGES if stage != "report"]
ROOT = Path(__file__).parent.parent


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def small_counts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "RECORDED", {"trained": 16, "judged": 3, "strangers": 2})
        patch.setattr(stages, "STEPS", dict.fromkeys(stages.STEPS, 2))
        patch.setattr(stages, "SENTENCES", 16)
        for module in ("hearing", "language", "talk", "flow", "vocoder"):
            patch.setattr(f"training.{module}.BATCH", 4)
        patch.setattr("training.talk.HEARD", 3)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_counts: None) -> Path:
    """Without a break"""
    work = tmp_path_factory.mktemp("trained")
    for stage in MADE:
        STAGES[stage](work)
    return work


def files_of(models: Path) -> dict[str, str]:
    found = (path for path in models.rglob("*") if path.is_file())
    return {str(p.relative_to(models)): sha256(p.read_bytes()).hexdigest() for p in found}


@needs_voices
def test_a_second_run_that_is_stopped_in_its_middle_makes_the_same_model(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Fitting._save

    def save_and_stop(fitting: Fitting) -> None:
        save(fitting)
        if fitting.step == 1:
            raise Stopped

    monkeypatch.setattr(Fitting, "SAVE_S", -1.0)
    monkeypatch.setattr(Fitting, "_save", save_and_stop)
    stopped = 0
    for stage in MADE:
        try:
            STAGES[stage](tmp_path)
        except Stopped:
            stopped += 1
            STAGES[stage](tmp_path)
    assert stopped == 5
    assert files_of(tmp_path / "models") == files_of(trained / "models")


@needs_voices
def test_no_half_of_what_is_recorded_is_taken_for_the_whole(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, stopped = os.replace, []

    def stop_once(source: Path, target: Path) -> None:
        if target.name not in stopped:
            stopped.append(target.name)
            raise Stopped
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_once)
    for name in ("lexicon.pt", "judged.json", "strangers.json", "trained.json"):
        with pytest.raises(Stopped):
            STAGES["recordings"](tmp_path)
        assert stopped[-1] == name and not (tmp_path / name).exists()
    STAGES["recordings"](tmp_path)
    recorded = files_of(tmp_path)
    assert {name: files_of(trained)[name] for name in recorded} == recorded


@needs_voices
def test_a_second_export_writes_the_same_bytes_and_takes_conversions_away(trained: Path) -> None:
    models = trained / "models"
    first = files_of(models)
    load_decoder(models / "glm-4-voice-decoder", convert=True)
    assert files_of(models) != first
    STAGES["export"](trained)
    assert files_of(models) == first


@needs_voices
def test_the_server_loads_what_was_exported(trained: Path, tmp_path: Path) -> None:
    models = Path(shutil.copytree(trained / "models", tmp_path / "models"))
    loaded = load_models(models, torch.device("cpu"), torch.float32)
    assert loaded.language.units.count == UNITS
    samples = open_stream(loaded.decoder, DecoderConfig(), 1).push([*range(10)], True)
    assert len(samples) > 0 and bool(samples.isfinite().all())


def test_matrices_are_written_in_sixteen_bits_and_vectors_as_they_are() -> None:
    rng = torch.Generator().manual_seed(1)
    matrix, vector = torch.randn(9, 9, generator=rng), 400 + torch.randn(9, generator=rng)
    assert torch.equal(half(vector), vector)
    assert torch.allclose(half(matrix).float(), matrix, rtol=2**-10, atol=1e-6)
    assert half(matrix).dtype == torch.float16


@needs_voices
def test_the_size_is_counted_and_told(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = trained / "models"
    caplog.set_level(logging.INFO)
    tell_size(models)
    assert bytes_in(models) == sum(p.stat().st_size for p in models.rglob("*.*"))
    assert bytes_in(models) <= MOST_BYTES and "at most 15 MB" in caplog.text
    with (models / "large.bin").open("wb") as large:
        large.truncate(MOST_BYTES)
    tell_size(models)
    (models / "large.bin").unlink()
    assert "more than 15 MB" in caplog.text


@needs_voices
@pytest.mark.parametrize("voice", [VOICE, Voice("en-gb+m8", 140, 70), Voice(FLITE + "slt")])
def test_a_voice_says_the_same_every_time(voice: Voice) -> None:
    sound = speak("apple, seven", voice)
    assert 0.3 < len(sound) / 22_050 < 3 and np.abs(sound).max() > 0.05
    assert np.array_equal(speak("apple, seven", voice), sound)


@needs_voices
def test_no_held_out_voice_sounds_as_one_that_is_trained_on() -> None:
    def sounds(languages: Iterable[str], variants: Iterable[str]) -> set[bytes]:
        voices = (Voice(f"{a}+{b}") for a in set(languages) for b in variants)
        return {speak("apple", voice).tobytes() for voice in voices}

    bare = sounds(TRAINED.languages, ("", "whisper"))
    assert not bare & sounds(JUDGED.languages, JUDGED.variants)
    known = [spectra(variant) for variant in TRAINED.variants]
    nearest = {v: min(difference(spectra(v), other) for other in known) for v in JUDGED.variants}
    assert min(nearest.values()) > 0.3, nearest  # 8 steps of the pitch (of 100) make as much


def spectra(variant: str) -> Tensor:
    """[M, T] of a question, from its first sound to its last, its peak at 1"""
    x = speak("what is eleven plus seven", Voice(f"en-us+{variant}"))
    loud = np.nonzero(np.abs(x) > 0.01 * np.abs(x).max())[0]
    x = x[loud[0] : loud[-1]] / np.abs(x).max()
    return log_mel(torch.from_numpy(x)[None], RATE_HZ)[0].clamp(min=-6)


def difference(a: Tensor, b: Tensor) -> float:
    """Mean of the natural logarithms, both stretched to one length"""
    same = torch.nn.functional.interpolate(b[None], a.shape[1], mode="linear")[0]
    return float((a - same).abs().mean())


def test_a_line_of_progress_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.fitting.time.monotonic", lambda: 100.0)
    clock = Clock(1000, 4000)  # it goes on where it was stopped
    monkeypatch.setattr("training.fitting.time.monotonic", lambda: 160.0)
    assert clock.told(1200) == "1200 of 4000, 14 min left"


@needs_voices
def test_the_command_makes_one_stage_and_tells_which(tmp_path: Path) -> None:
    flags = ["-m", "training", str(tmp_path), "--only", "settings", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, *flags], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"stage 1 of {len(STAGES)}, settings begins" in done.stdout
    assert (tmp_path / "models" / "OpenS2S" / "config.json").is_file()


def test_every_stage_is_made_once_and_the_lanes_share_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(subprocess, "call", lambda flags: calls.append(flags[4:]) or 0)
    command.train(tmp_path, 4)
    made = [stage for _, stage, _, _ in calls]
    assert sorted(made) == sorted(STAGES)
    assert made[:2] == [*STAGES][:2] and made[-3:] == [*STAGES][-3:]
    assert made.index("ear") < made.index("vocoder")
    assert [threads for *_, threads in calls] == ["4"] * 2 + ["2"] * 4 + ["4"] * 3


def test_nothing_is_made_of_a_stage_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    failing = {"ear": 3}
    monkeypatch.setattr(
        subprocess, "call", lambda flags: calls.append(flags[5]) or failing.get(flags[5], 0)
    )
    with pytest.raises(SystemExit) as raised:
        command.train(tmp_path, 2)
    assert raised.value.code == 3
    assert not {"vocoder", "talk", "export"} & {*calls}


def test_what_is_not_trained_to_its_end_is_never_exported(tmp_path: Path) -> None:
    with pytest.raises(OmniSpeechError, match="talk.pt is missing; the stage talk makes it"):
        STAGES["export"](tmp_path)
    with pytest.raises(OmniSpeechError, match="ear.pt is missing"):
        load(tmp_path, "ear")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["work", "--threads", "0"], "--threads 0: name a number of processor cores"),
        (["work", "--only", "export"], "talk.pt is missing; the stage talk makes it"),
        (["work"], "espeak-ng is not installed. Run: apt-get install espeak-ng flite"),
        (["work", "--only", "recordings"], "espeak-ng is not installed"),
        (["file", "--only", "settings"], "File exists"),
    ],
)
def test_what_cannot_go_on_is_told_in_a_line(tmp_path: Path, flags: list[str], told: str) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "training", str(tmp_path / flags[0]), *flags[1:]]
    nothing = os.environ | {"PATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=nothing, capture_output=True, text=True)
    assert done.returncode != 0 and told in done.stderr
    assert "Traceback" not in done.stderr


def test_a_judge_who_is_not_there_is_missed_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    monkeypatch.setattr(command, "speak", lambda *_: None)
    with pytest.raises(OmniSpeechError, match="Run: pip install pocketsphinx"):
        command.check_programs()


def test_two_processes_are_never_at_one_stage(tmp_path: Path) -> None:
    with (tmp_path / "export.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="another process is at the stage export"):
            command.make(tmp_path, "export")
