"""Compare the losses of two commits: make compare BASE=<commit>, or python tools/compare_losses.py base=<commit>

Trains every `*_tiny` recipe for a few updates as `base` has it and as the working tree has it: same seed, float32, one
thread, the embedded sample. A change that is not meant to alter any number must leave every figure equal to the last
digit. The runs of a commit are kept under outputs/compare/<commit>, so that the next comparison with it is twice as
fast.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pretrain.config import parse_cli, recipe_names, run_tool
from pretrain.errors import UserError

FOLDER = ROOT / "outputs" / "compare"
NOT_COMPARED = ("speed/", "memory/")  # of the machine, not of the training

Line = dict[str, float]  # of one update


@dataclass
class Options:
    """`base` is a commit; `recipes` are names between commas, all `*_tiny` when null."""

    base: str
    recipes: str | None = None
    updates: int = 10


def train(tree: Path, output: Path, recipe: str, updates: int) -> list[Line] | None:
    """The figures of every update of one run of the code in `tree`; None where that code has no such recipe.

    Raises UserError with the end of the run's messages where it fails.
    """
    if not (tree / "conf" / "recipe" / f"{recipe}.yaml").is_file():
        return None
    command = [sys.executable, str(tree / "pretrain" / "train.py"), f"recipe={recipe}", f"output_dir={output}"]
    command += ["precision=fp32", "data.workers=0", "trainer.threads=1", "trainer.log_every=1"]
    command += [
        f"trainer.stop_after_updates={updates}",
        "trainer.memory_probe=false",
        "trainer.max_validation_batches=1",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    shutil.rmtree(output / recipe, ignore_errors=True)
    done = subprocess.run(command, cwd=output, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{recipe} of {tree} ended with status {done.returncode}\n{done.stderr[-3000:]}")
    return figures(output / recipe / "metrics.jsonl")


def figures(path: Path) -> list[Line]:
    """The lines of a run's metrics.jsonl, without what depends on the machine."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(NOT_COMPARED)} for line in lines]


def verdict(base: list[Line] | None, now: list[Line] | None) -> tuple[bool, str]:
    """Whether two runs agree in every figure that both have, and what to say about it."""
    if base is None or now is None:
        return True, f"only in the {'working tree' if base is None else 'base'}"
    if len(base) != len(now):
        return False, f"DIFFERENT: {len(base)} lines of figures against {len(now)}"
    unshared = sorted({name for before, after in zip(base, now, strict=True) for name in before.keys() ^ after.keys()})
    for before, after in zip(base, now, strict=True):
        for name in before.keys() & after.keys():
            if before[name] != after[name] and not (math.isnan(before[name]) and math.isnan(after[name])):
                return False, f"DIFFERENT at update {after.get('update')}: {name} {before[name]} -> {after[name]}"
    return True, "equal" + (f"; in one of them only: {', '.join(unshared)}" if unshared else "")


def of_commit(commit: str, recipe: str, updates: int, tree: Path) -> list[Line] | None:
    """The figures of `recipe` in the checkout `tree` of `commit`, from an earlier comparison where there was one."""
    output = FOLDER / commit
    kept = output / f"{recipe}.{updates}.json"
    if not kept.is_file():
        output.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(train(tree, output, recipe, updates)))
    return json.loads(kept.read_text())


def git(*arguments: str) -> str:
    """Output of one git command in the repository. Raises UserError with git's own words where it fails."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


def main(arguments: list[str]) -> None:
    """Print a line per recipe; leaves with status 1 where a figure differs."""
    options = parse_cli(Options, arguments, __doc__)
    commit = git("rev-parse", "--verify", f"{options.base}^{{commit}}")
    tiny = [name for name in recipe_names() if name.endswith("_tiny")]
    recipes = options.recipes.split(",") if options.recipes else tiny
    different = []
    shutil.rmtree(FOLDER / "now", ignore_errors=True)
    (FOLDER / "now").mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            for recipe in recipes:
                base = of_commit(commit, recipe, options.updates, tree)
                equal, sentence = verdict(base, train(ROOT, FOLDER / "now", recipe, options.updates))
                print(f"{recipe:<28} {sentence}", flush=True)
                different += [] if equal else [recipe]
        finally:
            git("worktree", "remove", "--force", str(tree))
    if different:
        raise UserError(f"{len(different)} of {len(recipes)} recipes differ from {options.base}")
    print(f"{len(recipes)} recipes: {options.updates} updates equal to those of {options.base} to the last digit")


if __name__ == "__main__":
    run_tool(main)
