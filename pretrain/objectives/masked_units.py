"""Batches for methods that predict the cluster of every masked frame: spans to hide, and the labels of each frame.

Source: fairseq's `hubert_dataset.py` and `forward_targets` of `hubert.py`. Letters: S label sets, B rows, F frames,
N masked and M unmasked frames of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np

from pretrain.method import Batch, Example
from pretrain.objectives.collate import Stacked, frame_labels
from pretrain.objectives.span_masks import SpanMaskCollator


@dataclass(frozen=True)
class MaskedUnitsCollator(SpanMaskCollator):
    """Draws the masks and cuts the labels of a batch; see `MaskedPrediction` for what it puts into `extras`."""

    label_rates_hz: tuple[int, ...]
    scores_unmasked: bool

    def __call__(self, examples: list[Example]) -> Batch:
        labels = [self._row_labels(example, self.frames(examples)) for example in examples]
        frames = min(row.shape[1] for row in labels)
        drawn = self.draw(examples, frames)
        return make_batch(
            drawn.stacked,
            labels=np.stack([row[:, :frames] for row in labels], axis=1),
            mask=drawn.mask,
            valid=np.arange(frames) < np.array(drawn.valid)[:, None],
            scores_unmasked=self.scores_unmasked,
        )

    def _row_labels(self, example: Example, frames: int) -> np.ndarray:
        """(S, F) labels of one crop, cut to the shortest label set."""
        # Frame labels are those of the whole utterance, never None.
        given = [cast(np.ndarray, example.targets[f"labels_{i}"]) for i in range(len(self.label_rates_hz))]
        cut = [
            frame_labels(labels, rate, example.start, self.stride_samples, frames)
            for labels, rate in zip(given, self.label_rates_hz, strict=True)
        ]
        shortest = min(len(line) for line in cut)
        return np.stack([line[:shortest] for line in cut])


def make_batch(
    stacked: Stacked,
    *,
    labels: np.ndarray,
    mask: np.ndarray,
    valid: np.ndarray,
    scores_unmasked: bool,
) -> Batch:
    """Assemble a batch from (S, B, F) labels, (B, F) mask and (B, F) valid.

    Scored frames travel as flat positions b * F + f, so that nothing on the device has to count them.
    """
    flat_labels = labels.reshape(len(labels), -1).astype(np.int64)
    masked, unmasked = np.flatnonzero(mask & valid), np.flatnonzero(~mask & valid)
    extras = {
        "mask": mask,
        "masked_positions": masked,
        "masked_labels": flat_labels[:, masked],
        "unmasked_positions": unmasked,
        "unmasked_labels": flat_labels[:, unmasked],
    }
    return stacked.batch(len(masked) + (len(unmasked) if scores_unmasked else 0), extras)
