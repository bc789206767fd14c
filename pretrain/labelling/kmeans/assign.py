"""Nearest centroid, as fairseq's `dump_km_label.py` finds it, in blocks on the device of the features."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_FRAMES = 16384


def nearest_centroids(features: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """(F, D) and (K, D) float32 to the (F,) int64 nearest centroid and the (F,) float32 squared distance to it.

    The argmin of |x|^2 - 2 x C + |C|^2 in float32; ties go to the lowest index.
    """
    norms = centroids.square().sum(dim=1)
    units = torch.empty(len(features), dtype=torch.int64, device=features.device)
    distances = torch.empty(len(features), dtype=torch.float32, device=features.device)
    with torch.autocast(features.device.type, enabled=False):
        for start in range(0, len(features), BLOCK_FRAMES):
            block = features[start : start + BLOCK_FRAMES].float()
            squared = block.square().sum(dim=1, keepdim=True) - 2 * block @ centroids.T + norms
            units[start : start + BLOCK_FRAMES] = squared.argmin(dim=1)
            nearest = squared.amin(dim=1).clamp(min=0)  # rounding can push a frame on a centroid below zero
            distances[start : start + BLOCK_FRAMES] = nearest
    return units, distances
