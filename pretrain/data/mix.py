"""Several corpora in one plan: the share of audio that each gets, and how often its rows are drawn in an epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pretrain.config import ConfigError


@dataclass(frozen=True)
class CorpusShare:
    """What one corpus brings to an epoch: hours in its manifest, hours taken from them, share of all that are taken."""

    tag: str
    hours: float
    sampled_hours: float
    share: float

    def sentence(self) -> str:
        """For the run's first lines."""
        return f"{self.tag}: {self.hours:.2f} h, of which an epoch takes {self.sampled_hours:.2f} h ({self.share:.1%})"

    def scalars(self) -> dict[str, float]:
        """For the curves."""
        values = {"hours": self.hours, "sampled_hours": self.sampled_hours, "share": self.share}
        return {f"data/{name}/{self.tag}": value for name, value in values.items()}


@dataclass(frozen=True)
class Mix:
    """Corpora in one numbering: rows `first_rows[c]` to `first_rows[c + 1]` are those of `tags[c]`.

    A corpus gets a share of an epoch's audio in proportion to `weights`, or without them to its own share of the hours
    to the power of `alpha` (1: as it is). XLSR-53 and XLS-R sample languages like that (arXiv 2006.13979, 2111.09296).
    """

    tags: list[str]
    first_rows: np.ndarray
    alpha: float = 1.0
    weights: list[float] | None = None

    @property
    def is_natural(self) -> bool:
        """Whether every row comes exactly once an epoch."""
        return self.weights is None and self.alpha == 1.0

    def corpus_of(self, rows: np.ndarray) -> np.ndarray:
        """(N,) rows to (N,) indices of their corpora."""
        return np.searchsorted(self.first_rows, rows, side="right") - 1

    def shares(self, samples: np.ndarray) -> np.ndarray:
        """(C,) samples of usable audio to (C,) shares of an epoch. Raises ConfigError for a corpus without any."""
        for tag, count in zip(self.tags, samples.tolist(), strict=True):
            if count == 0:
                raise ConfigError(
                    f"data.corpora: '{tag}' has no utterance of crop.min_seconds; lower that or leave the corpus out"
                )
        wanted = (samples / samples.sum()) ** self.alpha if self.weights is None else np.array(self.weights)
        return wanted / wanted.sum()

    def draws(self, usable: np.ndarray, corpus: np.ndarray, sampling_group: np.ndarray) -> np.ndarray:
        """Draws from each sampling group in an epoch, as many in all as keep the epoch's audio about as long as before.

        `usable` (n,) samples, `corpus` (n,) and `sampling_group` (n,) from 0 belong to the plan's rows. A sampling
        group lies within one corpus and gets at least one draw, so that none of its rows is left out for good. Raises
        ConfigError where a corpus gets fewer draws than it has sampling groups.
        """
        samples = np.bincount(corpus, usable, len(self.tags))
        passes = self.shares(samples) * samples.sum() / samples
        expected = np.bincount(corpus, minlength=len(self.tags)) * passes
        of_corpus = largest_remainder(expected, max(len(self.tags), round(expected.sum())))
        sizes = np.bincount(sampling_group)
        corpus_of_group = np.zeros(len(sizes), np.int64)
        corpus_of_group[sampling_group] = corpus
        counts = np.zeros(len(sizes), np.int64)
        for index, tag in enumerate(self.tags):
            mine = corpus_of_group == index
            if of_corpus[index] < mine.sum():
                raise ConfigError(
                    f"data.corpora: '{tag}' gets {of_corpus[index]} utterances an epoch for its {mine.sum()} speakers; "
                    "raise its weight or data.sampling_alpha, or leave batch.within out"
                )
            counts[mine] = largest_remainder(sizes[mine] * (of_corpus[index] / sizes[mine].sum()), of_corpus[index])
        return counts


def largest_remainder(expected: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers of at least 1 with the sum `total` that are nearest to `expected` (n,), whose sum is about that."""
    counts = np.maximum(np.floor(expected).astype(np.int64), 1)
    while missing := int(total - counts.sum()):
        owed = expected - counts
        if missing > 0:
            counts[np.argsort(-owed, kind="stable")[:missing]] += 1
        else:
            spare = np.flatnonzero(counts > 1)
            counts[spare[np.argsort(owed[spare], kind="stable")[:-missing]]] -= 1
    return counts


class Draws:
    """The draws of an epoch from sampling groups: group g has `sizes[g]` rows and is drawn from `counts[g]` times.

    All rows of a group come count // size times; the rest is a systematic sample with a random start, in which no row
    comes twice. So the number of draws never changes, and every row comes count / size times an epoch on average.
    Positions count the rows of all groups, one group after the other. `first` and `last` (M,) are the lowest and the
    highest position that a draw can give, `copies` (M,) how often its row came before in this epoch.
    """

    def __init__(self, sizes: np.ndarray, counts: np.ndarray) -> None:
        self._sizes, self._starts = sizes, np.cumsum(sizes) - sizes
        passes, self._rest = counts // sizes, counts % sizes
        group, index = _count_up(passes * sizes)
        whole = self._starts[group] + index % sizes[group]
        self._sampled, self._index = _count_up(self._rest)
        self.sampling_group = np.concatenate([group, self._sampled])
        self.first = np.concatenate([whole, self._systematic(np.zeros_like(sizes))])
        self.last = np.concatenate([whole, self._systematic(sizes - 1)])
        self.copies = np.concatenate([index // sizes[group], passes[self._sampled]])

    def positions(self, rng: np.random.Generator) -> np.ndarray:
        """(M,) positions of one epoch."""
        drawn = self.first.copy()
        drawn[len(drawn) - len(self._sampled) :] = self._systematic(rng.integers(self._sizes))
        return drawn

    def _systematic(self, starts: np.ndarray) -> np.ndarray:
        """Every (size / rest)-th position of each group, from a start in 0 to size - 1, in exact integers."""
        of = self._sampled
        return self._starts[of] + (self._index * self._sizes[of] + starts[of]) // self._rest[of]


def _count_up(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(S,) counts to s and 0, 1, ... counts[s] - 1 for every s."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
