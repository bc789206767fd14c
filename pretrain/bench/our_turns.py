"""Our side of tools/benchmark.py task=pipeline: the trainer itself, one update at a time."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from pretrain.bench.turns import Training, serve
from pretrain.config import compose_recipe, run_config
from pretrain.training.setup import build_trainer


def start(job: dict[str, Any]) -> Training:
    """Build the trainer of `job`'s recipe with its overrides; nothing is logged, validated or saved in between."""
    trainer = build_trainer(run_config(compose_recipe(job["recipe"], job["overrides"])), ExitStack())
    steps = trainer.steps()

    def update() -> float:
        """One step of the trainer; the seconds of audio in it."""
        before = trainer.throughput.audio_seconds
        next(steps)
        return trainer.throughput.audio_seconds - before

    return Training(update, sum(p.numel() for p in trainer.engine.method.parameters()))


if __name__ == "__main__":
    serve(start)
