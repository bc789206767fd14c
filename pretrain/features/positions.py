"""Frames of a front end, cut to the positions of a network that makes one position of several frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.features.cmvn import valid_mask


def whole_positions(
    features: Tensor, frame_lengths: Tensor | None, frames_per_position: int
) -> tuple[Tensor, Tensor | None]:
    """(B, T, D) frames to (B, n P, D), n = `frames_per_position`, and the (B,) positions of each row.

    Frames beyond a multiple of n are left out and are zero in a padded row, and a row of fewer than n is filled up with
    zeros. `frame_lengths` (B,) None says that nothing is padded; the positions are None then.
    """
    n = frames_per_position
    frames = max(1, features.shape[1] // n) * n
    features = F.pad(features, (0, 0, 0, frames - features.shape[1]))
    if frame_lengths is None:
        return features, None
    positions = (frame_lengths // n).clamp(min=1)
    return torch.where(valid_mask(n * positions, frames).unsqueeze(2), features, 0.0), positions
