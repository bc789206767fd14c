"""Telling the true target of a frame from others: wav2vec 2.0's distractors, logits and loss.

Source: arXiv 2006.11477, section 3.2; `fairseq/models/wav2vec/wav2vec2.py` (sample_negatives, compute_preds),
`fairseq/criterions/wav2vec_criterion.py`. Letters: B rows, K scored frames per row, M candidates per row, N negatives.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.errors import UserError


def draw_negatives(rng: np.random.Generator, own: np.ndarray, candidates: int, negatives: int) -> np.ndarray:
    """Which of a row's `candidates` stand against each scored frame: (K, negatives) int64, never the frame's own.

    `own` (K,) holds the candidate that is each scored frame's true target: 0 .. K - 1 where the candidates are the
    scored frames themselves (wav2vec 2.0), frame positions where they are all frames of the row (UniSpeech). Drawn
    uniformly, with replacement, as in fairseq. Raises UserError where there is nothing else to draw.
    """
    if candidates < 2:
        raise UserError(f"{candidates} masked frames leave no distractor; raise crop.min_seconds or method.mask_length")
    drawn = rng.integers(candidates - 1, size=(len(own), negatives))
    return drawn + (drawn >= own[:, None])


def contrastive_logits(
    predictions: Tensor,
    positives: Tensor,
    candidates: Tensor,
    negatives: Tensor,
    positive_entries: Tensor | None,
    candidate_entries: Tensor | None,
    logit_temp: float,
) -> Tensor:
    """Cosine similarities over a temperature, the positive first: (B, K, 1 + N) float32.

    `predictions` and `positives` are (B, K, D), `candidates` (B, M, D), `negatives` (B, K, N) int64 indices into M. A
    product of all predictions with all candidates and a choice of its entries: the official code copies every negative
    vector instead, N times the memory of the targets.

    A negative that is the same codebook entry as the positive, by the int64 numbers `positive_entries` (B, K) and
    `candidate_entries` (B, M), is no distractor and gets -inf. The official code compares the vectors bit by bit, which
    means the same.
    """
    with torch.autocast(predictions.device.type, enabled=False):
        rows = F.normalize(predictions.float(), dim=-1, eps=1e-8)
        columns = F.normalize(candidates.float(), dim=-1, eps=1e-8)
        similarities = (rows @ columns.transpose(1, 2)).gather(2, negatives)
        own = (rows * F.normalize(positives.float(), dim=-1, eps=1e-8)).sum(-1, keepdim=True)
        if positive_entries is not None and candidate_entries is not None:
            entries = candidate_entries.unsqueeze(1).expand(-1, negatives.shape[1], -1).gather(2, negatives)
            similarities = similarities.masked_fill(entries == positive_entries.unsqueeze(2), -torch.inf)
        return torch.cat([own, similarities], dim=2) / logit_temp


def contrastive_loss(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy in nats of (..., 1 + N) logits whose first column is right, and the () count of hits.

    A hit is a positive that no negative exceeds; as in fairseq a frame whose logits are all equal is none, so a network
    that maps everything to one vector does not seem to be right.
    """
    loss = -logits.log_softmax(-1)[..., 0].sum()
    positive, others = logits.detach()[..., 0], logits.detach()[..., 1:]
    hits = (positive >= others.amax(-1)) & (positive > others.amin(-1))
    return loss, hits.sum()


def guessed_hits(logits: Tensor) -> Tensor:
    """Hits that guessing among each frame's remaining logits would score on average: () of (..., 1 + N).

    The share of hits must beat this one, not 1 / (1 + N): the fewer entries a codebook uses, the more negatives fall
    away, up to all of them.
    """
    return torch.isfinite(logits).sum(-1).float().reciprocal().sum()
