"""`--quant_config`: the JSON of the guides, under the names of the flags."""

import json
from collections.abc import Mapping
from typing import Any

from omnispeech.errors import ConfigError

# {key: (name of the flag, type of its value)}
COMMON: dict[str, tuple[str, type]] = {
    "bits": ("bits", int),
    "group_size": ("group_size", int),
    "modules_to_not_convert": ("modules", list),
}
AWQ = COMMON | {
    "w_bit": ("bits", int),
    "q_group_size": ("group_size", int),
    "zero_point": ("zero_point", bool),
    "version": ("layout", str),
}
GPTQ = COMMON | {
    "desc_act": ("desc_act", bool),
    "static_groups": ("static_groups", bool),
    "damp_percent": ("damping", float),
    "dataset": ("dataset", str),
    "sym": ("symmetric", bool),
    "true_sequential": ("sequential", bool),
}
ALWAYS = {"symmetric": "sym", "sequential": "true_sequential"}  # no other value is written


def read_quant_config(text: str, *, gptq: bool) -> dict[str, Any]:
    """Values under the names of the flags; null means the default.

    Raises ConfigError for what is no JSON object, and for keys and types that are not known.
    """
    try:
        raw = json.loads(text, parse_constant=_no_number)
    except ValueError as exc:
        raise ConfigError(f"--quant_config is not valid JSON: {exc}") from exc
    if not isinstance(raw, dict):
        raise ConfigError(f"--quant_config holds {type(raw).__name__}; allowed: one JSON object")
    known = GPTQ if gptq else AWQ
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in known:
            raise ConfigError(
                f"--quant_config: unknown key {key!r}; known: {', '.join(sorted(known))}"
            )
        name, kind = known[key]
        if value is not None:
            check_agreement(values, name, _checked(key, value, kind), "--quant_config")
    return _without_fixed(values)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def check_agreement(values: dict[str, Any], name: str, value: Any, where: str) -> None:
    """Adds `value`; raises ConfigError if the same thing was given otherwise before."""
    if values.get(name, value) != value:
        raise ConfigError(f"{name} is {values[name]!r} and, in {where}, {value!r}; give it once")
    values[name] = value


def _checked(key: str, value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    wrong_items = kind is list and isinstance(value, list) and not _texts(value)
    if type(value) is not kind or wrong_items:
        noun = "list of names" if kind is list else kind.__name__
        raise ConfigError(f"--quant_config: {key} is {value!r}; allowed: {noun}")
    return value


def _texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _without_fixed(values: Mapping[str, Any]) -> dict[str, Any]:
    for name, key in ALWAYS.items():
        if values.get(name) is False:
            raise ConfigError(
                f"--quant_config: {key} is false; servers read only files where it is true"
            )
    return {name: value for name, value in values.items() if name not in ALWAYS}
