"""The tables of recipes in recipes/README.md and README.md, from what lies in conf/ and recipes/.

What a recipe is and where its values come from is read from the comment at the head of its YAML: the first clause,
and the sentence that begins with "Source:".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from pathlib import Path

import torch
import yaml

from pretrain.config import CONF_DIR, ConfigError, compose_recipe, recipe_method_block, recipe_names, typed_method
from pretrain.registry import RECIPES_DIR, load_method, method_names

BEGIN, END = "<!-- recipes: written by make table -->", "<!-- end of recipes -->"
# The method that shows best how a kind of objective is built here.
START_FROM = {
    "Masked prediction of labels": "hubert",
    "Reconstruction of features": "mockingjay",
    "Contrastive": "wav2vec2",
    "Teacher and student": "data2vec",
    "Two views of one sound": "byol_a",
}
PAGE = """# Recipes

Written by `make table`; change the comment at the head of `conf/recipe/<name>.yaml` instead.

Train one with `torchrun --nproc_per_node <ranks> pretrain/train.py recipe=<name>`. Parameters are those of the encoder,
which is what an export holds; the heads of pre-training come on top.

{table}

## Which recipe to start from

| Kind of method | Start from |
|---|---|
{starts}
"""


@dataclass(frozen=True)
class Recipe:
    """One file of conf/recipe/; `alias_of` is the recipe that it only renames, `parameters` the encoder's."""

    name: str
    alias_of: str | None
    method: str
    parameters: int
    about: str
    source: str
    data: str


def recipes() -> list[Recipe]:
    """Every recipe: published ones by method and name, each after its aliases."""
    found: dict[str, Recipe] = {}
    for name in recipe_names():
        chain = [name]  # an alias, the recipe that it renames, which may be an alias too, ...
        while original := _alias_of(CONF_DIR / "recipe" / f"{chain[-1]}.yaml"):
            chain.append(original)
        if chain[-1] not in found:
            found[chain[-1]] = read_recipe(chain[-1])
        found |= {one: replace(found[chain[-1]], name=one, alias_of=renamed) for one, renamed in pairwise(chain)}
    return sorted(
        found.values(), key=lambda recipe: (recipe.method, recipe.alias_of or recipe.name, recipe.alias_of is None)
    )


def read_recipe(name: str) -> Recipe:
    """Compose a recipe that is no alias, count its encoder's parameters without memory for them, read its comment."""
    path = CONF_DIR / "recipe" / f"{name}.yaml"
    comment, config = _head_comment(path), compose_recipe(name)
    method_class = load_method(config["method"]["name"]).Method
    with torch.device("meta"):
        encoder = method_class(typed_method(method_class.Config, config["method"])).encoder
    return Recipe(
        name=name,
        alias_of=None,
        method=config["method"]["name"],
        parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        about=_about(comment),
        source=_source(comment),
        data=_about(_head_comment(CONF_DIR / "data" / f"{config['data']['name']}.yaml")),
    )


def _alias_of(path: Path) -> str | None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    is_alias = list(content) == ["defaults"] and len(content["defaults"]) == 1
    return content["defaults"][0] if is_alias else None


def _head_comment(path: Path) -> str:
    """The comment lines at the head of a YAML file, as one line."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return " ".join(line.lstrip("# ") for line in lines if "@package" not in line)


def _about(comment: str) -> str:
    """The first clause."""
    return re.split(r"[.:] ", f"{comment} ")[0].strip()


def _source(comment: str) -> str:
    """The sentence after "Source:", or an empty string."""
    return comment.partition("Source: ")[2].split(". ")[0].rstrip(".")


def recipes_page() -> str:
    """The content of recipes/README.md."""
    header = ["Recipe", "What it is", "Encoder", "Data", "Method", "File", "Values from"]
    starts = "\n".join(f"| {kind} | {_start(method)} |" for kind, method in START_FROM.items())
    return PAGE.format(table=_table(header, [_row(recipe) for recipe in recipes()]), starts=starts)


def with_short_table(readme: str) -> str:
    """`readme` with the short table between its markers. Raises ConfigError where these are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"README.md: the markers {BEGIN} and {END} are missing; put them around the table of recipes")
    return f"{before}{begin}\n{_table(['Method', 'Recipes'], _methods())}\n{end}{after}"


def _methods() -> list[list[str]]:
    """One row per method: its page, and its recipes without those that only rename one."""
    names: dict[str, list[str]] = {}
    for name in recipe_names():
        if _alias_of(CONF_DIR / "recipe" / f"{name}.yaml") is None:
            names.setdefault(recipe_method_block(name)["name"], []).append(f"`{name}`")
    rows = []
    for method in sorted(names):
        readme = RECIPES_DIR / method / "README.md"
        if not readme.is_file():
            raise ConfigError(f"{readme}: is missing; write it, with the method's name for the table in its first line")
        title = readme.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        rows.append([f"[{title}](recipes/{method}/README.md)", ", ".join(names[method])])
    return rows


def _row(recipe: Recipe) -> list[str]:
    """Cells in the order of the long table's header."""
    files = [f"[{recipe.method}]({recipe.method}/README.md)", f"[YAML](../conf/recipe/{recipe.name}.yaml)"]
    if recipe.alias_of:
        return [f"`{recipe.name}`", f"`{recipe.alias_of}` by another name", "", "", *files, ""]
    size = f"{recipe.parameters / 1e6:.2f} M"
    return [f"`{recipe.name}`", recipe.about, size, recipe.data, *files, recipe.source or "this project"]


def _start(method: str) -> str:
    if method in method_names():
        return f"[{method}]({method}/README.md)"
    return f"{method}; until it is here, [hubert](hubert/README.md)"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
