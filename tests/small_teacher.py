"""A method of a few parameters whose targets come from a moving average of its encoder, and updates of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from small_method import MICRO_BATCHES, ROWS, SmallConfig, micro_batch, rate
from torch import Tensor, nn

from pretrain.method import Batch, Method, Progress, StepOutput
from pretrain.models.batch_norm import BatchNorm, settle_statistics
from pretrain.models.teacher import Teacher, linear_ramp
from pretrain.training.distributed import World
from pretrain.training.engine import Engine

UPDATES, SAVED_AT = 4, 2
STEPS = (1, 3, 4, 7)  # of `micro_batch`; those without a NaN
# Some tensors are divided and some are not: the matrices have 120 and 45 elements, the vectors fewer than 16.
DIVIDED = {"stage": 3, "stage3_param_persistence_threshold": 16}
ZERO = {"0": {"stage": 0}, "1": {"stage": 1}, "2": {"stage": 2}, "3": {"stage": 3}, "3 divided": DIVIDED}


def decay(update: int) -> float:
    """0.5, 0.7, 0.9, 0.9 after updates 1 to 4."""
    return linear_ramp(update - 1, 0.5, 0.9, 2)


class TaughtMethod(Method):
    """A student and its teacher behind layers that both use, in sizes that two ranks cannot share.

    What the teacher gets has a gradient, which must stop there. The encoder has running statistics, and a parameter
    that is not trained.
    """

    Config = SmallConfig

    def __init__(self) -> None:
        super().__init__(SmallConfig())
        torch.manual_seed(0)
        self.front = nn.Linear(8, 8)
        self.encoder = nn.Sequential(nn.Linear(8, 15), BatchNorm(15), nn.Tanh(), nn.Dropout(0.5), nn.Linear(15, 3))
        self.encoder[0].bias.requires_grad_(False)
        self.teacher = Teacher.copy_of(self.encoder)

    def forward(self, batch: Batch) -> StepOutput:
        """Sum of squared distances from the teacher's output, shifted so that there is something to learn."""
        shared = self.front(batch.waveforms)
        target = self.teacher(shared)
        assert not target.requires_grad
        return StepOutput((self.encoder(shared).float() - target.float() - 1).square().sum(), {})

    def after_step(self, progress: Progress) -> None:
        """The teacher follows."""
        self.teacher.update(self.encoder, decay(progress.update))


def updates(engine: Engine, world: World, first: int, last: int) -> Iterator[dict[str, Tensor]]:
    """Updates `first` to `last` in the trainer's order; all weights after each."""
    for update in range(first, last):
        engine.method.train()
        accumulation = MICRO_BATCHES // world.size
        for index in range(accumulation):
            place = index * world.size + world.rank
            torch.manual_seed(100 * update + place)
            loss = engine.forward(micro_batch(STEPS[update], place)).loss
            engine.backward(loss * (world.size / (MICRO_BATCHES * ROWS)), last=index == accumulation - 1)
        assert engine.step(rate(update), torch.zeros(()))
        settle_statistics(engine.method, applied=True)
        engine.method.after_step(Progress(update + 1, UPDATES, seed=1))
        yield engine.weights(keep=True)
