"""Recipes by name: their composition by Hydra, and the check of what a command line changes in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, cast, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain.config.blocks import RunConfig
from pretrain.config.strict import ConfigError, nearest, nested_class, plain_mapping, variants

ROOT = Path(__file__).resolve().parents[2]
CONF_DIR = ROOT / "conf"


def recipe_names() -> list[str]:
    """Every recipe that can be named on the command line, aliases included."""
    return sorted(path.stem for path in (CONF_DIR / "recipe").glob("*.yaml"))


def recipe_method_block(recipe: str) -> dict[str, Any]:
    """The `method` block of `compose_recipe(recipe)`, read without Hydra, which an `Upstream` does without.

    Recipes inherit by naming other recipes under `defaults`; groups that they choose there do not reach the method.
    """
    return plain_mapping(_inherited(recipe).get("method", OmegaConf.create({})), resolve=True)


def _inherited(recipe: str) -> DictConfig:
    own = cast(DictConfig, OmegaConf.load(CONF_DIR / "recipe" / f"{recipe}.yaml"))
    parents = [name for name in own.get("defaults", []) if isinstance(name, str) and name in recipe_names()]
    return cast(DictConfig, OmegaConf.merge(*(_inherited(parent) for parent in parents), own))


def compose_recipe(recipe: str, overrides: list[str] | None = None) -> dict[str, Any]:
    """The configuration of one recipe as plain data, as `pretrain/train.py recipe=<recipe>` would see it.

    Raises ConfigError, with the nearest names, for an unknown recipe or an override of an unknown option.
    """
    if recipe not in recipe_names():
        raise ConfigError(f"recipe: unknown recipe '{recipe}'; {nearest(recipe, recipe_names())}")
    return _compose(recipe, check_overrides([f"recipe={recipe}", *overrides])[1:] if overrides else [])


def _compose(recipe: str, overrides: list[str]) -> dict[str, Any]:
    return deepcopy(_composed(CONF_DIR, recipe, tuple(overrides)))


@cache
def _composed(conf_dir: Path, recipe: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """The composition, kept for each recipe and list of overrides, since Hydra takes a quarter of a second for one."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with hydra_errors(), initialize_config_dir(str(conf_dir), version_base="1.3"):
        config = compose("config", [f"recipe={recipe}", *overrides], return_hydra_config=True)
        values = plain_mapping(config)
        values.pop("hydra")
        return {**plain_mapping(OmegaConf.create(values), resolve=True), "recipe": recipe}


@contextmanager
def hydra_errors() -> Iterator[None]:
    """Hydra's and OmegaConf's own errors about a composition as ConfigErrors of one sentence."""
    from hydra.errors import HydraException

    try:
        yield
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ConfigError(f"{key}{str(error).splitlines()[0]}; correct it on the command line or in conf/") from None
    except HydraException as error:
        reasons = [str(reason).splitlines()[0].rstrip(".") for reason in (error, error.__cause__) if reason is not None]
        raise ConfigError(f"{': '.join(reasons)}; correct it on the command line or in conf/") from None


def check_overrides(arguments: list[str]) -> list[str]:
    """A run's `key=value` arguments as Hydra takes them; other arguments stay as they are.

    Options are those in YAML and the fields of the run's dataclasses, the method's and the schedule's included. Hydra
    wants ++ before an option that stands in no YAML, which is added here: users need not know which have a default in
    a dataclass. Raises ConfigError, with the nearest names, where the recipe, another file of a group or an option does
    not exist; Hydra's own answer to a mistyped option is to prefix it with +, after which it would be taken. It raises
    ConfigError too for an argument that Hydra's grammar does not read.
    """
    _check_grammar(arguments)
    pairs = dict(argument.split("=", 1) for argument in arguments if _is_override(argument))
    if "recipe" not in pairs:
        raise ConfigError(f"recipe: missing; say recipe=<name>; known: {', '.join(recipe_names())}")
    recipe = pairs["recipe"]
    if recipe not in recipe_names():
        raise ConfigError(f"recipe: unknown recipe '{recipe}'; {nearest(recipe, recipe_names())}")
    in_yaml = _flat_keys(_compose(recipe, []))
    groups = {path.name for path in CONF_DIR.iterdir() if path.is_dir()}
    if not any(argument.startswith(("--config-dir", "-cd")) for argument in arguments):  # has groups of its own
        for group in groups & pairs.keys():
            _check_choice(group, pairs[group])
    return [
        _as_hydra_takes(argument, pairs, in_yaml, groups) if _is_override(argument) else argument
        for argument in arguments
    ]


def _check_grammar(arguments: list[str]) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for argument in filter(_is_override, arguments):
        try:
            parser.parse_override(argument)
        except HydraException as error:
            name, value = argument.split("=", 1)
            raise ConfigError(
                f"{name}: Hydra cannot read the value {value} ({str(error).splitlines()[0]}); put it between quotes "
                f"that the shell leaves: \"{name}='{value}'\""
            ) from None


def _check_choice(group: str, value: str) -> None:
    known = sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))
    if value.strip("'\"") not in known and not set(value) & set("[],"):
        raise ConfigError(f"{group}: there is no conf/{group}/{value}.yaml; {nearest(value, known)}")


def _is_override(argument: str) -> bool:
    return "=" in argument and argument[0] not in "-~"


def _as_hydra_takes(argument: str, pairs: dict[str, str], in_yaml: set[str], groups: set[str]) -> str:
    name, value = argument.lstrip("+").split("=", 1)
    if name in groups or name.startswith("hydra."):
        return argument
    if name in in_yaml:
        # A block may get fields that stand in no YAML, those of another kind; its keys are checked when it is typed.
        return f"++{name}={value}" if value.startswith("{") else f"{name}={value}"
    if not name.startswith("deepspeed."):
        known = in_yaml | _typed_keys(pairs["recipe"], pairs.get("method.name"), pairs.get("schedule.name"))
        if name not in known:
            raise ConfigError(f"{name}: no such option; {nearest(name, sorted(known))}")
    return f"++{name}={value}"


def _typed_keys(recipe: str, method_name: str | None, schedule_name: str | None) -> set[str]:
    """The fields of a run's dataclasses by dotted name; the names of method and schedule win over the recipe's."""
    # Late, since what names and types the blocks builds on this package.
    from pretrain.registry import load_method
    from pretrain.training.schedule import schedule_class

    values = _compose(recipe, [])
    method_class = load_method(method_name or values["method"]["name"]).Method.Config
    schedule = schedule_class(schedule_name or values["schedule"]["name"])
    return _fields(RunConfig, "") | _fields(method_class, "method.") | _fields(schedule, "schedule.")


def _fields(cls: type, prefix: str) -> set[str]:
    """The fields of `cls`, or of all its variants, and of the dataclasses in them."""
    return set().union(*(_own_fields(one, prefix) for one in variants(cls).values()))


def _own_fields(cls: type, prefix: str) -> set[str]:
    keys = set()
    hints = get_type_hints(cls)
    for field in fields(cls):
        nested = nested_class(hints[field.name])
        keys |= {f"{prefix}{field.name}"} | (_fields(nested, f"{prefix}{field.name}.") if nested else set())
    return keys


def _flat_keys(values: dict[str, Any], prefix: str = "") -> set[str]:
    """The keys of nested mappings by dotted name; those of the mappings themselves are among them."""
    keys = set()
    for key, value in values.items():
        keys |= {f"{prefix}{key}"} | (_flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else set())
    return keys
