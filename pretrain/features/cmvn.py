"""Mean and variance of features over each utterance's own frames."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-10


def valid_mask(frame_lengths: Tensor, frames: int) -> Tensor:
    """(B,) frame counts to (B, F) bool, True on real frames."""
    return torch.arange(frames, device=frame_lengths.device) < frame_lengths.unsqueeze(1)


def normalize_frames(features: Tensor, frame_lengths: Tensor | None) -> Tensor:
    """Zero mean and unit variance per row and dimension of (B, F, D) over its first `frame_lengths` (B,) frames.

    The variance is unbiased and 1e-10 is added to the deviation, as in s3prl's extractors; frames after the length
    become zero. `frame_lengths` None says that every frame is real.
    """
    if frame_lengths is None:
        centred = features - features.mean(1, keepdim=True)
        variance = centred.square().sum(1, keepdim=True) / max(1, features.shape[1] - 1)
        return centred / (variance.sqrt() + EPS)
    valid = valid_mask(frame_lengths, features.shape[1]).unsqueeze(2)
    count = frame_lengths.view(-1, 1, 1)
    mean = torch.where(valid, features, 0.0).sum(1, keepdim=True) / count
    centred = torch.where(valid, features - mean, 0.0)
    variance = centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + EPS)
