"""Recipes by name: their composition by Hydra, and the check of what a command line changes in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pretrain.config.strict import ConfigError, nearest

ROOT = Path(__file__).resolve().parents[2]
CONF_DIR = ROOT / "conf"


def recipe_names() -> list[str]:
    """Every recipe that can be named on the command line, aliases included."""
    return sorted(path.stem for path in (CONF_DIR / "recipe").glob("*.yaml"))


def compose_recipe(recipe: str, overrides: list[str] | None = None) -> dict[str, Any]:
    """The configuration of one recipe as plain data, as `pretrain/train.py recipe=<recipe>` would see it."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    if recipe not in recipe_names():
        raise ConfigError(f"recipe: unknown recipe '{recipe}'; {nearest(recipe, recipe_names())}")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("config", [f"recipe={recipe}", *(overrides or [])], return_hydra_config=True)
    values = OmegaConf.to_container(config, resolve=False)
    values.pop("hydra")
    return {**OmegaConf.to_container(OmegaConf.create(values), resolve=True), "recipe": recipe}


def check_overrides(arguments: list[str]) -> None:
    """Refuse `key=value` arguments whose recipe or key does not exist, with the nearest names. Raises ConfigError.

    Hydra's own answer to a mistyped key is to prefix it with +, after which it would be taken and ignored.
    """
    pairs = [argument.split("=", 1) for argument in arguments if "=" in argument and argument[0] not in "-~"]
    recipe = next((value for key, value in pairs if key == "recipe"), None)
    if recipe is None:
        raise ConfigError(f"recipe: missing; say recipe=<name>; known: {', '.join(recipe_names())}")
    known = _flat_keys(compose_recipe(recipe))
    groups = {path.name for path in CONF_DIR.iterdir() if path.is_dir()}
    for key, _ in pairs:
        name = key.lstrip("+")
        if name not in known and name not in groups and not name.startswith(("hydra.", "deepspeed.")):
            raise ConfigError(f"{name}: no such option; {nearest(name, sorted(known))}")


def _flat_keys(values: dict[str, Any], prefix: str = "") -> set[str]:
    keys = set()
    for key, value in values.items():
        keys |= {f"{prefix}{key}"} | (_flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else set())
    return keys
