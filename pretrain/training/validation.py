"""Validation: the same micro-batches, masks and crops every time, shared out over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pretrain.data.loader import MicroBatchReader, batches
from pretrain.training.engine import Engine
from pretrain.training.metrics import Accumulator
from pretrain.world import World


@dataclass(frozen=True)
class Validation:
    """Reads the first `max_batches` micro-batches of the validation plan, all ranks together."""

    reader: MicroBatchReader
    world: World
    max_batches: int
    workers: int

    @torch.no_grad()
    def run(self, engine: Engine) -> tuple[dict[str, float], dict[str, Any]]:
        """Metrics over all ranks, and the method's pictures of the last micro-batch; a collective call."""
        plan, world = self.reader.plan, self.world
        count = min(plan.batches_per_epoch, self.max_batches)
        # Every rank runs as many forwards; what is beyond the end is not counted (ZeRO 3 communicates in forward).
        rounds = -(-count // world.size)
        indices = [round_ * world.size + world.rank for round_ in range(rounds)]
        order = [plan.micro_batch(index % count) for index in indices]
        metrics = Accumulator(validation=True)
        engine.method.eval()
        for index, batch in zip(indices, batches(self.reader, order, self.workers, False), strict=True):
            on_device = batch.to(world.device)
            output = engine.forward(on_device)
            reported = output.reported(on_device)
            if index < count:
                metrics.add(reported)
            elif index < world.size:
                metrics.add({name: value.nothing() for name, value in reported.items()})
        figures = engine.figures(on_device)
        metrics.commit()
        return metrics.reduce()[0], figures
