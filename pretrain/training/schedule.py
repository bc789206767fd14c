"""Learning-rate schedules: the factor on the peak rate as a function of the updates already applied.

`factor(n)` is the rate in force after update n, that is, for update n + 1, as fairseq counts
(`fairseq/optim/lr_scheduler/{polynomial_decay_schedule,tri_stage_lr_scheduler}.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pretrain.config import ConfigError, nearest, typed


@dataclass
class Schedule:
    """Linear warm-up over `warmup_updates`, then what the subclass says until `total_updates`."""

    name: str
    warmup_updates: int
    total_updates: int

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_updates <= self.total_updates or self.total_updates < 1:
            raise ConfigError(
                f"schedule: need 0 <= warmup_updates ({self.warmup_updates}) <= total_updates ({self.total_updates}); "
                "when shortening a run, shorten schedule.warmup_updates with it"
            )

        for name in ("init_factor", "end_factor", "final_factor"):
            if not 0.0 <= getattr(self, name, 0.0) <= 1.0:
                raise ConfigError(f"schedule.{name}: {getattr(self, name):g} is no share of the peak; give 0 to 1")

    def factor(self, update: int) -> float:
        """Share of the peak learning rate after `update` updates."""
        if update < self.warmup_updates:
            return update / self.warmup_updates
        return self.decay(min(1.0, (update - self.warmup_updates) / max(1, self.total_updates - self.warmup_updates)))

    def decay(self, progress: float) -> float:
        """Share of the peak rate at `progress` (0 to 1) of what follows the warm-up."""
        raise NotImplementedError


@dataclass
class Constant(Schedule):
    """The peak to the end, after a linear ramp where there is a warm-up."""

    def decay(self, progress: float) -> float:
        return 1.0


@dataclass
class Linear(Schedule):
    """Straight down to zero."""

    def decay(self, progress: float) -> float:
        return 1.0 - progress


@dataclass
class Polynomial(Schedule):
    """(1 - progress) ** power, down to `end_factor` of the peak."""

    power: float = 1.0
    end_factor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.power < math.inf:
            raise ConfigError(f"schedule.power: {self.power:g}; give a positive number, 1 for a straight line")

    def decay(self, progress: float) -> float:
        return self.end_factor + (1.0 - self.end_factor) * (1.0 - progress) ** self.power


@dataclass
class Cosine(Schedule):
    """Warm-up from `init_factor`, then half a cosine down to `end_factor` of the peak."""

    end_factor: float = 0.0
    init_factor: float = 0.0

    def factor(self, update: int) -> float:
        if update < self.warmup_updates:
            return self.init_factor + (1.0 - self.init_factor) * update / self.warmup_updates
        return super().factor(update)

    def decay(self, progress: float) -> float:
        return self.end_factor + (1.0 - self.end_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass
class InverseSquareRoot(Schedule):
    """The peak times sqrt(warmup / n) after the warm-up ("Noam")."""

    def factor(self, update: int) -> float:
        if update < self.warmup_updates:
            return update / self.warmup_updates
        return math.sqrt(max(1, self.warmup_updates) / max(1, update, self.warmup_updates))


@dataclass
class TriStage(Schedule):
    """Warm-up from `init_factor`, a plateau of `hold_updates`, then exponential decay to `final_factor`."""

    hold_updates: int = 0
    init_factor: float = 0.01
    final_factor: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.final_factor == 0.0:
            raise ConfigError("schedule.final_factor: 0 is no end of an exponential decay; give a small number above 0")
        if not 0 <= self.hold_updates <= self.total_updates - self.warmup_updates:
            raise ConfigError(
                f"schedule.hold_updates: {self.hold_updates}; give 0 to {self.total_updates - self.warmup_updates}, "
                "which is what total_updates leaves behind warmup_updates"
            )

    def factor(self, update: int) -> float:
        if update < self.warmup_updates:
            return self.init_factor + (1.0 - self.init_factor) * update / self.warmup_updates
        decayed = update - self.warmup_updates - self.hold_updates
        decay_updates = max(1, self.total_updates - self.warmup_updates - self.hold_updates)
        return self.final_factor ** min(1.0, max(0, decayed) / decay_updates)


SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "linear": Linear,
    "polynomial": Polynomial,
    "cosine": Cosine,
    "inverse_square_root": InverseSquareRoot,
    "tri_stage": TriStage,
}


def schedule_class(name: Any) -> type[Schedule]:
    """The dataclass behind `schedule.name`. Raises ConfigError, with the nearest names, for an unknown one."""
    if name not in SCHEDULES:
        raise ConfigError(f"schedule.name: unknown schedule '{name}'; {nearest(str(name), list(SCHEDULES))}")
    return SCHEDULES[name]


def build_schedule(values: dict[str, Any]) -> Schedule:
    """Type the `schedule` block. Raises ConfigError for an unknown name or field."""
    return typed(schedule_class(values.get("name")), values, "schedule")
