"""Few lengths for many utterances: buckets of similar length, and the cutting of sorted rows into micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_BUCKETS = 32


@dataclass(frozen=True)
class Buckets:
    """`sizes` (K,) samples, ascending, and `of_row` (n,), the bucket of each row.

    A bucket's size is the length to which its rows are cropped or, with `whole` utterances, padded.
    """

    sizes: np.ndarray
    of_row: np.ndarray
    whole: bool

    @classmethod
    def of_lengths(cls, usable: np.ndarray, stride: int, receptive_field: int, whole: bool) -> Buckets:
        """At most 33 buckets at the quantiles of (n,) `usable` samples.

        A row's bucket has the longest crop on the grid of `stride` that the row allows, or with `whole` it is the
        smallest that holds all of the row.
        """
        quantiles = np.linspace(0, 1, MAX_BUCKETS + 1)
        if whole:
            sizes = np.unique(np.quantile(usable, quantiles, method="higher"))
            return cls(sizes, np.searchsorted(sizes, usable, side="left").astype(np.int8), whole)
        on_grid = usable - (usable - receptive_field) % stride
        sizes = np.unique(np.quantile(on_grid, quantiles, method="lower"))
        return cls(sizes, (np.searchsorted(sizes, on_grid, side="right") - 1).astype(np.int8), whole)

    def keys(self, group: np.ndarray | int, bucket: np.ndarray) -> np.ndarray:
        """Integers that sort by group and then from long to short."""
        return group * len(self.sizes) + (len(self.sizes) - 1 - bucket.astype(np.int64))

    def bucket_of(self, keys: np.ndarray) -> np.ndarray:
        """The buckets in (n,) keys."""
        return len(self.sizes) - 1 - keys % len(self.sizes)

    def fitting(self, crop_samples: int) -> np.ndarray:
        """(n,) bool: rows that a micro-batch of `crop_samples` can hold."""
        sizes = self.sizes[self.of_row]
        return sizes <= crop_samples if self.whole else sizes >= crop_samples

    def cut(self, keys: np.ndarray, budget_samples: int) -> tuple[np.ndarray, np.ndarray]:
        """Borders (b + 1,) of micro-batches in sorted (n,) keys, and the crop (b,) of each.

        A micro-batch keeps to one group, and its longest row times its rows fits the budget, as in fairseq.
        """
        group, sizes = keys // len(self.sizes), self.sizes[self.bucket_of(keys)]
        bounds = [0]
        for end in [*(np.flatnonzero(np.diff(group)) + 1).tolist(), len(sizes)]:
            while bounds[-1] < end:
                bounds.append(min(end, bounds[-1] + max(1, int(budget_samples // sizes[bounds[-1]]))))
        borders = np.array(bounds)
        return borders, sizes[borders[:-1] if self.whole else borders[1:] - 1]
