"""Losses of predicted against true features."""

from __future__ import annotations

import torch
from torch import Tensor


def l1_sum(predictions: Tensor, targets: Tensor, elements: Tensor | None = None) -> Tensor:
    """() float32 sum of absolute errors over (N, D), or over those that `elements` (N, D) or (N, 1) bool marks."""
    with torch.autocast(predictions.device.type, enabled=False):
        errors = (predictions.float() - targets.float()).abs()
        return errors.sum() if elements is None else (errors * elements).sum()
