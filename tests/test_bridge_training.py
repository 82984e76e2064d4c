"""Training of the layers between WavLM and a checkpoint: `omnispeech train-bridge`."""

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from omnispeech.assembly import choose_device
from omnispeech.audio.io import decode_audio
from omnispeech.bridge_training import job as job_module
from omnispeech.bridge_training import listening, training
from omnispeech.bridge_training.clips import CLIP, AudioFile, find_audio, split
from omnispeech.bridge_training.fitting import check_amount, columns, fit_bridge, untrained_bridge
from omnispeech.bridge_training.held_out import HeldOut
from omnispeech.bridge_training.job import BridgeSettings, open_job
from omnispeech.bridge_training.listeners import Heard, Listeners
from omnispeech.bridge_training.listening import Statistics
from omnispeech.bridge_training.regression import Fit, Sums, choose_ridge, windows
from omnispeech.bridge_training.report import read_report
from omnispeech.bridge_training.training import train_bridge
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.opens2s import load_opens2s
from omnispeech.checkpoint.wavlm import read_bridge
from omnispeech.checkpoint.wavlm_paths import wavlm_paths
from omnispeech.cli import main
from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.models.wavlm import Bridge
from omnispeech.quantization.progress import Progress
from omnispeech.quantization.state import partial_path
from omnispeech.tiny.directory import write_tiny

HEARING = Path(__file__).parent / "golden" / "wavlm-hearing"
CPU = torch.device("cpu")
RATE = 16_000


def correlated(frames: int, inputs: int, outputs: int, rank: int) -> tuple[Tensor, Tensor]:
    """x [T, K] with means and scales of its own; y [T, N], of it through `rank`, and noise."""
    draw = torch.Generator().manual_seed(frames)
    x = torch.randn(frames, inputs, generator=draw) * torch.logspace(-1, 1, inputs) + 3
    through = torch.Generator().manual_seed(1)
    reduce, expand = (
        torch.randn(inputs, rank, generator=through),
        torch.randn(rank, outputs, generator=through),
    )
    return x, x @ reduce @ expand / 10 + 5 + 0.3 * torch.randn(frames, outputs, generator=draw)


def sums_of(x: Tensor, y: Tensor) -> Sums:
    sums = Sums.zero(x.shape[1], y.shape[1])
    for start in range(0, len(x), 37):
        sums.add(x[start : start + 37], y[start : start + 37])
    return sums


def test_without_a_ridge_it_is_the_reduced_rank_regression_of_the_textbook() -> None:
    x, y = (t.double() for t in correlated(400, 12, 9, 5))
    centered, target = x - x.mean(0), y - y.mean(0)
    full = centered @ torch.linalg.lstsq(centered, target).solution
    u, s, v = torch.linalg.svd(full, full_matrices=False)
    expected = (u[:, :3] * s[:3]) @ v[:3] + y.mean(0)
    found = Fit(sums_of(x, y), rank=3).map(0.0)
    given = (x - found.x_mean) @ found.reduce @ found.expand + found.y_mean
    torch.testing.assert_close(given, expected)


def test_no_other_map_of_that_rank_fits_better() -> None:
    sums = sums_of(*correlated(400, 12, 9, 5))
    best = Fit(sums, rank=3).map(0.0)
    for seed in range(20):
        nudge = torch.randn(
            best.reduce.shape, generator=torch.Generator().manual_seed(seed)
        ).double()
        other = type(best)(
            best.x_mean, best.y_mean, best.reduce + 1e-3 * nudge, best.expand, best.ridge
        )
        assert other.squared_error(sums) > best.squared_error(sums)


def test_errors_from_sums_are_those_from_frames() -> None:
    fit = Fit(sums_of(*correlated(300, 12, 9, 5)), rank=4).map(0.01)
    x, y = (t.double() for t in correlated(200, 12, 9, 5))
    given = (x - fit.x_mean) @ fit.reduce @ fit.expand + fit.y_mean
    assert fit.squared_error(sums_of(x, y)) == pytest.approx(float((given - y).square().sum()))


