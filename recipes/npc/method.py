"""NPC's configuration, loss and prediction head.

Source: arXiv 2011.00406, section 2; `s3prl/pretrain/npc/pretrain_expert.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.features.cmvn import valid_mask
from pretrain.features.front_end import FeatureFrames
from pretrain.losses.reconstruction import l1_sum
from pretrain.method import Batch, Counts, Example, Method, Ratio, StepOutput
from pretrain.models.kernels import Linear
from pretrain.objectives.collate import stack_waveforms
from pretrain.objectives.figures import band_error_figure, band_errors, spectrogram_figure
from recipes.npc.encoder import NpcEncoder, NpcEncoderConfig


@dataclass
class NpcConfig:
    """The encoder is all there is to configure: the target is the input, the loss its absolute error."""

    name: str
    encoder: NpcEncoderConfig


@dataclass(frozen=True)
class NpcCollator(FeatureFrames):
    """Counts the frames of a batch."""

    def __call__(self, examples: list[Example]) -> Batch:
        stacked = stack_waveforms(examples)
        return stacked.batch(int(self.front_end.frames(stacked.lengths).clamp(min=1).sum()))


class Prediction(NamedTuple):
    """`frames` (B, F, dim) reconstructed; `codes` (B, F, G), None without a quantizer."""

    frames: Tensor
    codes: Tensor | None


class NpcMethod(Method):
    """Encoder and linear head; the loss is the absolute error of every frame, mean over bands. A unit is a frame."""

    Config = NpcConfig
    config: NpcConfig
    encoder: NpcEncoder

    def __init__(self, config: NpcConfig) -> None:
        super().__init__(config)
        self.encoder = NpcEncoder(config.encoder)
        self.postnet = Linear(config.encoder.hidden_size, self.encoder.front_end.dim)

    @classmethod
    def collator(cls, config: NpcConfig) -> NpcCollator:
        """The collator of this configuration."""
        return NpcCollator(config.encoder.front_end)

    def predict(self, features: Tensor, noise: list[Tensor] | None = None) -> Prediction:
        """(B, F, dim) features to what its neighbours say of each frame; `noise` goes to the quantizer."""
        hidden = self.encoder.context(features)[-1]
        if self.encoder.quantizer is None:
            return Prediction(self.postnet(hidden), None)
        chosen = self.encoder.quantize(hidden, noise)
        return Prediction(self.postnet(chosen.vectors), chosen.codes)

    def forward(self, batch: Batch) -> StepOutput:
        """`error_of_copy`, `error_of_interpolation` and `error_of_mean` are what the last frame before the blind spot,
        the mean of those on either side of it, and the utterance's mean would give.
        """
        features, frame_lengths = self.encoder.front_end(batch.waveforms, batch.lengths_if_padded)
        valid = None if frame_lengths is None else valid_mask(frame_lengths, features.shape[1])
        prediction = self.predict(features)
        units, dim = batch.sample_size, features.shape[2]
        elements = None if valid is None else valid.unsqueeze(2)
        loss = l1_sum(prediction.frames, features, elements) / dim
        metrics: dict[str, Ratio | Counts] = {
            "error": Ratio(loss.detach(), units),
            # Features have zero mean per utterance, so the mean predictor says zero.
            "error_of_mean": Ratio(l1_sum(features.new_zeros(()), features, elements) / dim, units),
            **self._neighbour_errors(features, elements),
        }
        if prediction.codes is not None:
            assert self.encoder.quantizer is not None  # it made the codes
            counts = self.encoder.quantizer.counts(prediction.codes, valid)
            metrics |= {f"codes_{group}": Counts(total) for group, total in enumerate(counts)}
        return StepOutput(loss, metrics)

    def _neighbour_errors(self, features: Tensor, elements: Tensor | None) -> dict[str, Ratio]:
        """Of the frames that have a visible frame on either side, `distance` away."""
        distance, dim = self.config.encoder.mask_size // 2 + 1, features.shape[2]
        before, target, after = (
            features[:, : -2 * distance],
            features[:, distance:-distance],
            features[:, 2 * distance :],
        )
        inner = None if elements is None else elements[:, 2 * distance :]
        frames = float(target.shape[0] * target.shape[1]) if inner is None else inner.sum()
        return {
            "error_of_copy": Ratio(l1_sum(before, target, inner) / dim, frames),
            "error_of_interpolation": Ratio(l1_sum((before + after) / 2, target, inner) / dim, frames),
        }

    def training_flops(self, samples: int) -> float:
        """Encoder and head."""
        encoder = self.encoder
        return encoder.training_flops(samples) + 6.0 * encoder.front_end.frames(samples) * self.postnet.weight.numel()

    def figures(self, batch: Batch) -> dict[str, Any]:
        """The first utterance's frames, their reconstruction, and the error in every mel band."""
        features, _ = self.encoder.front_end(batch.waveforms[:1, : int(batch.lengths[0])], None)
        target, predicted = features[0], self.predict(features).frames[0]
        guesses = {"prediction": predicted, "mean": torch.zeros_like(target)}
        return {
            "prediction": spectrogram_figure({"input and target": target, "prediction": predicted}),
            "band_error": band_error_figure({name: band_errors(guess, target) for name, guess in guesses.items()}),
        }
