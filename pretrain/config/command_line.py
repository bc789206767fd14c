"""Command lines of the tools: `key=value` arguments, typed as a dataclass, and the help that lists its fields."""

from __future__ import annotations

import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TypeVar, get_type_hints

from omegaconf import OmegaConf

from pretrain.config.strict import ConfigError, typed

T = TypeVar("T")


def parse_cli(cls: type[T], arguments: list[str], description: str | None = None) -> T:
    """Type a tool's `key=value` arguments (nested keys with dots) as dataclass `cls`.

    `--help` prints the fields and exits. Raises SystemExit with the message on a wrong argument.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print((description or "").strip(), _usage(cls), sep="\n\n")
        raise SystemExit(0)
    wrong = [argument for argument in arguments if "=" not in argument]
    if wrong:
        raise SystemExit(f"{wrong[0]}: arguments have the form key=value; --help lists the keys")
    try:
        return typed(cls, OmegaConf.to_container(OmegaConf.from_dotlist(arguments)))
    except ConfigError as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None


def _usage(cls: type, prefix: str = "") -> str:
    lines = []
    hints = get_type_hints(cls)
    for f in fields(cls):
        name = f"{prefix}{f.name}"
        if is_dataclass(hints[f.name]):
            lines.append(_usage(hints[f.name], f"{name}."))
            continue
        required = f.default is MISSING and f.default_factory is MISSING
        default = f.default if f.default_factory is MISSING else f.default_factory()
        shown = "required" if required else f"default {default}"
        lines.append(f"  {name:<28} {getattr(hints[f.name], '__name__', hints[f.name])!s:<12} {shown}")
    return "\n".join(lines)
