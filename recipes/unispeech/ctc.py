"""CTC over frames, on the utterances of a batch that have a transcript."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor

# fairseq's Dictionary puts <s>, <pad>, </s> and <unk> before the symbols; <s> is the blank.
SPECIAL_SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>"]
BLANK = 0


def ctc_loss(logits: Tensor, frame_lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """Summed CTC loss in nats of (L, F, C) logits: () float32, zero (with a gradient) for no utterances.

    `frame_lengths` (L,) real frames; `targets` the classes of all utterances in one row, `target_lengths` (L,) of them.
    """
    log_probs = logits.float().log_softmax(-1)
    if not len(log_probs):
        return log_probs.sum()
    return F.ctc_loss(log_probs.transpose(0, 1), targets, frame_lengths, target_lengths, blank=BLANK, reduction="sum")


def symbol_errors(logits: Tensor, frame_lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> int:
    """Insertions, deletions and substitutions of the best path against the targets, over all utterances.

    Waits for the device: for validation only.
    """
    errors, paths = 0, logits.argmax(-1).cpu()
    references = targets.cpu().split(target_lengths.tolist())
    for path, frames, reference in zip(paths, frame_lengths.tolist(), references, strict=True):
        spoken = torch.unique_consecutive(path[:frames])
        errors += torchaudio.functional.edit_distance(spoken[spoken != BLANK].tolist(), reference.tolist())
    return errors


def shortest_alignment(targets: Tensor) -> int:
    """Frames that CTC needs at least for a row of targets: one each, and a blank between equal neighbours."""
    return len(targets) + int((targets[1:] == targets[:-1]).sum())
