"""Which rows make up which micro-batch: a function of (seed, epoch) alone, whatever the ranks and workers.

Utterances are sorted by length with random ties and cut into batches whose longest row fits the budget, as fairseq
does; every row of a batch is then cropped to its shortest, so nothing is padded, or, where utterances are wanted whole,
padded to its longest. Lengths are first rounded to a few buckets taken from the corpus' own distribution, so
that compiled graphs stay few and ties are many enough to shuffle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from pretrain.config import ConfigError
from pretrain.data.audio import SAMPLE_RATE
from pretrain.data.buckets import Buckets
from pretrain.data.mix import CorpusShare, Draws, Mix


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
        self.seed, self.stride_samples = seed, stride_samples
        usable = np.minimum(lengths[self.rows], round(max_seconds * SAMPLE_RATE))
        self.buckets = Buckets.of_lengths(usable, stride_samples, receptive_field_samples, whole)
        # Speakers, where batches keep to one; else all rows are one group.
        self._group = None if groups is None else np.unique(groups[self.rows], return_inverse=True)[1]
        taken = self._sample(usable, mix)
        self.bounds, self.crops = self.buckets.cut(
            np.sort(self._draw_key), round(seconds_per_micro_batch * SAMPLE_RATE)
        )
        fed = taken.sum() if whole else (np.diff(self.bounds) * self.crops).sum()
        self.seconds_per_epoch = float(fed) / SAMPLE_RATE
        self.kept_share = float(fed / taken.sum())
        self.shares = [] if mix is None else _shares(mix, lengths, self.rows, taken)
        self._epoch_rows = lru_cache(maxsize=2)(self._shuffle)

    def _sample(self, usable: np.ndarray, mix: Mix | None) -> np.ndarray:
        """Settle how often each row comes in an epoch; (n,) samples of each row that an epoch takes on average.

        Rows are sorted by sampling group, and within it from long to short; rows of one key are exchangeable. The
        sampling groups are the speakers where batches keep to one, else the corpora of a mix.
        """
        self._draws: Draws | None = None
        own_group = 0 if self._group is None else self._group
        if mix is None or mix.is_natural:
            self._key = self._draw_key = self.buckets.keys(own_group, self.buckets.of_row)
            return usable
        corpus = mix.corpus_of(self.rows)
        sampling_group = corpus if self._group is None else self._group
        self._key = self.buckets.keys(sampling_group, self.buckets.of_row)
        sizes, counts = np.bincount(sampling_group), mix.draws(usable, corpus, sampling_group)
        self._draws = draws = Draws(sizes, counts)
        # Every row that a draw can give fits the bucket of the draw.
        buckets = self.buckets.bucket_of(np.sort(self._key))[draws.first if self.buckets.whole else draws.last]
        self._draw_key = self.buckets.keys(0 if self._group is None else draws.sampling_group, buckets)
        return usable * (counts / sizes)[sampling_group]

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Rows in the order of the keys with random ties, their copies, and the order in which the batches come."""
        rng = np.random.default_rng([self.seed, epoch])
        order = _random_ties(self._key, rng)
        batches = rng.permutation(len(self.crops))
        if self._draws is None:
            return self.rows[order], None, batches
        drawn = order[self._draws.positions(rng)]
        by_key = _random_ties(self._draw_key, rng)
        return self.rows[drawn[by_key]], self._draws.copies[by_key], batches

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
        fits = self.buckets.fitting(micro_batch.crop_samples)
        if self._group is not None:
            own = self._group[np.searchsorted(self.rows, row)]
            kin = fits & (self._group == own) & (self.rows != row)
            fits = kin if kin.any() else fits
        return int(rng.choice(self.rows[fits]))


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


def _shares(mix: Mix, lengths: np.ndarray, rows: np.ndarray, taken: np.ndarray) -> list[CorpusShare]:
    """Hours of each corpus and of what an epoch takes from it: (n,) `taken` samples of `rows`, before cropping."""
    hours = np.add.reduceat(lengths, mix.first_rows[:-1]) / SAMPLE_RATE / 3600
    sampled = np.bincount(mix.corpus_of(rows), taken, len(mix.tags))
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
