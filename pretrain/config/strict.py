"""Plain values to dataclasses: unknown keys, missing fields and wrong types are refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, is_dataclass
from difflib import get_close_matches
from functools import partial
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from pretrain.errors import UserError

T = TypeVar("T")


class ConfigError(UserError):
    """A configuration that cannot be run; the message names the field and the fix."""


def nearest(word: str, known: list[str]) -> str:
    """A hint for a mistyped name: the closest known ones, or all of them."""
    near = get_close_matches(word, known, n=3)
    return f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"


def plain_mapping(config: DictConfig, resolve: bool = False) -> dict[str, Any]:
    """`config` as plain data, its interpolations filled in where `resolve`; `to_container` types lists and None too."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=resolve))


def typed(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build dataclass `cls` from plain `values`, refusing unknown keys, missing fields and wrong types.

    `where` is the dotted path of the block, for messages. `${...}` in a value is text. Raises ConfigError.
    """
    return _from_omegaconf(OmegaConf.to_object, cls, values, where)


def typed_values(cls: type, values: dict[str, Any], where: str = "") -> dict[str, Any]:
    """`values` as plain data of the types that `cls` states, its defaults filled in; nothing is built.

    Raises ConfigError as `typed` does, but none of those that `cls` raises itself.
    """
    return _from_omegaconf(partial(OmegaConf.to_container, resolve=True, throw_on_missing=True), cls, values, where)


def _from_omegaconf(read: Callable[[Any], Any], cls: type, values: dict[str, Any], where: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: {values!r} is not a mapping of options to values; state {cls.__name__}'s fields")
    check_keys(cls, values, where)
    values = _literal(values)
    with _named_errors(values, where):
        return read(_merged(cls, values, where))


@contextmanager
def _named_errors(values: dict[str, Any], where: str) -> Iterator[None]:
    """OmegaConf's errors about the block `values` at `where` as ConfigErrors that name the field."""
    try:
        yield
    except MissingMandatoryValue as error:
        key = f"{where}.{error.full_key}" if where else error.full_key
        raise ConfigError(f"{key}: missing; state it in the recipe or on the command line") from None
    except ConfigKeyError as error:
        raise ConfigError(f"{where}: {error}") from None
    except OmegaConfBaseException as error:
        inner = str(getattr(error, "full_key", None) or "")
        key = ".".join(part for part in (where, inner) if part)
        problem, value = str(error).splitlines()[0], str(_value_at(values, inner))
        raise ConfigError(f"{key}: {problem}" if value in problem else f"{key}: {value}: {problem}") from None


def _merged(cls: type, values: dict[str, Any], where: str) -> DictConfig:
    """`values` in the structure of `cls`, in which every block that has variants is of the variant that it names."""
    cls, values = variant(cls, values, where)
    hints = get_type_hints(cls)
    for name, value in values.items():
        nested = nested_class(hints[name])
        if nested is not None and isinstance(value, dict):
            values = values | {name: _merged(nested, value, f"{where}.{name}" if where else name)}
    with _named_errors(values, where):
        return cast(DictConfig, OmegaConf.merge(OmegaConf.structured(cls), values))


def variants(cls: type) -> dict[str, type]:
    """The dataclasses that `cls` stands for, by kind; a dataclass without `VARIANTS` stands for itself alone."""
    return getattr(cls, "VARIANTS", None) or {"": cls}


def variant(cls: type, values: dict[str, Any], where: str) -> tuple[type, dict[str, Any]]:
    """The dataclass for a block of `values`, and the block for it.

    A dataclass with the class variable `VARIANTS` stands for several: the block's field `kind` names one of them. Null
    for a field that this one lacks counts as absent, so that a recipe can take another kind than the one it starts
    from. Raises ConfigError for an unknown kind. Any other dataclass stands for itself.
    """
    classes = variants(cls)
    if classes == {"": cls}:
        return cls, values
    key, kind = f"{where}.kind" if where else "kind", values.get("kind")
    if kind is None:
        raise ConfigError(f"{key}: missing; state one of {', '.join(classes)}")
    if kind not in classes:
        raise ConfigError(f"{key}: unknown kind '{kind}'; {nearest(str(kind), list(classes))}")
    own = {f.name for f in fields(classes[kind])}
    return classes[kind], {name: value for name, value in values.items() if value is not None or name in own}


def _value_at(values: Any, key: str) -> Any:
    """The value under a key as OmegaConf writes it, such as `a.b[0]`; the innermost one that there is."""
    for part in re.findall(r"[^.\[\]]+", key):
        try:
            values = values[int(part) if isinstance(values, list | tuple) else part]
        except (KeyError, IndexError, TypeError, ValueError):
            return values
    return values


def _literal(value: Any) -> Any:
    """`value` with every `${` escaped, so that OmegaConf gives the text back instead of resolving it."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: f"{match[1] * 2}\\${{", value)
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    return [_literal(item) for item in value] if isinstance(value, list | tuple) else value


def check_keys(cls: type, values: dict[str, Any], where: str) -> None:
    """Refuse keys that `cls`, or a dataclass nested in it, does not have; name the nearest ones.

    Refuse the empty string too, as `dir=$UNSET` gives it, where it is not the field's own default.
    """
    cls, values = variant(cls, values, where)
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in known:
            raise ConfigError(f"{path}: no such option; {nearest(str(key), list(known))}")
        if value == "" and known[key].default != "":
            raise ConfigError(f"{path}: empty; give a value, or leave the option out")
        nested = nested_class(hints[key])
        if nested is not None and isinstance(value, dict):
            check_keys(nested, value, path)
        elif nested is not None and value is not None and not isinstance(value, nested):
            raise ConfigError(f"{path}: {value!r} is no block of options; give them as {{option: value, ...}}")


def nested_class(hint: Any) -> type | None:
    """The dataclass that a type hint names, alone or with None; None for any other hint."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return next((part for part in parts if isinstance(part, type) and is_dataclass(part)), None)


def with_defaults(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Plain `values` of dataclass `cls`, with the defaults of those fields that they lack, nested blocks included.

    A field without a default stays absent, and values that `cls` does not know stay as they are: this completes what
    was written before a field existed, and refuses nothing.
    """
    if values.get("kind") in variants(cls):
        cls = variants(cls)[values["kind"]]
    completed, hints = dict(values), get_type_hints(cls)
    for f in fields(cls):
        nested = nested_class(hints[f.name])
        if f.name not in completed and f.default is not MISSING:
            completed[f.name] = f.default
        elif f.name not in completed and f.default_factory is not MISSING:
            completed[f.name] = f.default_factory()
        value = completed.get(f.name)
        if is_dataclass(value) and not isinstance(value, type):
            completed[f.name] = asdict(value)
        elif nested is not None and isinstance(value, dict):
            completed[f.name] = with_defaults(nested, value)
    return completed
