"""Which rows make up which micro-batch: a function of (seed, epoch) alone, whatever the ranks and workers.

Utterances are sorted by length with random ties and cut into batches whose longest row fits the budget, as fairseq
does; every row of a batch is then cropped to its shortest, so nothing is padded, or, where utterances are wanted whole,
padded to its longest. Lengths are first rounded to a short ladder of shapes taken from the corpus' own distribution, so
that compiled graphs stay few and ties are many enough to shuffle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from pretrain.config import ConfigError
from pretrain.data.audio import SAMPLE_RATE
from pretrain.data.mix import CorpusShare, Mix, Slots

LADDER_SHAPES = 32


@dataclass(frozen=True)
class MicroBatch:
    """`rows` (n,) of the manifest, each cropped to `crop_samples` where it is longer, in `epoch`.

    `copies` (n,) tells the times apart that a row comes in one epoch, from 0; None where every row comes once.
    """

    epoch: int
    rows: np.ndarray
    crop_samples: int
    copies: np.ndarray | None = None


class Plan:
    """The order of examples for a whole run.

    `lengths` (N,) are samples; crops lie on a grid of `stride_samples` with windows of `receptive_field_samples`.
    With `whole`, rows are read to their end (up to `max_seconds`) and batches hold rows of unlike lengths. `groups`
    (N,) are non-negative integers: a batch then holds rows of one group. `mix` says which rows belong to which corpus
    and how much of an epoch each corpus gets; without it every row comes once. Raises ConfigError where no utterance is
    long enough.
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
        whole: bool = False,
        groups: np.ndarray | None = None,
        mix: Mix | None = None,
    ) -> None:
        minimum = max(round(min_seconds * SAMPLE_RATE), receptive_field_samples)
        self.rows = np.flatnonzero(lengths >= minimum)
        if not len(self.rows):
            longest = lengths.max(initial=0) / SAMPLE_RATE
            raise ConfigError(
                f"crop.min_seconds: no utterance has {minimum / SAMPLE_RATE:g} s (the longest has {longest:.2f} s); "
                "lower crop.min_seconds or check the manifest"
            )
        self.seed, self.whole, self.stride_samples = seed, whole, stride_samples
        self.grouped = groups is not None
        usable = np.minimum(lengths[self.rows], round(max_seconds * SAMPLE_RATE))
        self.ladder, self.rung = _shapes(usable, stride_samples, receptive_field_samples, whole)
        corpus = np.zeros(len(self.rows), np.int64) if mix is None else mix.corpus_of(self.rows)
        stratum = corpus if groups is None else np.unique(groups[self.rows], return_inverse=True)[1]
        mixed = mix is not None and not mix.is_natural
        self._group = stratum if self.grouped else np.zeros(1, np.int64)
        # Rows stand by stratum and then from long to short; rows of one key are exchangeable.
        self._key = self._keys(stratum if mixed or self.grouped else 0, self.rung)
        self._slots: Slots | None = None
        self._slot_key = self._key
        taken = usable  # samples of each row in an epoch, on average
        if mix is not None and mixed:
            sizes, places = np.bincount(stratum), mix.places(usable, corpus, stratum)
            self._slots = Slots(sizes, places)
            self._slot_key = self._keys_of(self._slots)
            taken = usable * (places / sizes)[stratum]
        self.bounds, self.crops = self._cut(round(seconds_per_micro_batch * SAMPLE_RATE))
        fed = taken.sum() if whole else (np.diff(self.bounds) * self.crops).sum()
        self.seconds_per_epoch = float(fed) / SAMPLE_RATE
        self.kept_share = float(fed / taken.sum())
        self.shares = [] if mix is None else _shares(mix, lengths, np.bincount(corpus, taken, len(mix.tags)))
        self._epoch_rows = lru_cache(maxsize=2)(self._shuffle)

    def _keys(self, group: np.ndarray | int, rung: np.ndarray) -> np.ndarray:
        """Integers that sort by group and then from long to short."""
        return group * len(self.ladder) + (len(self.ladder) - 1 - rung.astype(np.int64))

    def _keys_of(self, slots: Slots) -> np.ndarray:
        """Keys of an epoch's places: all rows that a place can get fit its shape."""
        rungs = len(self.ladder) - 1 - np.sort(self._key) % len(self.ladder)
        rung = rungs[slots.first if self.whole else slots.last]
        return self._keys(slots.stratum if self.grouped else 0, rung)

    def _cut(self, budget_samples: int) -> tuple[np.ndarray, np.ndarray]:
        """Batch borders in the order of the keys, the same in every epoch, and the crop of each batch."""
        group, falling = np.divmod(np.sort(self._slot_key), len(self.ladder))
        sizes = self.ladder[len(self.ladder) - 1 - falling]
        bounds = [0]
        for end in [*(np.flatnonzero(np.diff(group)) + 1).tolist(), len(sizes)]:
            while bounds[-1] < end:
                bounds.append(min(end, bounds[-1] + max(1, int(budget_samples // sizes[bounds[-1]]))))
        borders = np.array(bounds)
        return borders, sizes[borders[:-1] if self.whole else borders[1:] - 1]

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Rows in the order of the keys with random ties, their copies, and the order in which the batches come."""
        rng = np.random.default_rng([self.seed, epoch])
        order = _random_ties(self._key, rng)
        batches = rng.permutation(len(self.crops))
        if self._slots is None:
            return self.rows[order], None, batches
        drawn = order[self._slots.positions(rng)]
        by_key = _random_ties(self._slot_key, rng)
        return self.rows[drawn[by_key]], self._slots.copies[by_key], batches

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches in one epoch; the same in every epoch."""
        return len(self.crops)

    def micro_batch(self, index: int) -> MicroBatch:
        """Micro-batch number `index` of the run, counted over all ranks and epochs."""
        epoch, position = divmod(index, self.batches_per_epoch)
        return self._batch(epoch, self._epoch_rows(epoch)[2][position])

    def _batch(self, epoch: int, batch: int) -> MicroBatch:
        rows, copies, _ = self._epoch_rows(epoch)
        mine = slice(self.bounds[batch], self.bounds[batch + 1])
        return MicroBatch(epoch, rows[mine], int(self.crops[batch]), None if copies is None else copies[mine])

    def largest_shapes(self) -> list[MicroBatch]:
        """The batch with the most samples and the one with the longest crop, for the memory probe."""
        samples = np.diff(self.bounds) * self.crops
        return [self._batch(0, b) for b in sorted({int(samples.argmax()), int(self.crops.argmax())})]

    def small_micro_batch(self) -> MicroBatch:
        """Two rows of the batch with the shortest crop, for trials that need no more."""
        batch = self._batch(0, int(self.crops.argmin()))
        copies = None if batch.copies is None else batch.copies[:2]
        return replace(batch, rows=batch.rows[:2], copies=copies)

    def replacement(self, micro_batch: MicroBatch, row: int, attempt: int) -> int:
        """Another row that fits the batch's shape in place of `row`, whose file cannot be read.

        It comes from the row's own group, unless no other row of that fits.
        """
        rng = np.random.default_rng([self.seed, micro_batch.epoch, row, attempt + 1])
        sizes = self.ladder[self.rung]
        fits = sizes <= micro_batch.crop_samples if self.whole else sizes >= micro_batch.crop_samples
        if self.grouped:
            own = self._group[np.searchsorted(self.rows, row)]
            kin = fits & (self._group == own) & (self.rows != row)
            fits = kin if kin.any() else fits
        return int(rng.choice(self.rows[fits]))


def _shapes(usable: np.ndarray, stride: int, receptive_field: int, whole: bool) -> tuple[np.ndarray, np.ndarray]:
    """The (at most 33,) ascending shapes of a corpus, and the (n,) place of each row's shape among them.

    A row's shape is the longest crop on the grid that it allows, or with `whole` the shortest that holds all of it.
    """
    quantiles = np.linspace(0, 1, LADDER_SHAPES + 1)
    if whole:
        ladder = np.unique(np.quantile(usable, quantiles, method="higher"))
        return ladder, np.searchsorted(ladder, usable, side="left").astype(np.int8)
    on_grid = usable - (usable - receptive_field) % stride
    ladder = np.unique(np.quantile(on_grid, quantiles, method="lower"))
    return ladder, (np.searchsorted(ladder, on_grid, side="right") - 1).astype(np.int8)


def _random_ties(keys: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n,) order of (n,) non-negative keys in which equal keys come at random.

    Key, random bits and index go into one integer each, because sorting integers is several times as fast as sorting
    indices, which counts for millions of rows; the index also breaks ties of the random bits alike on every machine.
    """
    index_bits = (len(keys) - 1).bit_length()
    key_bits = int(keys.max(initial=0)).bit_length()
    random_bits = min(53, 64 - key_bits - index_bits)
    packed = keys.astype(np.uint64) << random_bits
    packed |= (rng.random(len(keys)) * 2.0**random_bits).astype(np.uint64)
    packed <<= index_bits
    packed |= np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    packed &= (1 << index_bits) - 1
    return packed.astype(np.int64)


def _shares(mix: Mix, lengths: np.ndarray, sampled: np.ndarray) -> list[CorpusShare]:
    """Hours of each corpus and of what an epoch takes from it, `sampled` (C,) samples before cropping to shapes."""
    hours = np.add.reduceat(lengths, mix.first_rows[:-1]) / SAMPLE_RATE / 3600
    per_epoch, share = sampled / SAMPLE_RATE / 3600, sampled / sampled.sum()
    columns = zip(mix.tags, hours.tolist(), per_epoch.tolist(), share.tolist(), strict=True)
    return [CorpusShare(*column) for column in columns]


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
