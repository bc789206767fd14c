"""Prediction of cluster labels from cosine logits. Source: HuBERT (arXiv 2106.07447, section III-B)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_logits(projected: Tensor, codebook: Tensor, logit_temp: float) -> Tensor:
    """Cosine similarity of (N, P) projected frames to a (V, P) codebook, over a temperature: (N, V) float32.

    One matrix product of normalised rows; equal to the official code, which stacks the positive before all classes
    and masks its duplicate (`compute_nce` in `fairseq/models/hubert/hubert.py`).
    """
    with torch.autocast(projected.device.type, enabled=False):
        rows = F.normalize(projected.float(), dim=-1, eps=1e-8)
        classes = F.normalize(codebook.float(), dim=-1, eps=1e-8)
        return rows @ classes.T / logit_temp


def prediction_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy in nats of (N, V) logits against (N,) targets, and the () count of right answers.

    Targets of -1 are not scored.
    """
    loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    correct = (logits.detach().argmax(dim=-1) == targets).sum()
    return loss, correct


def class_histogram(classes: Tensor, size: int) -> Tensor:
    """Counts of (N,) class ids, (size,) float32, without asking the device for its maximum as bincount does."""
    counts = torch.zeros(size, device=classes.device)
    return counts.index_add_(0, classes, torch.ones_like(classes, dtype=counts.dtype))
