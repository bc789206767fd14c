"""The utterance-wise contrastive loss: does a quantized frame come from the same utterance as this frame?

Source: `compute_pred_spk` in `src/fairseq/models/unispeech_sat/unispeech_sat.py` of microsoft/UniSpeech. The paper
(arXiv 2110.05752, section 3.1) has a softmax over candidates instead. Letters: N masked frames of all rows of a
micro-batch, M instances per frame, P projection width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.losses.contrastive import contrastive_logits


class Contrast(NamedTuple):
    """`loss` () float32 with gradient: the mean binary cross-entropy of all pairs of a frame and a candidate, in nats.

    The rest is () float32 without gradient. `loss_of_share` is the loss of a predictor that knows a frame's own target
    and which share of the instances is from the same utterance, and no more; `accuracy` the share of pairs whose logit
    has the right sign and `chance` that predictor's; `share` the share of pairs that are of one utterance.
    """

    loss: Tensor
    loss_of_share: Tensor
    accuracy: Tensor
    chance: Tensor
    share: Tensor


def instance_logits(predictions: Tensor, targets: Tensor, instances: Tensor, logit_temp: float) -> Tensor:
    """Cosines of each frame with its own target and with its instances, over a temperature: (N, 1 + M) float32.

    `predictions` and `targets` are (N, P), `instances` (N, M) int64 indices of targets. Instances that equal the own
    target stay: they are answers as good as it where they come from the same utterance.
    """
    one_row = (predictions[None], targets[None], targets[None], instances[None])
    return contrastive_logits(*one_row, None, None, logit_temp)[0]


def utterance_contrast(logits: Tensor, rows: Tensor, instances: Tensor) -> Contrast:
    """The loss of (N, 1 + M) `logits`, where `rows` (N,) int64 says which utterance each frame is of.

    Rows may have different numbers of frames.
    """
    same = rows[instances] == rows.unsqueeze(1)
    answers = torch.cat([torch.ones_like(same[:, :1]), same], dim=1)
    loss = F.binary_cross_entropy_with_logits(logits, answers.float())
    accuracy = ((logits.detach() >= 0) == answers).float().mean()
    share = same.float().mean()
    guessed = same.shape[1] / answers.shape[1]  # the share of pairs that are not a frame's own target
    entropy = torch.special.entr(share) + torch.special.entr(1 - share)
    chance = 1 - guessed * torch.minimum(share, 1 - share)
    return Contrast(loss, guessed * entropy, accuracy, chance, answers.float().mean())
