"""The generated tables of recipes against the files, the published list of names, and published sizes."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from pretrain.config import CONF_DIR, ROOT, ConfigError
from pretrain.planning.recipe_table import BEGIN, END, recipes_page, with_short_table

OUTDATED = "run `make table`"


def cells(page: str) -> dict[str, list[str]]:
    """Rows of recipes by name."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:3] == "| `"]
    return {row[0].strip("`"): row[1:] for row in rows}


def is_alias(path: Path) -> bool:
    """Whether a recipe only renames another: two lines."""
    return len(path.read_text(encoding="utf-8").splitlines()) == 2


@pytest.fixture(scope="module")
def table() -> dict[str, list[str]]:
    return cells((ROOT / "recipes" / "README.md").read_text(encoding="utf-8"))


def test_both_tables_are_current() -> None:
    assert (ROOT / "recipes" / "README.md").read_text(encoding="utf-8") == recipes_page(), OUTDATED
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == with_short_table(readme), OUTDATED


def test_every_recipe_has_one_row_and_every_link_leads_somewhere(table: dict[str, list[str]]) -> None:
    page = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| `(\w+)`", page, re.MULTILINE)
    assert sorted(names) == sorted(path.stem for path in (CONF_DIR / "recipe").iterdir())
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert len(links) > 2 * len(names)
    assert [link for link in links if not (ROOT / "recipes" / link).exists()] == []


def test_published_names_aliases_and_data(table: dict[str, list[str]], shared_dir: Path) -> None:
    with (shared_dir / "recipes.tsv").open(encoding="utf-8", newline="") as file:
        published = [row for row in csv.DictReader(file, delimiter="\t") if row["method"] == "HuBERT"]
    assert len(published) >= 4
    for row in published:
        about, _, data, method, *_ = table[row["recipe"]]
        assert (ROOT / "recipes" / method.partition("](")[2].rstrip(")")).is_file()
        if row["alias_of"]:
            assert row["alias_of"] in about
        else:
            hours = "960 hours" if "960" in row["published_facts"] else "60,000 hours"
            assert hours in data


def test_sizes_are_the_published_ones(table: dict[str, list[str]]) -> None:
    # Millions, as SUPERB counts Base and Large, and arXiv 2106.07447 (table I) X-Large.
    published = {"hubert_base": 94.68, "hubert_large_ll60k": 316.61, "hubert_xlarge_ll60k": 964}
    for name, millions in published.items():
        assert float(table[name][1].removesuffix(" M")) == pytest.approx(millions, rel=0.005)


def test_a_method_without_a_page_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pretrain.planning.recipe_table.RECIPES_DIR", tmp_path)
    with pytest.raises(ConfigError, match=r"apc/README\.md: is missing; write it, with the method's name"):
        with_short_table(f"{BEGIN}\n{END}")


def test_text_around_the_short_table_stays_and_missing_markers_are_named() -> None:
    written = with_short_table(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert written.startswith(f"before\n{BEGIN}\n| Method")
    assert written.endswith(f"|\n{END}\nafter\n")
    assert "old" not in written
    listed = re.findall(r"`(\w+)`", written)
    assert sorted(listed) == sorted(path.stem for path in (CONF_DIR / "recipe").iterdir() if not is_alias(path))
    links = re.findall(r"\]\(([^)]+)\)", written)
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []
    with pytest.raises(ConfigError, match=r"README\.md: the markers"):
        with_short_table("no markers")
