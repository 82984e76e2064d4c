import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnispeech.checkpoint import pickles
from omnispeech.checkpoint.decoder import convert_weights, fold_weight_norm, load_decoder
from omnispeech.checkpoint.decoder_config import read_config
from omnispeech.errors import CheckpointError
from omnispeech.models.flow import FlowConfig
from omnispeech.models.hift import HiFTConfig

GOLDEN = Path(__file__).parent / "golden" / "decoder"
PUBLISHED = ("config.yaml", "flow.pt", "hift.pt")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in PUBLISHED:
        shutil.copyfile(GOLDEN / name, tmp_path / name)
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def save_changed(path: Path, **changes: Any) -> None:
    """Writes the pickle again; a change to None takes the tensor out."""
    weights = torch.load(path, weights_only=True) | changes
    torch.save({name: value for name, value in weights.items() if value is not None}, path)


def test_published_files_load_in_float32_for_inference(directory: Path) -> None:
    decoder = load_decoder(directory)
    values = [*decoder.flow.state_dict().values(), *decoder.hift.state_dict().values()]
    assert {value.dtype for value in values} == {torch.float32}
    assert not decoder.flow.training and not decoder.hift.training
    assert decoder.sample_rate_hz == 22050


def test_pickles_are_converted_once_and_not_needed_again(directory: Path) -> None:
    first = load_decoder(directory)
    (directory / "flow.pt").unlink()
    (directory / "hift.pt").unlink()
    again = load_decoder(directory)
    for name, value in first.hift.state_dict().items():
        assert torch.equal(value, again.hift.state_dict()[name])


