"""A method of a few parameters with everything an engine must keep, and the same training written in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.config import OptimizerConfig
from pretrain.method import Batch, Collator, Method, StepOutput
from pretrain.training.engine import Engine
from pretrain.world import World

MICRO_BATCHES = 4
ROWS = 5
UPDATES = 8
SAVED_AT = 4
# Steps that must leave no trace: a loss that is NaN in one micro-batch, a gradient that is in one parameter only, and
# a step with nothing to score.
NAN_STEP, PARTLY_NAN_STEP, EMPTY_STEP = 2, 5, 6
# A small norm, so that most updates are clipped.
OPTIMIZER = OptimizerConfig("adamw", 1e-2, [0.9, 0.98], 1e-6, 0.01, 1.0)


@dataclass
class SmallConfig:
    """Nothing to configure."""

    name: str = "small"


class StepsOnly(Method):
    """A method for tests of single steps, which reads no data and counts no work."""

    @classmethod
    def collator(cls, config: Any) -> Collator:
        raise AssertionError("these tests make their batches themselves")

    def training_flops(self, samples: int) -> float:
        return 0.0


class SmallMethod(StepsOnly):
    """Regression by two layers, in sizes that two ranks cannot share.

    Beside them a buffer, a layer that is skipped now and then, and a parameter that never gets a gradient. Biases and
    single numbers do not decay: the optimiser has two groups.
    """

    Config = SmallConfig

    def __init__(self) -> None:
        super().__init__(SmallConfig())
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 15), nn.Tanh(), nn.Linear(15, 1))
        self.gain = nn.Parameter(torch.ones(1))  # DeepSpeed takes no parameter without a dimension
        self.sometimes = nn.Linear(8, 1)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(1))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Matrices decay by the optimiser's rate, vectors not."""
        matrices, vectors = ([p for p in self.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
        return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]

    def forward(self, batch: Batch) -> StepOutput:
        """Sum of squared errors; `extras["poison"]` (B,) reaches the gradient of `gain` alone.

        Odd steps skip `sometimes`, as LayerDrop skips layers.
        """
        output = self.net(batch.waveforms)
        if batch.extras["step"] % 2 == 0:
            output = output + self.sometimes(batch.waveforms)
        error = output[:, 0].float() - batch.waveforms.sum(1)
        return StepOutput(error.square().sum() + (self.gain * batch.extras["poison"]).sum(), {})


def micro_batch(step: int, index: int) -> Batch:
    """Micro-batch `index` of `step`, the same for every world size."""
    generator = torch.Generator().manual_seed(100 * step + index)
    waveforms = torch.randn(ROWS, 8, generator=generator)
    poison = torch.zeros(ROWS)
    if step == NAN_STEP and index == 1:
        waveforms[0, 0] = torch.nan
    if step == PARTLY_NAN_STEP and index == 1:
        poison[0] = torch.nan
    lengths, rows = torch.full((ROWS,), 8), torch.arange(ROWS)
    return Batch(waveforms, lengths, ROWS, rows, padded=False, extras={"poison": poison, "step": torch.tensor(step)})


def rate(update: int) -> float:
    """A learning rate that changes, so that one set too late shows."""
    return 1e-2 / (1 + update)


def train(engine: Engine, world: World, first: int, last: int) -> list[dict[str, Any]]:
    """Steps `first` to `last` as the trainer makes them: loss over all ranks, norm, whether it was applied."""
    history = []
    accumulation = MICRO_BATCHES // world.size
    for step in range(first, last):
        units = 0.0 if step == EMPTY_STEP else float(MICRO_BATCHES * ROWS)
        total = torch.zeros(())
        for index in range(accumulation):
            output = engine.forward(micro_batch(step, index * world.size + world.rank))
            engine.backward(output.loss * (world.size / max(units, 1.0)), last=index == accumulation - 1)
            total += output.loss.detach()
        applied = engine.step(rate(step), torch.tensor(float(units == 0)))
        dist.all_reduce(total)
        history.append({"loss": total.item(), "norm": engine.grad_norm, "applied": applied})
    return history


def plain_torch() -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The same run on one process with torch's own AdamW and clipping: history, final weights."""
    method, history = SmallMethod(), []
    trained = list(method.parameters())
    optimizer = torch.optim.AdamW(method.parameter_groups(), betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    for step in range(UPDATES):
        loss = sum(method(micro_batch(step, index)).loss for index in range(MICRO_BATCHES))
        # DeepSpeed gives parameters that the loss does not reach a gradient of zero, so they decay.
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        (loss / (MICRO_BATCHES * ROWS)).backward()
        norm = nn.utils.clip_grad_norm_(trained, OPTIMIZER.clip_norm)
        applied = bool(norm.isfinite()) and step != EMPTY_STEP
        if applied:
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            optimizer.step()
        history.append({"loss": loss.item(), "norm": norm.item(), "applied": applied})
    return history, {name: value.detach() for name, value in method.state_dict().items()}


def engine_of(stage: int, precision: str, world: World, method: Method | None = None) -> Engine:
    """An engine around a fresh method, or around `method`."""
    settings = {"zero_optimization": {"stage": stage}}
    return Engine(method or SmallMethod(), OPTIMIZER, settings, precision, world.device)


def plain(tensors: Iterator[tuple[str, Tensor]] | dict[str, Tensor]) -> dict[str, list[float]]:
    """Tensors as lists, for JSON."""
    return {name: value.flatten().tolist() for name, value in dict(tensors).items()}
