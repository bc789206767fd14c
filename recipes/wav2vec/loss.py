"""wav2vec's prediction of the next frames: one product for all steps, logits against negatives, and the loss.

Source: arXiv 1904.05862, section 2.2; `Wav2VecPredictionsModel` in `fairseq/models/wav2vec/wav2vec.py`.
Letters: B rows, F frames, C context width, E target width, S steps, N negatives, U = F - offset target frames.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.kernels import linear


class StepPredictor(nn.Module):
    """A matrix per step and one bias for all of them: fairseq's transposed convolution, with its names and shapes."""

    def __init__(self, context_dim: int, target_dim: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.project_to_steps = nn.ConvTranspose2d(context_dim, target_dim, (1, steps))

    def forward(self, context: Tensor) -> Tensor:
        """Context frames (B, U, C) to the predictions that every target frame gets: (B, U, S, E).

        Step i of context frame t predicts target frame t + offset + i, which is entry u = t + i here; entries with
        u < i, to which no context frame leads, are zero.
        """
        weight = self.project_to_steps.weight.squeeze(2).permute(2, 1, 0).flatten(0, 1)
        bias = self.project_to_steps.bias
        assert bias is not None  # it was built with one
        predictions = linear(context, weight, bias.repeat(self.steps))
        frames = context.shape[1]
        by_target = [
            F.pad(step[:, : max(0, frames - i)], (0, 0, min(i, frames), 0))
            for i, step in enumerate(predictions.unflatten(2, (self.steps, -1)).unbind(2))
        ]
        return torch.stack(by_target, dim=2)


def candidate_logits(predictions: Tensor, targets: Tensor, candidates: Tensor) -> Tensor:
    """Products of every target frame's predictions with its candidates: (B, U, S, 1 + N).

    `predictions` is (B, U, S, E), `targets` (B, F, E), `candidates` (B, U, 1 + N) int64 flat frame positions b * F + f.
    All steps share a frame's candidates, so these are gathered once.
    """
    vectors = F.embedding(candidates, targets.flatten(0, 1))
    return predictions @ vectors.transpose(2, 3)


def step_loss(logits: Tensor, scored: Tensor) -> Tensor:
    """Summed binary cross-entropy in nats of (B, U, S, 1 + N) logits whose first column is true.

    Only where `scored` (B, U, S) is True. The negatives count as they are, as in the official code, even where a
    codebook has made one equal to the target.
    """
    positive, negatives = logits.float().split([1, logits.shape[3] - 1], dim=3)
    losses = F.softplus(-positive).squeeze(3) + F.softplus(negatives).sum(3)
    return torch.where(scored, losses, 0.0).sum()


@torch.no_grad()
def step_hits(logits: Tensor, scored: Tensor, candidates: Tensor, codes: Tensor | None) -> Tensor:
    """How many positives are above all their negatives: () float32; chance is 1 / (1 + N) of those `scored`.

    Where frames have `codes` (B, F, G), negatives with all codes of the target are the target itself: k of these leave
    the positive 1 / (1 + k) of a hit, so that a collapsed codebook gives chance, whatever rounding makes of the ties.
    """
    positive, negatives = logits.split([1, logits.shape[3] - 1], dim=3)
    if codes is None:
        return ((positive.squeeze(3) > negatives.amax(3)) & scored).float().sum()
    of_candidates = F.embedding(candidates, codes.flatten(0, 1))
    same = (of_candidates[:, :, 1:] == of_candidates[:, :, :1]).all(3).unsqueeze(2)
    above = positive.squeeze(3) > negatives.masked_fill(same, -torch.inf).amax(3)
    return (torch.where(above & scored, 1.0, 0.0) / (1 + same.sum(3))).sum()
