"""What DeepSpeed's engine holds at each ZeRO stage, counted while it trains; started by test_dry_run.py under torchrun.

held_by_ranks.py <output.json>
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from small_method import OPTIMIZER, SmallConfig, StepsOnly
from torch import nn

from pretrain.method import Batch, StepOutput
from pretrain.planning.footprint import LiveBytes
from pretrain.training.engine import Engine
from pretrain.world import World, join_world

WIDTH, LAYERS = 512, 6  # layers that ZeRO 3 shares: it leaves smaller tensors whole
BUCKET = WIDTH * WIDTH  # elements, about one layer
STAGES = (0, 1, 2, 3)


class Layers(StepsOnly):
    """Equal layers on next to no data, so that weights and what belongs to them are nearly all that is held."""

    Config = SmallConfig

    def __init__(self) -> None:
        super().__init__(SmallConfig())
        self.net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))

    def forward(self, batch: Batch) -> StepOutput:
        return StepOutput(self.net(batch.waveforms).square().sum(), {})


def zero_block(stage: int) -> dict[str, int]:
    """DeepSpeed's settings with a bucket that is small beside the network."""
    return {"stage": stage, "reduce_bucket_size": BUCKET}


def most_held(stage: int, world: World) -> int:
    """Peak bytes of the third update; the first one makes the optimiser's state."""
    batch = Batch(torch.randn(1, WIDTH), torch.tensor([WIDTH]), 1, torch.arange(1), padded=False)
    with LiveBytes() as live:
        engine = Engine(Layers(), OPTIMIZER, {"zero_optimization": zero_block(stage)}, "fp32", world.device)
        for update in range(3):
            gc.collect()
            live.peak = live.live if update == 2 else live.peak
            for micro_batch in range(2):
                engine.backward(engine.forward(batch).loss, last=micro_batch == 1)
            engine.step(1e-3, torch.zeros(()))
    return live.peak


if __name__ == "__main__":
    process = join_world()
    found = {stage: most_held(stage, process) for stage in STAGES}
    if process.is_main:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.barrier()
    # All is written. At a regular exit after four engines torch sometimes aborts over a thread that still runs.
    os._exit(0)
