"""Which rows make up which micro-batch: a function of (seed, epoch) alone, whatever the ranks and workers.

Utterances are sorted by length with random ties and cut into batches whose longest row fits the budget, as fairseq
does; every row of a batch is then cropped to its shortest, so nothing is padded. Lengths are first rounded down to
a short ladder of shapes taken from the corpus' own distribution, so that compiled graphs stay few and ties are many
enough to shuffle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pretrain.config import ConfigError
from pretrain.data.audio import SAMPLE_RATE

LADDER_SHAPES = 32


@dataclass(frozen=True)
class MicroBatch:
    """`rows` (n,) of the manifest, each cropped to `crop_samples`, in `epoch`."""

    epoch: int
    rows: np.ndarray
    crop_samples: int


class Plan:
    """The order of examples for a whole run.

    `lengths` (N,) are samples; crops lie on a grid of `stride_samples` with windows of `receptive_field_samples`.
    Raises ConfigError where no utterance is long enough.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        min_seconds: float,
        max_seconds: float,
        seconds_per_micro_batch: float,
        stride_samples: int,
        receptive_field_samples: int,
        seed: int,
    ) -> None:
        minimum = max(round(min_seconds * SAMPLE_RATE), receptive_field_samples)
        self.rows = np.flatnonzero(lengths >= minimum)
        if not len(self.rows):
            longest = lengths.max(initial=0) / SAMPLE_RATE
            raise ConfigError(
                f"crop.min_seconds: no utterance has {minimum / SAMPLE_RATE:g} s (the longest has {longest:.2f} s); "
                "lower crop.min_seconds or check the manifest"
            )
        usable = np.minimum(lengths[self.rows], round(max_seconds * SAMPLE_RATE))
        on_grid = usable - (usable - receptive_field_samples) % stride_samples
        quantiles = np.linspace(0, 1, LADDER_SHAPES + 1)
        self.ladder = np.unique(np.quantile(on_grid, quantiles, method="lower"))
        self.rung = np.searchsorted(self.ladder, on_grid, side="right") - 1
        self.seed = seed
        self.stride_samples = stride_samples
        self.bounds, self.crops = self._cut(round(seconds_per_micro_batch * SAMPLE_RATE))
        self.kept_share = float((np.diff(self.bounds) * self.crops).sum() / usable.sum())
        self._epoch_rows = lru_cache(maxsize=2)(self._shuffle)

    def _cut(self, budget_samples: int) -> tuple[np.ndarray, np.ndarray]:
        """Batch borders in length order, the same in every epoch, and the crop of each batch."""
        sizes = self.ladder[np.sort(self.rung)[::-1]]
        bounds = [0]
        while bounds[-1] < len(sizes):
            bounds.append(min(len(sizes), bounds[-1] + max(1, int(budget_samples // sizes[bounds[-1]]))))
        return np.array(bounds), sizes[np.array(bounds[1:]) - 1]

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows in length order with random ties, and the order in which the batches come."""
        rng = np.random.default_rng([self.seed, epoch])
        order = np.lexsort((rng.random(len(self.rows)), -self.rung))
        return self.rows[order], rng.permutation(len(self.crops))

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches in one pass over the corpus; the same in every epoch."""
        return len(self.crops)

    @property
    def seconds_per_epoch(self) -> float:
        """Seconds of audio that one epoch feeds, after cropping."""
        return float((np.diff(self.bounds) * self.crops).sum()) / SAMPLE_RATE

    def micro_batch(self, index: int) -> MicroBatch:
        """Micro-batch number `index` of the run, counted over all ranks and epochs."""
        epoch, position = divmod(index, self.batches_per_epoch)
        rows, order = self._epoch_rows(epoch)
        batch = order[position]
        return MicroBatch(epoch, rows[self.bounds[batch] : self.bounds[batch + 1]], int(self.crops[batch]))

    def largest_shapes(self) -> list[MicroBatch]:
        """The batch with the most samples and the one with the longest crop, for the memory probe."""
        samples = np.diff(self.bounds) * self.crops
        rows, _ = self._epoch_rows(0)
        chosen = sorted({int(samples.argmax()), int(self.crops.argmax())})
        return [MicroBatch(0, rows[self.bounds[b] : self.bounds[b + 1]], int(self.crops[b])) for b in chosen]

    def replacement(self, micro_batch: MicroBatch, row: int, attempt: int) -> int:
        """Another row, long enough for the crop, in place of `row` whose file cannot be read."""
        rng = np.random.default_rng([self.seed, micro_batch.epoch, row, attempt + 1])
        return int(rng.choice(self.rows[self.ladder[self.rung] >= micro_batch.crop_samples]))


def rank_share(
    plan: Plan, first_step: int, micro_batches_per_step: int, rank: int, world_size: int
) -> Iterator[MicroBatch]:
    """The micro-batches of one rank from `first_step` on, without end."""
    step = first_step
    while True:
        first = step * micro_batches_per_step
        for index in range(first + rank, first + micro_batches_per_step, world_size):
            yield plan.micro_batch(index)
        step += 1
