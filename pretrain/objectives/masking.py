"""Masks over frames, drawn on the host from an example's own generator.

Source: `compute_mask_indices` of `fairseq/data/data_utils.py` (static spans).
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

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


def separate_span_mask(
    rng: np.random.Generator, frames: int, mask_prob: float, mask_length: int, min_masks: int, min_space: int
) -> np.ndarray:
    """Frames of one row that are hidden: (frames,) bool, spans of `mask_length` with `min_space` or more in between.

    As many spans as in `span_mask`, all arrangements equally likely; fairseq's `no_overlap` puts one span after the
    other into what is left. A row too short for its spans gets fewer, and one too short for a span a shorter one, which
    leaves a frame. Raises UserError for a row of one frame.
    """
    if frames < 2:
        raise UserError(f"{frames} frame is too few for a masked span; raise crop.min_seconds")
    length = min(mask_length, frames - 1)
    spans = max(min_masks, int(mask_prob * frames / mask_length + rng.random()))
    # One frame more than the spans and the spaces between them, so that never all of a row is hidden.
    spans = max(1, min(spans, (frames - 1 + min_space) // (length + min_space)))
    free = frames - spans * length - (spans - 1) * min_space
    order = np.arange(spans)
    starts = np.sort(rng.choice(free + spans, size=spans, replace=False)) - order + order * (length + min_space)
    mask = np.zeros(frames, dtype=bool)
    mask[(starts[:, None] + np.arange(length)).ravel()] = True
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


def equal_span_masks(
    rngs: list[np.random.Generator],
    valid: list[int],
    frames: int,
    mask_prob: float,
    mask_length: int,
    min_masks: int,
) -> np.ndarray:
    """The hidden frames of a batch: (B, frames) bool, equally many per row, none beyond a row's `valid` frames."""
    masks = []
    for rng, count in zip(rngs, valid, strict=True):
        mask = np.zeros(frames, dtype=bool)
        mask[:count] = span_mask(rng, count, mask_prob, mask_length, min_masks)
        masks.append(mask)
    return np.stack(equalise(masks, rngs))


def last_visible(mask: np.ndarray) -> np.ndarray:
    """(F,) for each frame the last one up to it that `mask` (F,) leaves visible; the first visible where none is."""
    visible = np.flatnonzero(~mask)
    if not len(visible):
        return np.zeros(len(mask), dtype=np.int64)
    return visible[np.maximum(np.searchsorted(visible, np.arange(len(mask)), side="right") - 1, 0)]


def frames_at(frames: Tensor, positions: Tensor) -> Tensor:
    """The frames (N, D) of (B, F, D) that lie at flat `positions` (N,), b * F + f.

    Collators list them so, so that nothing on the device has to count how many frames a mask hides.
    """
    return frames.flatten(0, 1).index_select(0, positions)
