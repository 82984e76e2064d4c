"""Turns over the engine with a WavLM that hears."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_models import Caller, question, run
from quantized_models import quantize_opens2s
from wavlm_models import CPU, add_bridge, make_wavlm_checkpoint, random_bridge, write_models

from omnispeech.assembly import load_sources
from omnispeech.audio.features import Waveform
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.models_directory import choose_sources
from omnispeech.cli import main
from omnispeech.config import DecoderConfig, EngineConfig
from omnispeech.engine.conversations import Conversations
from omnispeech.engine.events import Audio, Done, Message, TurnRequest
from omnispeech.engine.runner import Models
from omnispeech.engine.session import Session
from omnispeech.errors import AudioError
from omnispeech.service import find_sources, read_settings


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_models(tmp_path_factory.mktemp("serving") / "models")
    add_bridge(path)
    return path


def load(directory: Path, audio_encoder: str = "wavlm") -> Models:
    sources = choose_sources(directory, audio_encoder=audio_encoder)
    models = load_sources(sources, CPU, torch.float32)
    return replace(models, language=replace(models.language, unit_limit=30))


@pytest.fixture(scope="module")
def models(directory: Path) -> Models:
    return load(directory)


def engine(models: Models, *, compatible: bool = False) -> Conversations:
    config = EngineConfig(kv_tokens=8192, context_length=4096, compatible=compatible)
    return Conversations(models, config, DecoderConfig(euler_steps=1, first_block=10))


def sounds(*seconds: float, seed: int = 0) -> TurnRequest:
    noise = np.random.default_rng(seed)
    parts = tuple(Audio(noise.normal(0, 0.1, int(16_000 * s)).astype(np.float32)) for s in seconds)
    return replace(question(seconds=0), messages=(Message("user", parts),))


def heard(conversations: Conversations, request: TurnRequest) -> tuple[Caller, torch.Tensor]:
    """The caller after its reply, and the vectors of its prompt."""
    vectors: list[torch.Tensor] = []
    listen = conversations.runner.listen

    def note(session: Session) -> None:
        listen(session)
        if session.prompt_vectors is not None:
            vectors.append(session.prompt_vectors)

    conversations.runner.listen = note  # type: ignore[method-assign]
    caller = Caller(conversations, request)
    run(conversations, steps=2000)
    return caller, vectors[0]


def test_a_spoken_question_is_answered(models: Models) -> None:
    conversations = engine(models)
    caller = Caller(conversations, sounds(1.5))
    run(conversations)
    done = caller.events[-1]
    assert isinstance(done, Done) and done.prompt_tokens == caller.session.prompt_length
    assert caller.text and caller.pcm


@pytest.mark.parametrize("compatible", [False, True])
@pytest.mark.parametrize("seconds", [(0.025,), (1.0,), (31.0, 2.0), (30.02, 0.7)])
def test_f5_the_prompt_has_as_many_places_as_vectors_come_out(
    models: Models, seconds: tuple[float, ...], compatible: bool
) -> None:
    """Defect F5: the fork's lengths are five times too large."""
    caller, vectors = heard(engine(models, compatible=compatible), sounds(*seconds))
    assert len(vectors) == caller.session.prompt_length == len(caller.session.key)
    assert isinstance(caller.events[-1], Done)


def test_it_is_the_sound_that_is_heard(models: Models) -> None:
    first, again, other = (heard(engine(models), sounds(2.0, seed=s))[1] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)


def test_a_sound_of_less_than_a_window_is_refused_before_it_is_heard(models: Models) -> None:
    with pytest.raises(AudioError, match=r"an audio of 399 samples is too short .* 0\.1 s or more"):
        engine(models).open(sounds(399 / 16_000), print)


def test_each_sound_is_heard_as_if_it_were_alone(models: Models) -> None:
    lm = models.language.lm
    clips = [torch.randn(20_000), torch.randn(9_999)]
    both = lm.embed_audio(clips, [20_000, 9_999], batch_rule=False)
    for clip, together in zip(clips, both, strict=True):
        assert torch.equal(lm.embed_audio([clip], [len(clip)], batch_rule=False)[0], together)


def test_samples_and_no_mel_are_prepared(models: Models) -> None:
    assert isinstance(models.language.front_end, Waveform)
    session = engine(models).open(sounds(1.0, 0.5), print)
    assert [tuple(features().shape) for features in session.features] == [(16_000,), (8_000,)]


def test_a_checkpoint_that_brings_its_wavlm_is_served_without_a_word(
    directory: Path, tmp_path: Path
) -> None:
    models = Path(shutil.copytree(directory, tmp_path / "models"))
    make_wavlm_checkpoint(models, body=None, bridge=random_bridge())
    conversations = engine(load(models, "checkpoint"))
    caller = Caller(conversations, sounds(1.0))
    run(conversations)
    assert isinstance(caller.events[-1], Done) and caller.pcm


def test_a_bridge_serves_the_checkpoint_with_quantized_language_models_too(
    directory: Path, tmp_path: Path
) -> None:
    models = Path(shutil.copytree(directory, tmp_path / "models"))
    quantize_opens2s(models / "OpenS2S", models / "OpenS2S-8bit")
    Manifest(models).enter("OpenS2S-8bit", {})
    sources = choose_sources(models, "8bit", audio_encoder="wavlm")
    assert sources.base.name == "OpenS2S-8bit"
    load_sources(sources, CPU, torch.float32)


def test_f5_serve_refuses_wavlm_without_a_bridge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Defect F5: noise between two networks is no encoder."""
    write_models(tmp_path)
    code = main(["serve", "--models", str(tmp_path), "--audio-encoder", "wavlm", "--port", "0"])
    said = capsys.readouterr().err
    assert code == 1 and "omnispeech train-bridge" in said and "answers to noise" in said


def test_the_encoder_is_a_setting_like_the_others(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"models": str(directory)}
    assert find_sources(read_settings(flags).place).wavlm is None
    monkeypatch.setenv("OMNISPEECH_AUDIO_ENCODER", "wavlm")
    wavlm = find_sources(read_settings(flags).place).wavlm
    assert wavlm is not None and wavlm.body == directory / "wavlm-base-plus"


def test_tiny_writes_a_wavlm_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny", str(tmp_path / "with"), "--wavlm"]) == 0
    assert "wavlm-base-plus under" in capsys.readouterr().out
    config = json.loads((tmp_path / "with/wavlm-base-plus/config.json").read_text())
    assert config["architectures"] == ["WavLMModel"]
    assert main(["tiny", str(tmp_path / "without")]) == 0
    assert not (tmp_path / "without/wavlm-base-plus").exists()
