"""A method of a few parameters whose targets come from a moving average of its encoder, and updates of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from small_method import MICRO_BATCHES, OPTIMIZER, ROWS, SmallConfig, StepsOnly, micro_batch, rate
from torch import Tensor, nn

from pretrain.method import Batch, Progress, StepOutput
from pretrain.models.batch_norm import BatchNorm, update_running_statistics
from pretrain.models.teacher import Teacher, linear_ramp
from pretrain.training.engine import Engine
from pretrain.world import World

UPDATES = 4
STEPS = (1, 3, 4, 7)  # of `micro_batch`; those without a NaN
# Some tensors are divided and some are not: the matrices have 120 and 45 elements, the vectors fewer than 16.
DIVIDED = {"stage": 3, "stage3_param_persistence_threshold": 16}
ZERO = {"0": {"stage": 0}, "1": {"stage": 1}, "2": {"stage": 2}, "3": DIVIDED}


def decay(update: int) -> float:
    """0.5, 0.7, 0.9, 0.9 after updates 1 to 4."""
    return linear_ramp(update - 1, 0.5, 0.9, 2)


class TaughtMethod(StepsOnly):
    """A student and its teacher behind layers that both use, in sizes that two ranks cannot share.

    What the teacher gets has a gradient, which must stop there. The encoder has running statistics. Biases before them
    would have a gradient of rounding errors alone, so one is left out and one is not trained.
    """

    Config = SmallConfig

    def __init__(self) -> None:
        super().__init__(SmallConfig())
        torch.manual_seed(0)
        self.front = nn.Linear(8, 8, bias=False)
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


def step_loss(method: Any, update: int, index: int) -> Tensor:
    """The loss of micro-batch `index` of `update`, with the dropout that belongs to it; `method` may be an engine's."""
    torch.manual_seed(100 * update + index)
    return method(micro_batch(STEPS[update], index)).loss / (MICRO_BATCHES * ROWS)


def taught_updates(engine: Engine, world: World, first: int, last: int) -> Iterator[dict[str, Tensor]]:
    """Updates `first` to `last` in the trainer's order; all weights after each."""
    for update in range(first, last):
        engine.method.train()
        accumulation = MICRO_BATCHES // world.size
        for index in range(accumulation):
            place = index * world.size + world.rank
            loss = step_loss(engine.forward, update, place)
            engine.backward(loss * world.size, last=index == accumulation - 1)
        assert engine.step(rate(update), torch.zeros(()))
        update_running_statistics(engine.method, applied=True)
        engine.method.after_step(Progress(update + 1, UPDATES, seed=1))
        yield engine.weights(keep=True)


def plain_torch() -> list[dict[str, Tensor]]:
    """All weights after each update, by torch's own AdamW and clipping and a teacher that is averaged by hand."""
    method, history = TaughtMethod().train(), []
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    for update in range(UPDATES):
        optimizer.zero_grad()
        sum(step_loss(method, update, index) for index in range(MICRO_BATCHES)).backward()
        nn.utils.clip_grad_norm_(trained, OPTIMIZER.clip_norm)
        optimizer.param_groups[0]["lr"] = rate(update)
        optimizer.step()
        update_running_statistics(method, applied=True)
        before = {name: value.detach() for name, value in method.teacher.network.state_dict().items()}
        student = method.encoder.state_dict()
        method.teacher.network.load_state_dict(averaged(before, student, decay(update + 1)))
        history.append({name: value.clone() for name, value in method.state_dict().items()})
    return history


def averaged(teacher: dict[str, Tensor], student: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """share * teacher + (1 - share) * student in float64; running statistics are the student's."""
    copied = ("running_mean", "running_var", "num_batches_tracked")
    return {
        name: student[name] if name.endswith(copied) else share * value.double() + (1 - share) * student[name].double()
        for name, value in teacher.items()
    }
