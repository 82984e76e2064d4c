"""WavLM and its bridge on disk: what is read, what belongs together, what is refused."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from wavlm_models import (
    CPU,
    NEW_NAMES,
    add_bridge,
    make_wavlm_checkpoint,
    owners,
    pickled,
    random_bridge,
    write_models,
)

from omnispeech.checkpoint import hearing
from omnispeech.checkpoint.decoder import load_decoder
from omnispeech.checkpoint.files import held_bytes, size_text
from omnispeech.checkpoint.models_directory import choose_sources
from omnispeech.checkpoint.opens2s import LoadedOpenS2S, Loading, load_opens2s
from omnispeech.checkpoint.shards import Shards
from omnispeech.checkpoint.wavlm import (
    check_wavlm_conversion,
    checkpoint_fingerprint,
    load_wavlm,
    read_bridge,
    read_wavlm,
)
from omnispeech.checkpoint.wavlm_paths import WavLMPaths, own_wavlm
from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.models.wavlm import WavLMEncoder
from omnispeech.phases import Phases
from omnispeech.speech_calibration import Ears


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("wavlm") / "models")


@pytest.fixture
def models(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "models"))


@pytest.fixture
def bridged(models: Path) -> Path:
    add_bridge(models)
    return models


def load(models: Path, audio_encoder: str = "wavlm") -> LoadedOpenS2S:
    sources = choose_sources(models, audio_encoder=audio_encoder)
    return load_opens2s(sources.base, CPU, torch.float32, wavlm=sources.wavlm)


def encoder(loaded: LoadedOpenS2S) -> WavLMEncoder:
    assert isinstance(loaded.model.audio_encoder_model, WavLMEncoder)
    return loaded.model.audio_encoder_model


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_body_and_bridge_take_the_place_of_the_published_encoder(bridged: Path) -> None:
    loaded = encoder(load(bridged))
    stored = load_file(bridged / "wavlm-bridge/model.safetensors")
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], stored[name]) for name in stored)
    name = "encoder.layers.0.attention.rel_attn_embed.weight"
    assert torch.equal(weights[f"wavlm.{name}"], pickled(bridged)[name])
    assert not any(tensor.is_meta for tensor in weights.values())


def test_without_a_word_the_published_encoder_is_loaded(bridged: Path) -> None:
    loaded = load(bridged, "checkpoint")
    assert not isinstance(loaded.model.audio_encoder_model, WavLMEncoder)


def test_of_the_encoder_that_is_replaced_no_byte_is_read(
    bridged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Shards] = []
    create = Shards.__init__

    def note(self: Shards, *args: Any) -> None:
        opened.append(self)
        create(self, *args)

    monkeypatch.setattr(Shards, "__init__", note)
    load(bridged)
    checkpoint = [s for s in opened if s.files[0].path.parent == bridged / "OpenS2S"]
    sizes = [file.entries for file in checkpoint[0].files]
    own = sum(e.size for f in sizes for n, e in f.items() if n.startswith("audio_encoder_model."))
    whole = sum(entry.size for file in sizes for entry in file.values())
    assert own and max(shards.bytes_read for shards in checkpoint) == whole - own


def test_the_log_says_where_it_hears_from(bridged: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    loaded = load(bridged)
    heard = held_bytes(encoder(loaded))
    rest = size_text(held_bytes(loaded.model) - heard)
    assert f"WavLM and its bridge loaded ({size_text(heard)}, " in caplog.text
    assert f"✅ model loaded ({rest}, " in caplog.text  # counted once
    assert f"Using WavLM: {bridged / 'wavlm-base-plus'}" in caplog.text
    assert f"Loading WavLM from {bridged / 'wavlm-base-plus'} with {bridged}" in caplog.text


def load_in_phases(models: Path, audio_encoder: str = "wavlm") -> Phases:
    sources, loading = choose_sources(models, audio_encoder=audio_encoder), Loading()
    load_opens2s(sources.base, CPU, torch.float32, wavlm=sources.wavlm, loading=loading)
    return loading.phases


def test_its_phase_tells_what_was_read_of_its_files(bridged: Path) -> None:
    checkpoint = Shards(bridged / "OpenS2S", CPU)
    checkpoint_fingerprint(checkpoint)
    bridge = (bridged / "wavlm-bridge/model.safetensors").stat().st_size
    for name in ("pytorch_model.bin", "pytorch_model.safetensors"):
        done = load_in_phases(bridged).done()
        assert list(done)[:2] == ["check checkpoint", "load WavLM"]
        body = (bridged / "wavlm-base-plus" / name).stat().st_size
        assert done["load WavLM"].size == body + bridge + checkpoint.bytes_read


def test_its_phase_tells_what_was_read_of_the_checkpoint(bridged: Path) -> None:
    make_wavlm_checkpoint(bridged, body=None, bridge=random_bridge())
    bridge = sum(weight.nbytes for weight in random_bridge().state_dict().values())
    body = (bridged / "wavlm-base-plus/pytorch_model.bin").stat().st_size
    assert load_in_phases(bridged, "checkpoint").done()["load WavLM"].size == body + bridge


def test_it_is_read_in_its_own_phase(bridged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loading, done = Loading(), []
    monkeypatch.setattr(
        hearing,
        "read_wavlm",
        lambda path: done.extend(loading.phases.done()) or read_wavlm(path),
    )
    sources = choose_sources(bridged, audio_encoder="wavlm")
    load_opens2s(sources.base, CPU, torch.float32, wavlm=sources.wavlm, loading=loading)
    assert done == ["check checkpoint"]


def test_no_file_is_mapped_by_what_was_loaded(bridged: Path) -> None:
    """Its bytes would be read at the first reply, and a file that is cut short end the server."""
    sources = choose_sources(bridged, audio_encoder="wavlm")
    read_wavlm(sources.wavlm.body)  # converts
    load_decoder(sources.decoder)
    body, bridge = read_wavlm(sources.wavlm.body), read_bridge(sources.wavlm.bridge)
    decoder = load_decoder(sources.decoder)
    assert str(bridged) not in Path("/proc/self/maps").read_text()
    assert body and bridge and decoder


def test_the_pickle_is_converted_once(bridged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = encoder(load(bridged)).state_dict()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    assert same(first, encoder(load(bridged)).state_dict())
    (bridged / "wavlm-base-plus/pytorch_model.bin").unlink()
    assert same(first, encoder(load(bridged)).state_dict())


def test_a_conversion_of_other_tensors_is_found(models: Path) -> None:
    directory = models / "wavlm-base-plus"
    check_wavlm_conversion(directory)  # there is none
    read_wavlm(directory)
    check_wavlm_conversion(directory)
    converted = directory / "pytorch_model.safetensors"
    data = bytearray(converted.read_bytes())
    data[-997] ^= 1  # of an exponent
    converted.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{converted} does not hold .* pytorch_model.bin"):
        check_wavlm_conversion(directory)
    save_file(pickled(models), directory / "model.safetensors")  # is read in its place
    check_wavlm_conversion(directory)


@pytest.mark.parametrize("form", ["safetensors", "new names", "within a larger model", "half"])
def test_other_forms_of_the_same_weights_are_read(models: Path, form: str) -> None:
    directory = models / "wavlm-base-plus"
    expected = read_wavlm(directory, convert=False)
    weights = pickled(models)
    if form == "safetensors":
        (directory / "pytorch_model.bin").unlink()
        save_file(weights, directory / "model.safetensors")
    if form == "new names":
        torch.save(
            {NEW_NAMES.get(n, n): w for n, w in weights.items()}, directory / "pytorch_model.bin"
        )
    if form == "within a larger model":
        torch.save({f"wavlm.{n}": w for n, w in weights.items()}, directory / "pytorch_model.bin")
    if form == "half":
        torch.save({n: w.double() for n, w in weights.items()}, directory / "pytorch_model.bin")
    found = read_wavlm(directory, convert=False)
    assert found.fingerprint == expected.fingerprint
    assert all(w.dtype == torch.float32 for w in found.weights.values())
    if form != "half":
        assert same(found.weights, expected.weights)


def test_folded_positions_are_those_of_transformers(models: Path) -> None:
    from transformers import WavLMConfig, WavLMModel

    directory = models / "wavlm-base-plus"
    oracle = WavLMModel(WavLMConfig.from_dict(json.loads((directory / "config.json").read_text())))
    oracle.eval().load_state_dict(pickled(models))
    heard = load_wavlm(read_wavlm(directory), 8, CPU, torch.float32)
    samples = torch.randn(8000)
    with torch.no_grad():
        assert torch.equal(heard.features(samples), oracle(samples[None]).last_hidden_state[0])


def test_f5_a_wav2vec2_under_the_name_of_wavlm_is_refused(bridged: Path) -> None:
    """Defect F5: without the position bias it is another network."""
    weights = {n: w for n, w in pickled(bridged).items() if "rel_" not in n}
    torch.save(weights, bridged / "wavlm-base-plus/pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin holds no rel_attn_embed: .* Wav2"
    ):
        load(bridged)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_that_needs_code_is_refused_and_not_executed(bridged: Path) -> None:
    path, sprung = bridged / "wavlm-base-plus/pytorch_model.bin", bridged / "sprung"
    torch.save({**pickled(bridged), "trap": Trap(sprung)}, path)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin .* holds more than tensors"):
        load(bridged)
    assert not sprung.exists()


def test_a_wavlm_that_lacks_a_tensor_is_refused_before_anything_is_converted(bridged: Path) -> None:
    weights = pickled(bridged)
    del weights["encoder.layers.1.attention.gru_rel_pos_const"]
    torch.save(weights, bridged / "wavlm-base-plus/pytorch_model.bin")
    add_bridge(bridged)
    with pytest.raises(
        CheckpointError, match=r"1 missing: wavlm\.encoder\.layers\.1\.attention\.gru"
    ):
        load(bridged)


@pytest.mark.parametrize(
    ("settings", "normalized"),
    [({"do_normalize": True}, True), ({"do_normalize": False}, False), ({}, True), (None, False)],
)
def test_normalization_is_as_the_preprocessor_says(
    bridged: Path, settings: dict[str, Any] | None, normalized: bool
) -> None:
    path = bridged / "wavlm-base-plus/preprocessor_config.json"
    path.unlink()
    if settings is not None:
        path.write_text(json.dumps(settings))
    assert encoder(load(bridged)).config.do_normalize is normalized


def test_another_sampling_rate_or_kind_of_model_is_refused(bridged: Path) -> None:
    directory = bridged / "wavlm-base-plus"
    (directory / "preprocessor_config.json").write_text('{"sampling_rate": 8000}')
    with pytest.raises(CheckpointError, match="sampling_rate=8000; this program can only do 16000"):
        load(bridged)
    (directory / "config.json").write_text('{"model_type": "hubert"}')
    with pytest.raises(CheckpointError, match="holds a model of type 'hubert' and no WavLM"):
        load(bridged)


def test_without_wavlm_the_command_that_fetches_it_is_named(bridged: Path) -> None:
    shutil.rmtree(bridged / "wavlm-base-plus")
    with pytest.raises(
        CheckpointError, match="bring it with: omnispeech fetch wavlm-base-plus --models"
    ):
        choose_sources(bridged, audio_encoder="wavlm")


def test_f5_without_a_trained_bridge_it_refuses_and_says_why(models: Path) -> None:
    """Defect F5: the fork answers with layers that are random at every start."""
    with pytest.raises(CheckpointError) as refusal:
        choose_sources(models, audio_encoder="wavlm")
    for words in ("wavlm-bridge is missing", "until a bridge", "omnispeech train-bridge"):
        assert words in str(refusal.value)


def test_a_bridge_that_was_changed_or_not_finished_is_refused(bridged: Path) -> None:
    weights = bridged / "wavlm-bridge/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(
        CheckpointError, match="changed .*to train it again: .* train-bridge .*overwrite"
    ):
        choose_sources(bridged, audio_encoder="wavlm")
    (bridged / "omnispeech-manifest.json").unlink()
    with pytest.raises(CheckpointError, match="is not in .* train-bridge .*--overwrite"):
        choose_sources(bridged, audio_encoder="wavlm")


def test_a_bridge_of_another_checkpoint_is_refused(models: Path, tmp_path: Path) -> None:
    other = write_models(tmp_path / "other", seed=1)
    add_bridge(models, of=owners(other))
    with pytest.raises(
        CheckpointError, match="was trained for another checkpoint than .*OpenS2S; "
    ):
        load(models)


def test_a_bridge_of_another_wavlm_is_refused(bridged: Path) -> None:
    weights = pickled(bridged)
    weights["encoder.layer_norm.bias"][0] += 1e-3
    torch.save(weights, bridged / "wavlm-base-plus/pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match="was trained for another WavLM than .*wavlm-base-plus"
    ):
        load(bridged)


def test_a_bridge_of_other_widths_is_refused(models: Path) -> None:
    add_bridge(models, random_bridge(d_model=32))
    with pytest.raises(CheckpointError, match=r"dimension_projection.weight \[32, 64\] instead of"):
        load(models)


def test_a_bridge_is_written_and_read_exactly(models: Path) -> None:
    bridge = random_bridge(3)
    add_bridge(models, bridge)
    read = read_bridge(models / "wavlm-bridge")
    assert same(read.weights, dict(bridge.state_dict())) and read.owners == owners(models)
    assert json.loads((models / "wavlm-bridge/config.json").read_text())["d_model"] == 64


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": 2}, "has format 2; known: 1; train it again with: .* --models .* --overwrite"),
        ({"wavlm": None}, "has no wavlm"),
    ],
)
def test_a_bridge_of_another_format_is_refused(
    bridged: Path, change: dict[str, Any], complaint: str
) -> None:
    path = bridged / "wavlm-bridge/config.json"
    raw = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))
    with pytest.raises(CheckpointError, match=complaint):
        read_bridge(bridged / "wavlm-bridge")


def test_a_damaged_bridge_is_named(bridged: Path) -> None:
    (bridged / "wavlm-bridge/model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(CheckpointError, match=r"wavlm-bridge/model\.safetensors is damaged"):
        read_bridge(bridged / "wavlm-bridge")


def test_another_word_for_the_encoder_is_refused(models: Path) -> None:
    with pytest.raises(ConfigError, match="--audio-encoder 'hubert'; allowed: checkpoint, wavlm"):
        choose_sources(models, audio_encoder="hubert")


# a checkpoint whose own audio encoder is a WavLM


def wavlm_settings(models: Path) -> dict[str, Any]:
    settings = json.loads((models / "wavlm-base-plus/config.json").read_text())
    assert isinstance(settings, dict)
    return settings


@pytest.mark.parametrize("names", ["old", "new"])
def test_a_checkpoint_may_bring_body_and_bridge(models: Path, names: str) -> None:
    expected = load_wavlm(read_wavlm(models / "wavlm-base-plus"), 64, CPU, torch.float32)
    body = pickled(models)
    if names == "new":
        body = {NEW_NAMES.get(name, name): weight for name, weight in body.items()}
    make_wavlm_checkpoint(models, body=body, bridge=random_bridge(), **wavlm_settings(models))
    shutil.rmtree(models / "wavlm-base-plus")
    found = encoder(load(models, "checkpoint"))
    assert same(dict(found.wavlm.state_dict()), dict(expected.wavlm.state_dict()))
    assert torch.equal(found.temporal_adapter.bias, random_bridge().temporal_adapter.bias)
    assert own_wavlm(models / "OpenS2S") == WavLMPaths(body=None, bridge=None)


def test_a_body_that_is_not_in_the_checkpoint_comes_from_beside_it(models: Path) -> None:
    directory = make_wavlm_checkpoint(models, body=None, bridge=random_bridge())
    found = encoder(load(models, "checkpoint"))
    name = "encoder.layers.0.attention.rel_attn_embed.weight"
    assert torch.equal(found.wavlm.state_dict()[name], pickled(models)[name])
    alone = load_opens2s(directory, CPU, torch.float32)
    assert same(dict(encoder(alone).state_dict()), dict(found.state_dict()))


def test_a_bridge_that_is_not_in_the_checkpoint_must_have_been_trained(models: Path) -> None:
    make_wavlm_checkpoint(models, body=None, bridge=None, encoder_layers=2)
    with pytest.raises(CheckpointError, match="wavlm-bridge is missing: .* train-bridge"):
        choose_sources(models)
    add_bridge(models)
    assert not any(tensor.is_meta for tensor in encoder(load(models)).state_dict().values())


def test_sound_to_calibrate_with_needs_the_published_encoder(models: Path) -> None:
    directory = make_wavlm_checkpoint(models, body=None, bridge=random_bridge())
    with pytest.raises(
        ConfigError, match="hears by a WavLM, .* calibrate on text with --calib-text"
    ):
        Ears(directory, CPU, torch.float32)


def test_half_a_bridge_in_a_checkpoint_is_refused(models: Path) -> None:
    bridge = random_bridge()
    del bridge.temporal_adapter
    make_wavlm_checkpoint(models, body=None, bridge=bridge)
    with pytest.raises(
        CheckpointError, match="2 missing: temporal_adapter.bias, temporal_adapter.w"
    ):
        load(models)