def test_a_column_that_never_changes_gets_no_weight() -> None:
    x, y = correlated(100, 6, 4, 3)
    x[:, 2] = 7.0
    found = Fit(sums_of(x, y), rank=4).map(1e-3)
    assert (found.reduce[2] == 0).all() and found.reduce.isfinite().all()


def test_the_ridge_is_the_one_that_unheard_audio_wants() -> None:
    """With hardly more frames than columns, none is too little."""
    few, more = sums_of(*correlated(16, 12, 9, 2)), sums_of(*correlated(500, 12, 9, 2))
    fit = Fit(few, rank=9)
    chosen = choose_ridge(fit, more)
    errors = {ridge: fit.map(ridge).squared_error(more) for ridge in (1e-6, chosen, 10.0)}
    assert min(errors, key=errors.__getitem__) == chosen != 1e-6


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9])
def test_windows_are_what_the_convolution_sees(length: int) -> None:
    conv = torch.nn.Conv1d(5, 7, 3, stride=2, padding=1)
    features = torch.randn(length, 5)
    seen = windows(features, 3, 2, 1)  # [T', 15]
    expected = conv(features.T)[:].T
    torch.testing.assert_close(seen @ conv.weight.flatten(1).T + conv.bias, expected)


def heard_by(bridge: Bridge, frames: int, seed: int) -> Heard:
    """A clip whose encoder frames are exactly what `bridge` makes of its features."""
    features = torch.randn(2 * frames, 16, generator=torch.Generator().manual_seed(seed)) + 2
    with torch.inference_mode():
        return Heard(features, bridge(features))


@pytest.mark.parametrize("d_model", [24, 10], ids=["wider", "narrower"])
def test_a_bridge_that_there_was_is_found_again(d_model: int) -> None:
    true = untrained_bridge(16, d_model, 5, CPU)
    other = untrained_bridge(16, d_model, 6, CPU)
    statistics = Statistics.empty(other)
    for seed in range(30):
        heard = heard_by(true, 20, seed)
        kind = statistics.training if seed < 25 else statistics.validation
        kind.add(heard.windows(other), heard.frames)
    fitted = fit_bridge(statistics, other)
    unheard = heard_by(true, 20, 99)
    torch.testing.assert_close(fitted.bridge(unheard.features), unheard.frames, atol=1e-3, rtol=0)
    assert fitted.error < 1e-6


def test_too_little_audio_says_how_much_more() -> None:
    bridge = untrained_bridge(768, 1280, 0, CPU)
    assert columns(bridge) == 2305
    check_amount(2305, bridge)
    with pytest.raises(ConfigError, match=r"2304 frames \(92 s\).* 2305 numbers .*add 830 s"):
        check_amount(2304, bridge)


# ---- data


def write_clip(path: Path, seconds: float, seed: int, rate: int = RATE) -> Path:
    """Syllables of noise and of a voice, with pauses."""
    draw = np.random.default_rng(seed)
    pieces = [_syllable(draw, rate) for _ in range(int(10 * seconds))]
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.concatenate(pieces)[: int(seconds * rate)].astype(np.float32), rate)
    return path


def _syllable(draw: np.random.Generator, rate: int) -> Any:
    count = int(rate * draw.uniform(0.1, 0.3))
    time = np.arange(count) / rate
    pitch = 2 ** draw.uniform(6.5, 8.5)
    voice = sum(np.sin(2 * np.pi * pitch * h * time) / h for h in range(1, 12))
    kind = draw.integers(3)
    return draw.uniform(0.02, 0.3) * (voice, draw.standard_normal(count), 0 * time)[kind]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("recordings")
    for i in range(10):
        write_clip(place / f"{'day' if i % 2 else 'night'}/{i}.wav", 4.0, i)
    return place


