"""Settings: flags before environment before file before default, and each checks itself."""

from pathlib import Path
from typing import Any

import pytest

from omnispeech.config import DecoderConfig, EngineConfig, PlaceConfig, ServerConfig
from omnispeech.config_reader import build_config, read_config_file, unknown_variables
from omnispeech.errors import ConfigError


def test_flag_beats_environment_beats_file_beats_default() -> None:
    environ = {"OMNISPEECH_PORT": "2", "OMNISPEECH_HOST": "::1"}
    file = {"port": 3, "host": "a", "model_name": "b"}
    config = build_config(ServerConfig, {"port": 1, "host": None}, file, environ)
    assert (config.port, config.host, config.model_name) == (1, "::1", "b")
    assert config.max_body_mb == ServerConfig().max_body_mb


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (EngineConfig, {"max_conversations": 0}, "max_conversations=0; allowed: 1 to"),
        (EngineConfig, {"kv_tokens": 100}, "kv_tokens=100 is less than context_length"),
        (DecoderConfig, {"overlap_frames": 5}, "overlap_frames=5; allowed: 19 to"),
        (ServerConfig, {"port": 70000}, "port=70000; allowed: 0 to 65535"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(
    config: Any, values: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**values)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"OMNISPEECH_PORT": "http"}, "OMNISPEECH_PORT='http' is not a whole number"),
        ({"OMNISPEECH_MAX_AUDIO_S": "long"}, "is not a number"),
    ],
)
def test_environment_that_is_no_number_is_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(ServerConfig, {}, {}, environ)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("0", False),
        ("False", False),
        ("Yes", True),
        ("on", True),
        ("no", False),
        ("off", False),
    ],
)
def test_environment_says_true_or_false(text: str, value: bool) -> None:
    environ = {"OMNISPEECH_COMPATIBLE": text}
    assert build_config(EngineConfig, {}, {}, environ).compatible is value


def test_choices_are_checked_wherever_they_come_from() -> None:
    with pytest.raises(ConfigError, match="streaming='fast'; allowed: corrected, compatible"):
        build_config(DecoderConfig, {}, {"streaming": "fast"}, {})
    with pytest.raises(ConfigError, match="OMNISPEECH_COMPATIBLE='maybe'"):
        build_config(EngineConfig, {}, {}, {"OMNISPEECH_COMPATIBLE": "maybe"})


def test_config_file_with_a_typo_names_the_key(tmp_path: Path) -> None:
    file = tmp_path / "omnispeech.toml"
    file.write_text("max_convresations = 4\n")
    with pytest.raises(ConfigError, match="unknown key 'max_convresations'"):
        read_config_file(file)


def test_config_file_with_a_wrong_type_names_the_key(tmp_path: Path) -> None:
    file = tmp_path / "omnispeech.toml"
    file.write_text('port = "8000"\nmax_audio_s = 30\n')
    values = read_config_file(file)
    with pytest.raises(ConfigError, match="port='8000' is not a whole number"):
        build_config(ServerConfig, {}, values, {})
    assert build_config(ServerConfig, {"port": 1}, values, {}).max_audio_s == 30.0


@pytest.mark.parametrize("text", ["port = ", None])
def test_config_file_that_is_missing_or_no_toml_is_refused(
    tmp_path: Path, text: str | None
) -> None:
    file = tmp_path / "omnispeech.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"omnispeech\.toml"):
        read_config_file(file)


@pytest.mark.parametrize("kind", ["folder", "bytes"])
def test_config_file_that_cannot_be_read_is_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "omnispeech.toml"
    if kind == "folder":
        file.mkdir()
    else:
        file.write_bytes(b'host = "\xff"')
    with pytest.raises(ConfigError, match=r"omnispeech\.toml .*(cannot be read|not UTF-8)"):
        read_config_file(file)


def test_models_device_and_dtype_follow_the_same_order_as_all_settings() -> None:
    file = {"models": "/file", "device": "cpu"}
    environ = {"OMNISPEECH_DEVICE": "cuda", "OMNISPEECH_DTYPE": "fp16"}
    place = build_config(PlaceConfig, {"dtype": "fp32", "device": None}, file, environ)
    assert (place.models, place.device, place.dtype) == ("/file", "cuda", "fp32")
    assert build_config(PlaceConfig, {}, {}, {}).models == "/models"


def test_config_file_may_name_models_device_and_dtype(tmp_path: Path) -> None:
    file = tmp_path / "omnispeech.toml"
    file.write_text('models = "/m"\ndevice = "cpu"\ndtype = "fp32"\n')
    assert read_config_file(file) == {"models": "/m", "device": "cpu", "dtype": "fp32"}


def test_which_llm_is_loaded_may_come_from_the_environment_and_is_one_of_those_known() -> None:
    place = build_config(PlaceConfig, {}, {}, {"OMNISPEECH_LLM": "awq", "OMNISPEECH_KERNEL": "x"})
    assert (place.llm, place.speech_lm, place.kernel) == ("awq", "bf16", "x")
    assert build_config(PlaceConfig, {}, {}, {}).llm == "auto"
    with pytest.raises(ConfigError, match="OMNISPEECH_LLM='int4'; allowed: auto, bf16, awq"):
        build_config(PlaceConfig, {}, {}, {"OMNISPEECH_LLM": "int4"})


def test_an_empty_environment_variable_counts_as_not_set() -> None:
    assert build_config(PlaceConfig, {}, {}, {"OMNISPEECH_MODELS": ""}).models == "/models"


def test_unknown_variables_are_found_by_their_prefix() -> None:
    known = dict.fromkeys(("PORT", "MODELS", "DEVICE", "DTYPE", "SERVER", "VENV"), "1")
    environ = {f"OMNISPEECH_{name}": value for name, value in known.items()}
    assert unknown_variables(environ | {"OMNISPEECH_PROT": "1", "HOME": "/"}) == ["OMNISPEECH_PROT"]


def test_only_this_machine_is_served_unless_the_setting_says_otherwise() -> None:
    """Defect C5: the original's fork listens on all addresses."""
    assert build_config(ServerConfig, {}, {}, {}).host == "127.0.0.1"
    assert build_config(ServerConfig, {"host": "0.0.0.0"}, {}, {}).host == "0.0.0.0"


def test_blocks_must_be_multiples_of_what_the_flow_encoder_takes() -> None:
    DecoderConfig(context_tokens=24, first_block=8, max_block=80).check_step(8)
    with pytest.raises(ConfigError, match="context_tokens=60; allowed .* multiples of 8"):
        DecoderConfig().check_step(8)
