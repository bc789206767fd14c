"""Losses of predicted against true vectors, and how much the vectors of a set differ."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def regression_sum(predictions: Tensor, targets: Tensor, beta: float) -> Tensor:
    """() float32 sum over (N, D) of squared errors where `beta` is 0, else of smooth L1 errors.

    A smooth L1 error is error ** 2 / (2 beta) below `beta`, and |error| - beta / 2 above. As data2vec's official code
    has it (`fairseq/examples/data2vec/models/data2vec_audio.py`): its 0 is a squared error without a half, which is not
    the limit of the others.
    """
    with torch.autocast(predictions.device.type, enabled=False):
        predictions, targets = predictions.float(), targets.float()
        if beta == 0:
            return F.mse_loss(predictions, targets, reduction="sum")
        return F.smooth_l1_loss(predictions, targets, reduction="sum", beta=beta)


def mean_deviation(vectors: Tensor) -> Tensor:
    """() float32 mean over D of the standard deviation over N of (N, D): sqrt(variance + 1e-6), variance unbiased.

    What the official code of data2vec calls `target_var` and `pred_var`; it falls to 0 where all vectors are alike.
    """
    return torch.sqrt(vectors.float().var(0) + 1e-6).mean()
