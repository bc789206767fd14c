"""Masks over frames, drawn on the host from an example's own generator.

Source: `compute_mask_indices` of `fairseq/data/data_utils.py` (static spans); reference sheet section 1.3.
"""

from __future__ import annotations

import numpy as np

from pretrain.errors import UserError


def span_mask(rng: np.random.Generator, frames: int, mask_prob: float, mask_length: int, min_masks: int) -> np.ndarray:
    """Frames of one row that are hidden: (frames,) bool, a union of spans of `mask_length` frames.

    The number of spans is `mask_prob * frames / mask_length`, rounded up or down at random. Starts are distinct and
    leave the last frame out, as in fairseq. A row too short for its spans gets shorter ones, where fairseq's reach the
    end and may hide every frame. Raises UserError where not even spans of one frame fit.
    """
    spans = max(min_masks, int(mask_prob * frames / mask_length + rng.random()))
    length = mask_length if frames - mask_length > spans else frames - spans - 1
    if length < 1:
        raise UserError(f"{frames} frames are too few for {spans} masked spans; raise crop.min_seconds")
    mask = np.zeros(frames, dtype=bool)
    for start in rng.choice(frames - length, size=spans, replace=False):
        mask[start : start + length] = True
    return mask


def equalise(masks: list[np.ndarray], rngs: list[np.random.Generator]) -> list[np.ndarray]:
    """Cut every row to the smallest count of masked frames, by unhiding single frames at random.

    fairseq's `require_same_masks`: the surplus frames are drawn without replacement, so spans lose single frames.
    """
    target = min(int(mask.sum()) for mask in masks)
    equal = []
    for mask, rng in zip(masks, rngs, strict=True):
        hidden = np.flatnonzero(mask)
        kept = np.zeros_like(mask)
        kept[rng.choice(hidden, size=target, replace=False)] = True
        equal.append(kept)
    return equal
