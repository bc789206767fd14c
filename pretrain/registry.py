"""Methods by name: folders under recipes/ and installed entry points, and the modules that belong to one."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

from pretrain.errors import UserError

RECIPES_DIR = Path(__file__).resolve().parent.parent / "recipes"
ENTRY_POINTS = "headwater.methods"


def method_names() -> list[str]:
    """Every method that can be named in `method.name`: folders under recipes/ and installed entry points."""
    folders = [p.name for p in RECIPES_DIR.iterdir() if (p / "__init__.py").is_file()] if RECIPES_DIR.is_dir() else []
    return sorted({*folders, *(e.name for e in importlib.metadata.entry_points(group=ENTRY_POINTS))})


def load_method(name: str) -> ModuleType:
    """Import the package of one method; it has the attributes `Method` and `Encoder`.

    Raises UserError, with the nearest names, for a name that is neither a folder under recipes/ nor an installed
    entry point of the group `headwater.methods`, and for a package that lacks one of the two attributes.
    """
    package = _package(name)
    for attribute in ("Method", "Encoder"):
        if not hasattr(package, attribute):
            raise UserError(f"{package.__file__}: names no {attribute}; import the method's class there as {attribute}")
    return package


def _package(name: str) -> ModuleType:
    if not isinstance(name, str):
        raise UserError(f"method.name: {name!r} is no name of a method; known: {', '.join(method_names())}")
    if re.fullmatch(r"[a-z][a-z0-9_]*", name) and (RECIPES_DIR / name / "__init__.py").is_file():
        return importlib.import_module(f"recipes.{name}")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
        return entry.load()
    near = get_close_matches(name, method_names(), n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(method_names())}"
    raise UserError(f"method.name: unknown method '{name}'; {hint}")


def load_interop(name: str) -> ModuleType | None:
    """The method's `interop` module (key tables of other projects), or None where the method has none."""
    return _part(name, "interop")


def load_reference_steps(name: str) -> ModuleType | None:
    """The method's `reference_steps` module, or None where it has none: other projects' training, for the benchmark."""
    return _part(name, "reference_steps")


def _part(name: str, part: str) -> ModuleType | None:
    module = f"{load_method(name).__name__}.{part}"
    return importlib.import_module(module) if importlib.util.find_spec(module) else None
