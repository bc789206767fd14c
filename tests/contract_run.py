"""Short runs of recipes as they are, here or under torchrun: contract_run.py <output> <suffix> <recipe> ..."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, whichever is installed

from pretrain.config import compose_recipe, run_config
from pretrain.training.metrics import Reporter
from pretrain.training.setup import build_trainer

NOT_COMPARED = ("speed/", "memory/")  # of the machine, not of the training


def train(recipe: str, output: Path, updates: int, suffix: str = "") -> list[str]:
    """Train `recipe` in fp32 on the embedded sample until `updates`; returns what the run says at its start.

    The run is `output`/<recipe><suffix>; labels that recipes make from the sample are shared by all runs of `output`.
    Runs with a suffix draw no figures, which takes as long as their updates.
    """
    options = [f"output_dir={output}", f"name={recipe}{suffix}", f"trainer.stop_after_updates={updates}"]
    options += ["trainer.max_validation_batches=2"]
    options += ["precision=fp32", "data.workers=0", "trainer.threads=1", "trainer.log_every=1"]
    # Two micro-batches, so that two ranks can share them.
    options += ["trainer.memory_probe=false", "batch.micro_batches_per_step=2"]
    with ExitStack() as resources:
        trainer = build_trainer(run_config(compose_recipe(recipe, options)), resources)
        if suffix:
            resources.enter_context(patch.object(Reporter, "figures"))
        assert trainer.fit() == 0
    return trainer.run.notes


def figures(run: Path) -> dict[int, dict[str, float | None]]:
    """The training figures of a run by update, without those of the machine; None where one is no number."""
    text = (run / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=lambda name: None) for line in text.splitlines()]
    return {
        line["update"]: {name: value for name, value in line.items() if not name.startswith(NOT_COMPARED)}
        for line in lines
        if "train/loss" in line
    }


if __name__ == "__main__":
    folder, its_suffix, *recipes = sys.argv[1:]
    for name in recipes:
        train(name, Path(folder), 2, its_suffix)
    torch.distributed.destroy_process_group()