def test_second_load_opens_no_pickle(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_decoder(directory)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    load_decoder(directory)


def test_changed_pickle_is_converted_again(directory: Path) -> None:
    load_decoder(directory)
    save_changed(directory / "flow.pt", **{"encoder_proj.bias": torch.full((80,), 7.0)})
    assert load_decoder(directory).flow.encoder_proj.bias[0] == 7.0


def test_pickle_of_the_same_size_with_another_time_is_converted_again(directory: Path) -> None:
    load_decoder(directory)
    before = (directory / "hift.safetensors").stat().st_mtime_ns
    os.utime(directory / "hift.pt", ns=(1, 1))
    load_decoder(directory)
    assert (directory / "hift.safetensors").stat().st_mtime_ns > before


def test_directory_that_cannot_be_written_still_loads_and_says_so(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(pickles, "replace_file", refuse)
    load_decoder(directory)
    assert "flow.safetensors cannot be written (read-only file system)" in caplog.text
    assert sorted(path.name for path in directory.iterdir()) == list(PUBLISHED)


def test_load_without_conversion_leaves_the_directory_alone(directory: Path) -> None:
    load_decoder(directory, convert=False)
    assert sorted(path.name for path in directory.iterdir()) == list(PUBLISHED)


def test_damaged_conversion_is_an_error_that_names_it(directory: Path) -> None:
    load_decoder(directory)
    (directory / "flow.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(CheckpointError, match=r"flow\.safetensors is damaged .* delete it"):
        load_decoder(directory)


@pytest.mark.parametrize("name", PUBLISHED)
def test_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} does not exist"):
        load_decoder(directory)


def test_every_tensor_that_does_not_fit_is_listed_and_nothing_is_written(directory: Path) -> None:
    changes = {
        "encoder_proj.bias": None,
        "encoder_proj.weight": torch.zeros(80, 63),
        "encoder_proj.scale": torch.zeros(1),
    }
    save_changed(directory / "flow.pt", **changes)
    with pytest.raises(CheckpointError) as refusal:
        load_decoder(directory)
    assert "1 missing: encoder_proj.bias" in str(refusal.value)
    assert "1 unexpected: encoder_proj.scale" in str(refusal.value)
    assert "encoder_proj.weight [80, 63] instead of [80, 64]" in str(refusal.value)
    assert not (directory / "flow.safetensors").exists()


def test_generator_prefix_of_later_vocoder_files_is_stripped(directory: Path) -> None:
    plain = load_decoder(directory, convert=False).hift.state_dict()
    weights = torch.load(directory / "hift.pt", weights_only=True)
    torch.save({f"generator.{n}": v for n, v in weights.items()}, directory / "hift.pt")
    prefixed = load_decoder(directory, convert=False).hift.state_dict()
    assert all(torch.equal(plain[name], prefixed[name]) for name in plain)


@pytest.mark.parametrize("make", [torch.nn.Conv1d, torch.nn.ConvTranspose1d])
def test_folded_weight_norm_equals_that_of_torch(make: type[torch.nn.Conv1d]) -> None:
    with torch.random.fork_rng():
        layer = torch.nn.utils.parametrizations.weight_norm(make(6, 4, 3), dim=0)
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    torch.testing.assert_close(fold_weight_norm(2 * g, v), 2 * layer.weight)


def test_conversion_keeps_no_view_and_no_half_precision() -> None:
    base = torch.ones(4, 4, dtype=torch.float16)
    plain = convert_weights({"a": base, "b": base.T})
    assert plain["a"].dtype == torch.float32 and plain["b"].is_contiguous()
    assert plain["a"].data_ptr() != plain["b"].data_ptr()


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickle_that_needs_code_is_refused_and_not_executed(directory: Path) -> None:
    sprung = directory / "sprung"
    save_changed(directory / "hift.pt", trap=Trap(sprung))
    with pytest.raises(CheckpointError, match=r"hift\.pt .* holds more than tensors"):
        load_decoder(directory)
    assert not sprung.exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04 cut"])
def test_pickle_that_is_damaged_is_refused(directory: Path, content: bytes) -> None:
    (directory / "flow.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"flow\.pt is damaged"):
        load_decoder(directory)


@pytest.mark.parametrize("value", [[1, 2], {"encoder": {"weight": torch.zeros(1)}}])
def test_pickle_without_named_tensors_is_refused(directory: Path, value: Any) -> None:
    torch.save(value, directory / "flow.pt")
    with pytest.raises(CheckpointError, match=r"flow\.pt"):
        load_decoder(directory)


def test_tag_in_the_config_is_never_called(directory: Path) -> None:
    sprung = directory / "sprung"
    tags = [
        f"trap1: !apply:pathlib.Path.touch [!new:pathlib.Path ['{sprung}']]",
        f"trap2: !apply:os.mkdir ['{sprung}']",
        f"trap3: !!python/object/apply:os.mkdir ['{sprung}']",
        "trap4: !new:no.such.module.Thing {a: 1}",
        "trap5: !name:os.abort",
        "trap6: !include:/etc/passwd",
    ]
    edit(directory / "config.yaml", "# fixed params", "\n".join(tags))
    read_config(directory / "config.yaml")
    assert not sprung.exists()


def test_reading_the_config_imports_nothing_it_names() -> None:
    code = (
        "import sys; from pathlib import Path;"
        "from omnispeech.checkpoint.decoder_config import read_config;"
        "before = set(sys.modules);"
        f"read_config(Path({str(GOLDEN / 'config.yaml')!r}));"
        "assert not any('cosyvoice' in m or 'omegaconf' in m for m in sys.modules);"
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_dimensions_come_from_the_file() -> None:
    flow, hift = read_config(GOLDEN / "config.yaml")
    assert (flow.vocab_size, flow.encoder.block_size, flow.estimator.channels) == (
        512,
        10,
        (16, 16),
    )
    assert (flow.schedule, flow.guidance, flow.input_frame_rate) == ("cosine", 0.7, 12.5)
    assert (hift.base_channels, hift.f0_channels, hift.sampling_rate) == (32, 24, 22050)


def test_defaults_are_the_published_dimensions(directory: Path) -> None:
    changes = {
        "input_size: 48": "input_size: 512", "vocab_size: 512": "vocab_size: 16384",
        "output_size: 64": "output_size: 512", "attention_heads: 4": "attention_heads: 8",
        "linear_units: 96": "linear_units: 2048", "num_blocks: 2\n": "num_blocks: 6\n",
        "channels: [16, 16]": "channels: [256, 256]", "head_dim: 8": "head_dim: 64",
        "n_blocks: 2": "n_blocks: 4", "num_mid_blocks: 2": "num_mid_blocks: 12",
        "num_heads: 4": "num_heads: 8", "base_channels: 32": "base_channels: 512",
        "cond_channels: 24": "cond_channels: 512",
    }  # fmt: skip
    for old, new in changes.items():
        edit(directory / "config.yaml", old, new)
    assert read_config(directory / "config.yaml") == (FlowConfig(), HiFTConfig())


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("BlockConformerEncoder", "ConformerEncoder", "known: BlockConformerEncoder"),
        ("input_layer: 'linear'\n        pos_enc_layer_type: 'rel_pos_espnet'\n        "
         "selfattention_layer_type: 'block", "input_layer: 'conv2d'\n        pos_enc_layer_type: "
         "'rel_pos_espnet'\n        selfattention_layer_type: 'block", "'conv2d'; known: linear"),
        ("act_fn: 'gelu'", "act_fn: 'snake'", "act_fn is 'snake'; known: gelu"),
        ("solver: 'euler'", "solver: 'heun'", "solver is 'heun'; known: euler"),
        ("t_scheduler: 'cosine'", "t_scheduler: 'wave'", "'wave'; known: cosine, linear"),
        ("block_size: 10", "block_size: ten", "block_size is 'ten' and not a whole number"),
        ("block_size: 10", "", "flow.encoder.block_size is missing"),
        ("in_channels: 320", "in_channels: 240", "in_channels is 240; known: 320"),
        ("channels: [16, 16]", "channels: [12]", "allowed: multiples of 8"),
        ("attention_heads: 4", "attention_heads: 7", "a multiple of 7 heads"),
        ("upsample_rates: [8, 8]", "upsample_rates: [8]", "one entry for each of upsample_rates"),
        ("!ref <sample_rate>", "!ref <sample_rat>", "!ref <sample_rat> names nothing"),
        ("hift: !new:cosyvoice.hifigan.generator.HiFTGenerator", "hift:", "'plain mapping'"),
    ],
)  # fmt: skip
def test_config_we_cannot_build_is_refused_with_its_key(
    directory: Path, old: str, new: str, complaint: str
) -> None:
    edit(directory / "config.yaml", old, new)
    with pytest.raises(CheckpointError) as refusal:
        read_config(directory / "config.yaml")
    assert complaint in str(refusal.value)


@pytest.mark.parametrize(
    ("reference", "more"),
    [
        ("<rate>", "rate: 16000"),
        ("<rate>", "rate: !ref <other>\nother: 16000"),
        ("<audio[rate]>", "audio: {rate: 16000}"),
    ],
)
def test_references_are_followed_through_the_file(
    directory: Path, reference: str, more: str
) -> None:
    edit(directory / "config.yaml", "!ref <sample_rate>", f"!ref {reference}")
    edit(directory / "config.yaml", "# fixed params", more)
    assert read_config(directory / "config.yaml")[1].sampling_rate == 16000


def test_reference_to_itself_is_refused(directory: Path) -> None:
    edit(directory / "config.yaml", "sample_rate: 22050", "sample_rate: !ref <sample_rate>")
    with pytest.raises(CheckpointError, match="refers to itself"):
        read_config(directory / "config.yaml")


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "flow: 3\nhift: 4", ""])
def test_file_that_describes_no_decoder_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.yaml|flow"):
        read_config(tmp_path / "config.yaml")


def test_conversion_is_read_from_whole_files_only(directory: Path) -> None:
    load_decoder(directory)
    assert not list(directory.glob(".*.partial"))
    weights = load_file(directory / "hift.safetensors")
    assert "conv_pre.weight" in weights and "conv_pre.weight_g" not in weights


def test_whoever_may_read_the_pickle_may_read_its_conversion(directory: Path) -> None:
    (directory / "flow.pt").chmod(0o644)
    load_decoder(directory)
    assert (directory / "flow.safetensors").stat().st_mode & 0o777 == 0o644


def test_safetensors_made_elsewhere_load_without_a_pickle(directory: Path) -> None:
    weights = convert_weights(torch.load(directory / "flow.pt", weights_only=True))
    save_file(weights, directory / "flow.safetensors")
    (directory / "flow.pt").unlink()
    assert load_decoder(directory).flow.config.vocab_size == 512
