"""Where settings come from: the command line, else the environment, else the file of `--config`."""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from omnispeech.config import (
    AccessConfig,
    DecoderConfig,
    EngineConfig,
    HubConfig,
    PlaceConfig,
    ScaleConfig,
    ServerConfig,
    StartConfig,
    TalkConfig,
    check_url,
)
from omnispeech.errors import ConfigError

PREFIX = "OMNISPEECH_"
OF_OTHERS = {"SERVER", "VENV", "API_KEY"}  # read by `omnispeech say` and by environment.sh

CONFIGS = (PlaceConfig, EngineConfig, DecoderConfig, ServerConfig, TalkConfig, AccessConfig)
Config = TypeVar(
    "Config",
    PlaceConfig,
    EngineConfig,
    DecoderConfig,
    ServerConfig,
    TalkConfig,
    AccessConfig,
    ScaleConfig,
    StartConfig,
    HubConfig,
)


def setting_names() -> set[str]:
    configs = (*CONFIGS, ScaleConfig, StartConfig, HubConfig)
    return {f.name for config in configs for f in fields(config)}


def unknown_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Misspelt ones, most likely; they have no effect."""
    known = {PREFIX + name for name in {n.upper() for n in setting_names()} | OF_OTHERS}
    return sorted(name for name in environ if name.startswith(PREFIX) and name not in known)


def read_config_file(path: Path) -> dict[str, Any]:
    """The flat TOML file of `--config`; a key that is no setting is refused by name."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise ConfigError(f"{path} does not exist; --config takes a TOML file") from exc
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path} is not UTF-8 text: {exc}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{path} is not valid TOML: {exc}") from exc
    check_names(values, str(path))
    return values


def read_hub(flags: Mapping[str, Any], file: Path | None) -> HubConfig:
    """flags, file: as for all settings.

    HF_ENDPOINT is checked here: huggingface_hub fails at its import over some that are wrong.
    """
    check_url("HF_ENDPOINT", os.environ.get("HF_ENDPOINT", ""))
    return build_config(HubConfig, flags, read_config_file(file) if file else {})


def read_start(flags: Mapping[str, Any], file: Path | None) -> StartConfig:
    """flags, file: as for all settings."""
    return build_config(StartConfig, flags, read_config_file(file) if file else {})


def check_names(values: Mapping[str, Any], place: str) -> None:
    known = setting_names()
    if unknown := sorted(values.keys() - known):
        raise ConfigError(f"{place}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")


def build_config(
    config: type[Config],
    flags: Mapping[str, Any],
    file: Mapping[str, Any],
    environ: Mapping[str, str] = os.environ,
) -> Config:
    """Flags that are None and variables that are empty were not given."""
    values: dict[str, Any] = {}
    for f in fields(config):
        variable = PREFIX + f.name.upper()
        if flags.get(f.name) is not None:
            values[f.name] = flags[f.name]
        elif environ.get(variable):
            values[f.name] = parse_value(f.type, environ[variable], variable)
        elif f.name in file:
            values[f.name] = checked_type(f.type, file[f.name], f.name)
    return config(**values)


TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def parse_value(kind: Any, text: str, name: str) -> Any:
    """Text of the environment or the command line -> a value of the field's type."""
    if get_origin(kind) is Literal:
        return checked_type(kind, text, name)
    if kind is bool:
        if text.lower() not in TRUE + FALSE:
            raise ConfigError(f"{name}={text!r}; allowed: {', '.join(TRUE + FALSE)}")
        return text.lower() in TRUE
    try:
        return kind(text)
    except ValueError as exc:
        raise ConfigError(f"{name}={text!r} is not {_noun(kind)}") from exc


def checked_type(kind: Any, value: Any, name: str) -> Any:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{name}={value!r}; allowed: {', '.join(get_args(kind))}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name}={value!r} is not {_noun(kind)}")
    return value


def _noun(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
