"""DeCoAR: give back every frame of a slice from what lies before its second and after its last but one frame.

Source: arXiv 1912.01679, section 2; lingss0918/fairseq `examples/decoar/{models/decoar,criterion/decoar_criterion}.py`.
Letters: K frames in a slice, A slices per row, H width of one direction, W hidden width of the heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config import ConfigError
from pretrain.features.cmvn import valid_mask
from pretrain.features.front_end import FeatureFrames
from pretrain.losses.reconstruction import l1_sum
from pretrain.method import Batch, Example, Method, Ratio, StepOutput
from pretrain.models.kernels import Linear
from pretrain.objectives.collate import stack_waveforms
from pretrain.objectives.figures import band_error_figure, band_errors, spectrogram_figure
from recipes.decoar.encoder import DecoarEncoder, DecoarEncoderConfig


@dataclass
class DecoarConfig:
    """`slice_size` is the distance from the first to the last frame of a slice, so that K = `slice_size` + 1.

    `reconstruction_dim` is the width of the hidden layer of each position's head.
    """

    name: str
    encoder: DecoarEncoderConfig
    slice_size: int
    reconstruction_dim: int

    def __post_init__(self) -> None:
        if self.slice_size < 2:
            raise ConfigError(f"method.slice_size: {self.slice_size} leaves no frame between the ends; give at least 2")


@dataclass(frozen=True)
class DecoarCollator(FeatureFrames):
    """Counts the slices of a batch; nothing is drawn."""

    slice_size: int

    @property
    def fewest_frames(self) -> int:
        """One slice."""
        return 1 + self.slice_size

    def __call__(self, examples: list[Example]) -> Batch:
        stacked = stack_waveforms(examples)
        slices = (self.front_end.frames(stacked.lengths) - self.slice_size).clamp(min=0)
        return stacked.batch(int(slices.sum()))


class SliceHead(nn.Module):
    """One network per position of the slice: linear, ReLU, linear; all positions in two products."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int, positions: int) -> None:
        super().__init__()
        self.positions = positions
        self.proj1 = Linear(dim, positions * hidden_dim)
        # The range of nn.Linear's start; its own would count every position's inputs.
        bound = 1 / math.sqrt(hidden_dim)
        self.weight2 = nn.Parameter(torch.empty(positions, hidden_dim, out_dim).uniform_(-bound, bound))
        self.bias2 = nn.Parameter(torch.empty(positions, out_dim).uniform_(-bound, bound))

    def forward(self, ends: Tensor) -> Tensor:
        """(B, A, dim) to the slices (B, A, K, out_dim)."""
        hidden = F.relu(self.proj1(ends)).flatten(0, 1).unflatten(1, (self.positions, -1)).transpose(0, 1)
        out = torch.bmm(hidden, self.weight2.to(hidden.dtype)) + self.bias2.unsqueeze(1)
        return out.transpose(0, 1).unflatten(0, ends.shape[:2])


class DecoarMethod(Method):
    """Encoder and heads; the loss is the absolute error of a slice, mean over its frames and bands.

    A unit is a slice. Nothing is read from `batch.extras`.
    """

    Config = DecoarConfig
    config: DecoarConfig
    encoder: DecoarEncoder

    def __init__(self, config: DecoarConfig) -> None:
        super().__init__(config)
        self.encoder = DecoarEncoder(config.encoder)
        width = 2 * config.encoder.hidden_size
        self.head = SliceHead(width, config.reconstruction_dim, self.encoder.front_end.dim, config.slice_size + 1)

    @classmethod
    def collator(cls, config: DecoarConfig) -> DecoarCollator:
        """The collator of this configuration."""
        return DecoarCollator(config.encoder.front_end, config.slice_size)

    def predict(self, features: Tensor, frame_lengths: Tensor | None) -> Tensor:
        """(B, F, dim) features to the slices (B, F - K + 1, K, dim) that begin at each frame.

        The forward state is that of the slice's first frame, the backward state that of its last.
        """
        ahead, behind = self.encoder.context(features, frame_lengths)[-1].chunk(2, dim=2)
        size = self.config.slice_size
        return self.head(torch.cat([ahead[:, :-size], behind[:, size:]], dim=2))

    def forward(self, batch: Batch) -> StepOutput:
        """`error_of_mean` is what the utterance's mean would give. The ends of a slice are heard; the frames in between
        are counted alone, as `error_unseen`, beside `error_unseen_of_copy`, which repeats the nearer end.
        """
        features, frame_lengths = self.encoder.front_end(batch.waveforms, batch.lengths_if_padded)
        units, size = batch.sample_size, self.config.slice_size
        predictions, truth = self.predict(features, frame_lengths), slices_of(features, size)
        valid = None
        if frame_lengths is not None:
            valid = valid_mask((frame_lengths - size).clamp(min=0), truth.shape[1])[:, :, None, None]
        loss = l1_sum(predictions, truth, valid) / truth[0, 0].numel()
        with torch.no_grad():
            unseen = truth[:, :, 1:-1]
            count = unseen[0, 0].numel()
            metrics = {
                "error": Ratio(loss.detach(), units),
                "error_of_mean": Ratio(l1_sum(torch.zeros_like(truth), truth, valid) / truth[0, 0].numel(), units),
                "error_unseen": Ratio(l1_sum(predictions[:, :, 1:-1], unseen, valid) / count, units),
                "error_unseen_of_copy": Ratio(l1_sum(nearer_end(truth)[:, :, 1:-1], unseen, valid) / count, units),
            }
        return StepOutput(loss, metrics)

    def training_flops(self, samples: int) -> float:
        """Encoder, and the heads at every slice."""
        config, dim = self.config, self.encoder.front_end.dim
        slices = max(0, self.encoder.front_end.frames(samples) - config.slice_size)
        head = 2.0 * (config.slice_size + 1) * config.reconstruction_dim * (2 * config.encoder.hidden_size + dim)
        return self.encoder.training_flops(samples) + 3 * slices * head

    def figures(self, batch: Batch) -> dict[str, Any]:
        """The frames in the middle of their slices, true and predicted; and the error of each band there."""
        features, frame_lengths = self.encoder.front_end(batch.waveforms[:1], batch.lengths[:1])
        frames, middle = int(frame_lengths[0]), (self.config.slice_size + 1) // 2
        predictions = self.predict(features[:, :frames], None)[0, :, middle]
        truth = slices_of(features[:, :frames], self.config.slice_size)[0, :, middle]
        guesses = {"prediction": predictions, "mean": torch.zeros_like(truth)}
        return {
            "middle_of_slice": spectrogram_figure({"true": truth, "predicted": predictions}),
            "error_per_band": band_error_figure({name: band_errors(guess, truth) for name, guess in guesses.items()}),
        }


def slices_of(features: Tensor, size: int) -> Tensor:
    """(B, F, D) to a view (B, F - size, size + 1, D): the slice that begins at each frame."""
    return features.unfold(1, size + 1, 1).transpose(2, 3)


def nearer_end(slices: Tensor) -> Tensor:
    """(B, A, K, D) slices with the first frame in their first half, and the last one in the other."""
    half = slices.shape[2] // 2
    first, last = slices[:, :, :1], slices[:, :, -1:]
    return torch.cat([first.expand(-1, -1, half, -1), last.expand(-1, -1, slices.shape[2] - half, -1)], dim=2)
