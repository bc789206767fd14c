"""s3prl's copy of fairseq's Wav2VecModel, with the weights and negatives of one of our methods; for tests alone."""

from __future__ import annotations

from dataclasses import asdict

import torch
import torch.nn.functional as F
from s3prl.upstream.wav2vec.wav2vec_model import Wav2VecConfig, Wav2VecModel
from torch import Tensor

from pretrain.interop.types import TrainedMethod
from pretrain.method import Batch
from recipes.wav2vec import interop
from recipes.wav2vec.method import Wav2VecMethod


def official(method: Wav2VecMethod, batch: Batch) -> Wav2VecModel:
    """The official model, which takes its negatives from `batch` instead of drawing them."""
    exported = interop.to_s3prl(TrainedMethod("wav2vec", asdict(method.config), method.state_dict()))
    model = Wav2VecModel(Wav2VecConfig(**exported["model_cfg"] | {"offset": "auto"}))
    model.load_state_dict(exported["model_weight"])
    offset = method.config.offset
    frames = batch.extras["candidates"].shape[1] + offset

    def sample_negatives(targets: Tensor) -> Tensor:
        """(B, C, F) targets to (N, B, C, F) negatives; the first `offset` frames are no targets, so anything does."""
        positions = F.pad(batch.extras["candidates"][:, :, 1:], (0, 0, offset, 0)) % frames
        columns = positions.permute(2, 0, 1).unsqueeze(2).expand(-1, -1, targets.shape[1], -1)
        return targets.unsqueeze(0).expand(len(columns), -1, -1, -1).gather(3, columns)

    model.wav2vec_predictions.sample_negatives = sample_negatives
    return model.train(method.training)


def by_target(flat: Tensor, batch: Batch, steps: int) -> Tensor:
    """The official model's flat logits in our order: (B, U, S, 1 + N), zero where no context frame leads."""
    rows, targets, candidates = batch.extras["candidates"].shape
    ordered = torch.zeros(rows, targets, steps, candidates)
    start = 0
    for step in range(min(steps, targets)):
        count = candidates * rows * (targets - step)
        block = flat[start : start + count].view(candidates, rows, targets - step)
        ordered[:, step:, step] = block.permute(1, 2, 0)
        start += count
    assert start == len(flat)
    return ordered