def test_files_are_found_in_folders_and_by_what_libsndfile_reads(tmp_path: Path) -> None:
    for name in ("a.wav", "deep/er/b.FLAC", "c.ogg", "d.aiff", ".hidden.wav"):
        write_clip(tmp_path / name, 0.5, 1)
    (tmp_path / "notes.txt").write_text("no sound")
    assert [file.name for file in find_audio(tmp_path)] == [
        "a.wav",
        "c.ogg",
        "d.aiff",
        "deep/er/b.FLAC",
    ]


def test_without_data_it_is_what_ships() -> None:
    assert len(find_audio(None)) == 139


def test_a_long_recording_becomes_clips_of_thirty_seconds(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "long.wav", 61.5, 3)
    (file,) = find_audio(tmp_path)
    clips = list(file.clips())
    assert [len(clip) for clip in clips] == [CLIP, CLIP, int(1.5 * RATE)]
    whole = decode_audio(path.read_bytes(), max_seconds=100)
    assert (np.concatenate(clips) == whole).all()


def test_what_is_left_of_a_file_and_too_short_is_not_a_clip(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.wav", 30.05, 3)
    (file,) = find_audio(tmp_path)
    assert [len(clip) for clip in file.clips()] == [CLIP]


def files(count: int) -> list[AudioFile]:
    return [AudioFile(Path(f"{i}.wav"), f"{i}.wav", 1.0, f"{i:064}") for i in range(count)]


def test_whole_files_are_held_out_and_no_file_is_on_two_sides() -> None:
    parts = split(files(50), 0.2, seed=0)
    assert [len(kind) for kind in (parts.training, parts.validation, parts.held_out)] == [32, 8, 10]
    assert len({f.name for f in (*parts.fitted, *parts.held_out)}) == 50


def test_a_copy_is_not_held_out_from_its_original() -> None:
    copies = [AudioFile(f.path, f"copy of {f.name}", 1.0, f.sha256) for f in files(20)]
    parts = split([*files(20), *copies], 0.5, seed=0)
    assert len(parts.fitted) + len(parts.held_out) == 20


def test_a_renamed_or_added_file_moves_no_other() -> None:
    before = split(files(40), 0.25, seed=0)
    renamed = [AudioFile(f.path, f"x{f.name}", 1.0, f.sha256) for f in files(40)]
    assert split(renamed, 0.25, seed=0).digest == before.digest
    assert split(files(40), 0.25, seed=1).digest != before.digest


def test_three_files_are_enough_to_divide() -> None:
    parts = split(files(3), 0.9, seed=0)
    assert [len(kind) for kind in (parts.training, parts.validation, parts.held_out)] == [1, 1, 1]


@pytest.mark.parametrize(("count", "share"), [(2, 0.1), (9, 0.0), (9, 1.0)])
def test_what_cannot_be_divided_is_refused(count: int, share: float) -> None:
    with pytest.raises(ConfigError, match="different audio files|--hold-out"):
        split(files(count), share, seed=0)


# ---- a whole run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("models")
    write_tiny(models)
    shutil.copytree(HEARING, models / "wavlm-base-plus")
    return models


@pytest.fixture
def models(made: Path, tmp_path: Path) -> Path:
    for name in ("OpenS2S", "wavlm-base-plus"):
        shutil.copytree(made / name, tmp_path / "models" / name)
    return tmp_path / "models"


@pytest.fixture(scope="module")
def trained(made: Path, recordings: Path) -> Path:
    train(made, recordings)
    return made


def train(models: Path, recordings: Path | None, **more: Any) -> Any:
    return train_bridge(BridgeSettings(models=models, data=recordings, device="cpu", **more))


def weights(models: Path) -> bytes:
    return (models / "wavlm-bridge" / "model.safetensors").read_bytes()


def test_on_speech_it_is_well_below_a_constant_and_an_untrained_bridge(
    models: Path, tmp_path: Path
) -> None:
    """On every fifth of the clips that ship."""
    (tmp_path / "speech").mkdir()
    for file in find_audio(None)[::5]:
        shutil.copy(file.path, tmp_path / "speech")
    errors = train(models, tmp_path / "speech").data["errors"]
    for place in ("encoder", "adapter"):
        assert errors[place]["trained"] < 0.7 * errors[place]["constant"]
        assert errors[place]["trained"] < 0.2 * errors[place]["untrained"]
    assert errors["encoder"]["constant"] >= 1.0


def test_what_is_stored_is_the_bridge_that_was_tested(trained: Path, recordings: Path) -> None:
    job = open_job(BridgeSettings(models=trained, data=recordings, device="cpu"))
    listeners = job.listeners()
    bridge = untrained_bridge(64, 64, 0, CPU)
    stored = read_bridge(trained / "wavlm-bridge")
    bridge.load_state_dict(stored.weights)
    assert stored.owners == job.owners
    test = HeldOut({"trained": lambda heard: heard.bridged(bridge)})
    for file in job.split.held_out:
        for clip in file.clips():
            heard = listeners.hear(clip, file.name)
            assert heard is not None
            test.add(file.name, heard, listeners)
    told = read_report(trained / "wavlm-bridge").data["errors"]["encoder"]["trained"]
    assert test.errors()["encoder"]["trained"] == pytest.approx(told, rel=1e-5)


def test_the_server_hears_as_well_as_the_report_says(trained: Path, recordings: Path) -> None:
    directory = trained / "OpenS2S"
    paths = wavlm_paths(trained, directory)
    served = load_opens2s(directory, CPU, torch.float32, wavlm=paths).model.audio_encoder_model
    job = open_job(BridgeSettings(models=trained, data=recordings, device="cpu"))
    listeners = job.listeners()
    (file,) = job.split.held_out
    (clip,) = file.clips()
    samples = torch.from_numpy(clip)
    heard = listeners.hear(clip, file.name)
    assert heard is not None and served.output_length(len(clip)) == len(heard.frames) == 100
    test = HeldOut({"served": lambda _: served.encode(samples, len(clip))})
    test.add(file.name, heard, listeners)
    told = read_report(trained / "wavlm-bridge").data["errors"]
    for place in ("encoder", "adapter"):
        assert test.errors()[place]["served"] == pytest.approx(told[place]["trained"], rel=1e-4)


def test_the_result_is_entered_with_what_made_it(trained: Path) -> None:
    manifest = Manifest(trained)
    manifest.check("wavlm-bridge", deep=True)
    made = manifest.entry("wavlm-bridge").made
    assert made["signature"]["sources"].keys() == {"encoder", "wavlm", "checkpoint"}
    assert made["errors"]["encoder"]["trained"] < 1
    assert not partial_path(trained / "wavlm-bridge").exists()


def crashing(call: Callable[..., Any], count: int) -> Callable[..., Any]:
    left = [count]

    def wrapped(*given: Any, **more: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return call(*given, **more)

    return wrapped


@pytest.mark.parametrize(
    ("where", "name", "count"),
    [
        (Listeners, "hear", 0),
        (Listeners, "hear", 1),
        (Listeners, "hear", 8),
        (Listeners, "hear", 9),  # while testing
        (Statistics, "write", 3),
        (training, "fit_bridge", 0),
        (training, "write_bridge", 0),
        (training, "give_name", 0),
        (Manifest, "enter", 0),
    ],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    where: Any, name: str, count: int, models: Path, recordings: Path, trained: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listening, "SAVED_EVERY_S", 0.0)
        patch.setattr(where, name, crashing(getattr(where, name), count))
        with pytest.raises(KeyboardInterrupt):
            train(models, recordings)
    assert "wavlm-bridge" not in Manifest(models).names()
    train(models, recordings)
    assert weights(models) == weights(trained)
    Manifest(models).check("wavlm-bridge", deep=True)
    assert not partial_path(models / "wavlm-bridge").exists()


def test_clips_that_were_heard_are_not_heard_again(
    models: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    hear = Listeners.hear

    def counted(self: Listeners, clip: Any, name: str) -> Heard | None:
        heard.append(name)
        if len(heard) == 6:
            raise KeyboardInterrupt
        return hear(self, clip, name)

    monkeypatch.setattr(listening, "SAVED_EVERY_S", 0.0)
    monkeypatch.setattr(Listeners, "hear", counted)
    with pytest.raises(KeyboardInterrupt):
        train(models, recordings)
    train(models, recordings)
    assert len(heard) == 10 + 1  # only the one that was interrupted


def test_an_interrupted_run_of_other_audio_is_refused_and_can_be_thrown_away(
    models: Path, recordings: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "fit_bridge", crashing(fit_bridge, 0))
        with pytest.raises(KeyboardInterrupt):
            train(models, recordings)
    with pytest.raises(ConfigError, match=r"the audio, or how it is divided.*--restart"):
        train(models, recordings, seed=3)
    assert train(models, recordings, seed=3, restart=True).data["audio"]["seed"] == 3


def test_a_result_that_is_there_is_checked_and_not_made_again(
    trained: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Listeners, "hear", None)
    report = train(trained, recordings)
    assert report.found and "is there already, whole" in report.lines()[0]


def test_a_result_of_other_audio_is_only_replaced_on_demand(
    trained: Path, models: Path, recordings: Path
) -> None:
    train(models, recordings)
    with pytest.raises(ConfigError, match="not what is asked for.*--overwrite"):
        train(models, recordings, hold_out=0.3)
    train(models, recordings, hold_out=0.3, overwrite=True)
    assert weights(models) != weights(trained)
    Manifest(models).check("wavlm-bridge", deep=True)


def test_a_damaged_result_is_not_reported_as_found(models: Path, recordings: Path) -> None:
    train(models, recordings)
    path = models / "wavlm-bridge" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=r"model.safetensors .*--overwrite"):
        train(models, recordings)


def test_verify_names_the_command_for_a_damaged_bridge(
    models: Path, recordings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(models, recordings)
    (models / "wavlm-bridge" / "bridge_report.json").unlink()  # for people alone
    assert main(["verify", "--models", str(models), "wavlm-bridge"]) == 0
    (models / "omnispeech-manifest.json").unlink()
    assert main(["verify", "--models", str(models), "wavlm-bridge"]) == 0  # entered anew
    (models / "wavlm-bridge" / "model.safetensors").write_bytes(b"")
    assert main(["verify", "--models", str(models), "wavlm-bridge"]) == 1
    told = capsys.readouterr().out
    assert f"omnispeech train-bridge --models {models} --overwrite" in told


def test_a_dry_run_says_what_would_be_heard_and_writes_nothing(
    models: Path, recordings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["train-bridge", "--models", str(models), "--data", str(recordings), "--dry-run"]
    assert main(given) == 0
    shown = capsys.readouterr()
    assert "8 (32 s) to fit, 1 (4 s) to choose the ridge, 1 (4 s) to test" in shown.err
    assert shown.out == "dry run: nothing was written\n"
    assert sorted(path.name for path in models.iterdir()) == ["OpenS2S", "wavlm-base-plus"]


def test_the_command_says_how_good_it_is_and_how_to_serve_it(
    models: Path, recordings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["train-bridge", "--models", str(models), "--data", str(recordings), "--device", "cpu"]
    assert main(given) == 0
    shown = capsys.readouterr().out
    for words in ("untrained bridge", "Relative error on 1 files", "per hour of audio"):
        assert words in shown
    assert f"python model_worker.py --models {models} --audio-encoder wavlm" in shown
    report = json.loads((models / "wavlm-bridge" / "bridge_report.json").read_text())
    assert report["fit"]["columns"] == 3 * 64 + 1


def test_without_a_terminal_a_line_comes_now_and_then_and_at_the_end() -> None:
    stream, now = io.StringIO(), [0.0]
    progress = Progress(stream, lambda: now[0], count="heard {} of {} s", every_s=5.0)
    progress.start(20, 4)
    for second in range(5, 21):
        now[0] += 1
        progress.step(second)
    assert stream.getvalue().splitlines() == [
        "heard 4 of 20 s done before",
        "heard 9 of 20 s: 11 s left",
        "heard 14 of 20 s: 6 s left",
        "heard 19 of 20 s: 1 s left",
        "heard 20 of 20 s: 0 s left",
    ]


# ---- refusals


def refused(models: Path, data: Path | None, message: str) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=message):
        train(models, data)
    assert not (models / "wavlm-bridge").exists()


def test_no_audio_is_one_clear_line(models: Path, tmp_path: Path) -> None:
    refused(models, tmp_path / "nowhere", "nowhere is not a directory")
    (tmp_path / "empty").mkdir()
    refused(models, tmp_path / "empty", "empty holds no audio; allowed: WAV, FLAC")


def test_files_that_are_no_audio_are_named_before_anything_is_heard(
    models: Path, tmp_path: Path
) -> None:
    for i in range(3):
        write_clip(tmp_path / "data" / f"{i}.wav", 4.0, i)
    (tmp_path / "data" / "broken.wav").write_bytes(b"RIFF, but not really")
    refused(models, tmp_path / "data", r"1 of 4 files cannot be read as audio: .*broken\.wav")


def test_a_file_that_ends_early_is_named(models: Path, recordings: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(recordings, tmp_path / "data"))
    for i in range(3):
        path = write_clip(data / f"{i}.flac", 8.0, 50 + i)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(models, data, r"\d\.flac: the audio cannot be decoded, or not to its end")


def test_too_little_audio_is_refused_before_anything_is_loaded(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        write_clip(tmp_path / "data" / f"{i}.wav", 2.0, i)
    monkeypatch.setattr(job_module, "load_wavlm", None)
    refused(models, tmp_path / "data", r"50 frames \(2 s\) to fit with, and 193 numbers")


@pytest.mark.parametrize("held_out", [False, True])
def test_too_little_to_choose_or_to_test_with_is_refused_before_anything_is_loaded(
    held_out: bool, models: Path, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(shutil.copytree(recordings, tmp_path / "data"))
    short = write_clip(data / "short.wav", 0.1, 0)
    files = find_audio(data)
    kind, words = ("held_out", "test") if held_out else ("validation", "choose the ridge")
    seed = next(s for s in range(1000) if getattr(split(files, 0.1, s), kind)[0].path == short)
    monkeypatch.setattr(job_module, "load_wavlm", None)
    with pytest.raises(ConfigError, match=rf"0.10 s of audio to {words} with \(1 files: short.wav"):
        train(models, data, seed=seed)


@pytest.mark.parametrize("name", ["OpenS2S", "wavlm-base-plus"])
def test_a_missing_model_is_named_with_the_command_that_brings_it(
    name: str, models: Path, recordings: Path
) -> None:
    shutil.rmtree(models / name)
    refused(models, recordings, f"{name} is missing or not whole.*omnispeech fetch {name}")


def test_numbers_that_are_not_finite_end_it_with_the_file(
    models: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = job_module.Ears.encode
    monkeypatch.setattr(job_module.Ears, "encode", lambda *given: encode(*given) * float("nan"))
    refused(models, recordings, r"the audio encoder gives numbers that are not finite for .*\.wav")


def test_a_bridge_no_better_than_a_constant_is_not_written(
    models: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with frames that have nothing to do with what is heard."""

    def unrelated(self: Any, clip: Sequence[float]) -> Tensor:
        return torch.randn(len(clip) // 640, 64, generator=torch.Generator().manual_seed(len(clip)))

    monkeypatch.setattr(job_module.Ears, "encode", unrelated)
    monkeypatch.setattr(training, "fit_bridge", worse)
    refused(models, recordings, "no better than a constant .*nothing was written")


def worse(statistics: Statistics, untrained: Bridge) -> Any:
    fitted = fit_bridge(statistics, untrained)
    fitted.bridge.dimension_projection.bias.add_(0.5)
    return fitted


@pytest.mark.parametrize("device", ["tpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device: str, models: Path) -> None:
    with pytest.raises(ConfigError, match="--device"):
        choose_device(device)
    with pytest.raises(ConfigError, match="--device"):
        train_bridge(BridgeSettings(models=models, device=device))
