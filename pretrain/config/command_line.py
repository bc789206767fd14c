"""Command lines of the tools: `key=value` arguments typed as a dataclass, help that lists its fields, errors in one
form.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import TypeVar, get_type_hints

from omegaconf import OmegaConf

from pretrain.config.strict import ConfigError, plain_mapping, typed
from pretrain.errors import UserError

T = TypeVar("T")


def run_tool(main: Callable[[list[str]], None]) -> None:
    """Call `main` with the command line's arguments: the last line of every tool.

    A UserError ends the process with status 1 and `error: <message>` on standard error, without a traceback.
    """
    try:
        main(sys.argv[1:])
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def parse_cli(cls: type[T], arguments: list[str], description: str | None = None) -> T:
    """Type a tool's `key=value` arguments (nested keys with dots) as dataclass `cls`.

    `--help` prints the fields and exits. Raises ConfigError, naming the argument, for a wrong one.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print((description or "").strip(), _usage(cls), sep="\n\n")
        raise SystemExit(0)
    wrong = [argument for argument in arguments if "=" not in argument]
    if wrong:
        raise ConfigError(f"{wrong[0]}: arguments have the form key=value; --help lists the keys")
    values = OmegaConf.from_dotlist(arguments)
    for argument in arguments:
        if argument.endswith("=") and argument.count("=") == 1:
            OmegaConf.update(values, argument[:-1], "")  # which YAML reads as null
    return typed(cls, plain_mapping(values))


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
