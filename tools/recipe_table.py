"""Rewrite the tables of recipes in recipes/README.md and README.md: python tools/recipe_table.py"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.config import ROOT
from pretrain.planning.recipe_table import recipes_page, with_short_table


def main() -> None:
    page, readme = ROOT / "recipes" / "README.md", ROOT / "README.md"
    texts = {page: recipes_page(), readme: with_short_table(readme.read_text(encoding="utf-8"))}
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    print(f"wrote {page.relative_to(ROOT)} and the table in {readme.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
