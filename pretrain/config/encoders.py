"""Encoder configurations from files: typed strictly and bounded, so that a wrong one is an error and no traceback."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, TypeVar, get_type_hints

from pretrain.config.strict import ConfigError, nested_class, typed, typed_values, variant

T = TypeVar("T")

# Larger than any published width or vocabulary, and small enough to be refused before memory is asked for.
MAX_SIZE = 2**20
MAX_LAYERS = 1000
# Metadata of a dataclass field, `field(metadata=MAY_BE_ZERO)`: its integers may be 0, where sizes are at least 1.
MAY_BE_ZERO = {"minimum": 0}


def encoder_config(cls: type[T], values: dict[str, Any], where: str = "encoder") -> T:
    """Build the configuration dataclass `cls` of an encoder from the plain `values` of a config.json or a checkpoint.

    Raises ConfigError, naming the field under `where`, for an unknown or missing field, a wrong type, and a number that
    no encoder can have. Integers are from 1 to `MAX_SIZE`, or from 0 for fields with the metadata `MAY_BE_ZERO` and for
    `encoder_layers`, since an encoder may be cut to its hidden state 0. Numbers of layers are at most `MAX_LAYERS`, and
    lists have 1 to `MAX_LAYERS` entries. Other numbers are finite; probabilities of dropout are from 0 to below 1.
    `${...}` is text. Raises what `cls` raises for values that do not go together. Files of earlier versions are read
    where `upgraded` knows how.
    """
    plain = typed_values(cls, upgraded(cls, values), where)
    check_bounds(cls, plain, where)
    return typed(cls, plain, where)


def upgraded(cls: type, values: Any) -> Any:
    """`values` with the fields of today where a file of an earlier version has others.

    A dataclass whose fields have changed has a static method `upgraded(values)`, which maps the block of such a file
    and leaves one of today as it is; it is asked for `cls` and for the dataclasses nested in it.
    """
    if not isinstance(values, dict):
        return values
    hints = get_type_hints(cls)
    nested = {name: found for name in values if name in hints and (found := nested_class(hints[name])) is not None}
    values = {name: upgraded(nested[name], value) if name in nested else value for name, value in values.items()}
    return cls.upgraded(values) if hasattr(cls, "upgraded") else values


def typed_method(cls: type[T], values: dict[str, Any]) -> T:
    """Build the configuration dataclass `cls` of a method from its block; its `encoder` is bounded as above.

    Its own integers are at least 1, or 0 for fields with the metadata `MAY_BE_ZERO`. Raises ConfigError, and what `cls`
    raises for values that do not go together.
    """
    plain = typed_values(cls, values, "method")
    encoder = nested_class(get_type_hints(cls).get("encoder"))
    if encoder is not None:
        check_bounds(encoder, plain["encoder"], "method.encoder")
    _check_least(cls, {name: value for name, value in plain.items() if name != "encoder"}, "method")
    return typed(cls, plain, "method")


def _check_least(cls: type, values: dict[str, Any], where: str) -> None:
    cls, values = variant(cls, values, where)
    hints, known = get_type_hints(cls), {f.name: f for f in fields(cls)}
    for name, value in values.items():
        path, nested = f"{where}.{name}", nested_class(hints[name])
        if nested is not None and isinstance(value, dict):
            _check_least(nested, value, path)
            continue
        minimum = known[name].metadata.get("minimum", 1)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and not isinstance(number, bool) and number < minimum:
                raise ConfigError(f"{path}: {number} must be at least {minimum}")


def check_bounds(cls: type, values: dict[str, Any], where: str) -> None:
    """Raise ConfigError for the first number of the typed `values` that is out of `encoder_config`'s bounds."""
    cls, values = variant(cls, values, where)
    hints = get_type_hints(cls)
    for f in fields(cls):
        value, path, nested = values[f.name], f"{where}.{f.name}", nested_class(hints[f.name])
        if nested is not None and isinstance(value, dict):
            check_bounds(nested, value, path)
            continue
        minimum = 0 if f.name == "encoder_layers" else f.metadata.get("minimum", 1)
        _check_value(f.name, value, minimum, path)


def _check_value(name: str, value: Any, minimum: int, where: str) -> None:
    if isinstance(value, list):
        if not 1 <= len(value) <= MAX_LAYERS:
            raise ConfigError(f"{where}: {len(value)} entries; give 1 to {MAX_LAYERS}")
        for i, item in enumerate(value):
            _check_value(name, item, minimum, f"{where}[{i}]")
    elif isinstance(value, int) and not isinstance(value, bool):
        # Entries of a list are widths and kernels, whatever the list is called.
        maximum = MAX_LAYERS if name.endswith("layers") and not where.endswith("]") else MAX_SIZE
        if not minimum <= value <= maximum:
            raise ConfigError(f"{where}: {value} is out of range; give {minimum} to {maximum}")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(f"{where}: {value} is not a finite number")
        if ("dropout" in name or "layerdrop" in name) and not 0 <= value < 1:
            raise ConfigError(f"{where}: {value:g} is no probability of dropout; give 0 to below 1")
