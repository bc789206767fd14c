"""DeCoAR 2.0: give back hidden filter-bank frames from the codes of what the encoder makes of the others.

Source: arXiv 2012.06659; lingss0918/fairseq, `fairseq/models/wav2vec/decoar.py` of September 2020 (commit 383b657d) and
`examples/decoar/models/decoar2.py` of June 2021. README.md says which of them decides what.
Letters: N hidden frames, G groups and V entries of the codebook.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config import MAY_BE_ZERO, ConfigError
from pretrain.features.front_end import FeatureFrames
from pretrain.losses.reconstruction import l1_sum
from pretrain.method import Batch, Counts, Example, Method, Metric, Progress, Ratio, StepOutput
from pretrain.models.kernels import Linear
from pretrain.objectives.collate import stack_waveforms
from pretrain.objectives.figures import band_error_figure, band_errors, spectrogram_figure
from pretrain.objectives.masking import frames_at, last_visible, separate_span_mask
from pretrain.quantizers.gumbel import GumbelVectorQuantizer, Quantized, check_codebook, temperature_at
from recipes.decoar2.encoder import Decoar2Encoder, Decoar2EncoderConfig


@dataclass
class Decoar2Config:
    """Spans of `mask_length` frames over `mask_prob` of a row, at least `mask_min_spans`, `mask_min_space` apart.

    `latent_temp` is the Gumbel temperature's [start, end, decay per update]; `reconstruction_dim` the width of the
    hidden layer between codes and bands.
    """

    name: str
    encoder: Decoar2EncoderConfig
    mask_prob: float
    mask_length: int
    mask_min_spans: int
    mask_min_space: int = field(metadata=MAY_BE_ZERO)
    latent_vars: int
    latent_groups: int
    latent_dim: int
    latent_temp: list[float]
    reconstruction_dim: int
    diversity_weight: float

    def __post_init__(self) -> None:
        check_codebook(self.latent_temp, self.latent_groups, self.latent_dim)
        if not 0 < self.mask_prob < 1 or self.mask_length < 1 or self.mask_min_spans < 1 or self.mask_min_space < 0:
            raise ConfigError(
                "method: needs 0 < mask_prob < 1, mask_length and mask_min_spans of at least 1, and mask_min_space of "
                "at least 0; correct the recipe"
            )


@dataclass(frozen=True)
class Decoar2Collator(FeatureFrames):
    """Draws which frames are hidden; see `Decoar2Method` for what it puts into `extras`."""

    mask_prob: float
    mask_length: int
    mask_min_spans: int
    mask_min_space: int

    @property
    def fewest_frames(self) -> int:
        """One that is hidden and one that is seen."""
        return 2

    def __call__(self, examples: list[Example]) -> Batch:
        stacked = stack_waveforms(examples)
        masks = np.zeros((len(examples), self.front_end.frames(stacked.waveforms.shape[1])), dtype=bool)
        for mask, example, valid in zip(masks, examples, self.front_end.frames(stacked.lengths).tolist(), strict=True):
            mask[:valid] = separate_span_mask(
                example.rng, valid, self.mask_prob, self.mask_length, self.mask_min_spans, self.mask_min_space
            )
        positions = np.flatnonzero(masks)
        offsets = np.arange(len(masks))[:, None] * masks.shape[1]
        copied = (np.stack([last_visible(mask) for mask in masks]) + offsets).ravel()[positions]
        extras = {"mask": masks, "masked_positions": positions, "copied_positions": copied}
        return stacked.batch(len(positions), extras)


class Reconstruction(nn.Module):
    """Codes to a frame of features: linear, ReLU, linear."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, out_dim)

    def forward(self, codes: Tensor) -> Tensor:
        """(..., D) to (..., dim)."""
        return self.fc2(F.relu(self.fc1(codes)))


class Decoar2Method(Method):
    """Encoder, quantizer and reconstruction; the loss is the absolute error of hidden frames, mean over bands.

    A unit is a hidden frame. Reads `batch.extras`: `mask` (B, F) bool, True = hidden; `masked_positions` (N,) flat
    positions b * F + f of hidden frames, and `copied_positions` (N,) the last visible frame for each of them.
    """

    Config = Decoar2Config
    config: Decoar2Config
    encoder: Decoar2Encoder

    def __init__(self, config: Decoar2Config) -> None:
        super().__init__(config)
        self.encoder = Decoar2Encoder(config.encoder)
        dim, width = self.encoder.front_end.dim, config.encoder.encoder_embed_dim
        self.mask_emb = nn.Parameter(torch.empty(dim).uniform_())
        self.quantizer = GumbelVectorQuantizer(width, config.latent_vars, config.latent_groups, config.latent_dim)
        self.quantizer.temperature = config.latent_temp[0]
        self.reconstruction = Reconstruction(config.latent_dim, config.reconstruction_dim, dim)

    @classmethod
    def collator(cls, config: Decoar2Config) -> Decoar2Collator:
        """The collator of this configuration."""
        return Decoar2Collator(
            config.encoder.front_end,
            config.mask_prob,
            config.mask_length,
            config.mask_min_spans,
            config.mask_min_space,
        )

    def before_step(self, progress: Progress) -> None:
        """Set the temperature of this update, beside what every method does."""
        super().before_step(progress)
        self.quantizer.temperature = temperature_at(progress.update, *self.config.latent_temp)

    def hide(self, features: Tensor, mask: Tensor) -> Tensor:
        """(B, F, dim) features with the mask vector in place of the frames where `mask` (B, F) is True."""
        return torch.where(mask.unsqueeze(2), self.mask_emb.to(features.dtype), features)

    def predict(self, features: Tensor, frame_lengths: Tensor | None, batch: Batch) -> tuple[Tensor, Quantized]:
        """What the hidden frames of (B, F, dim) features are thought to be, (N, dim), and the codes behind that."""
        hidden = self.encoder.context(self.hide(features, batch.extras["mask"]), frame_lengths)[-1]
        masked = frames_at(hidden, batch.extras["masked_positions"])
        quantized = self.quantizer(masked)
        return self.reconstruction(quantized.vectors), quantized

    def forward(self, batch: Batch) -> StepOutput:
        """`error` is that of the hidden frames; `error_of_copy` and `error_of_mean` are what the last visible frame,
        and the utterance's mean, would give.
        """
        features, frame_lengths = self.encoder.front_end(batch.waveforms, batch.lengths_if_padded)
        predictions, quantized = self.predict(features, frame_lengths, batch)
        frames, units = features.flatten(0, 1), batch.sample_size
        truth = frames.index_select(0, batch.extras["masked_positions"])
        copied = frames.index_select(0, batch.extras["copied_positions"])
        dim = truth.shape[1]
        reconstruction = l1_sum(predictions, truth) / dim
        entries = self.config.latent_groups * self.config.latent_vars
        diversity = self.config.diversity_weight * (entries - quantized.prob_perplexity) / entries
        metrics: dict[str, Metric] = {
            "loss_reconstruction": Ratio(reconstruction.detach(), units),
            "loss_diversity": Ratio.of_mean(diversity, units),
            "error": Ratio(reconstruction.detach(), units),
            "error_of_copy": Ratio(l1_sum(copied, truth) / dim, units),
            # Features have zero mean per utterance, so the mean predictor says zero.
            "error_of_mean": Ratio(l1_sum(torch.zeros_like(truth), truth) / dim, units),
            "prob_perplexity": Ratio(quantized.prob_perplexity.detach(), 1.0),
            "temperature": Ratio(diversity.new_full((), self.quantizer.temperature), 1.0),
        }
        for group, counts in enumerate(quantized.counts):
            metrics[f"codes_{group}"] = Counts(counts)
        return StepOutput(reconstruction, metrics, mean=diversity)

    def training_flops(self, samples: int) -> float:
        """Encoder, and quantizer and reconstruction at the hidden frames."""
        config = self.config
        scored = config.mask_prob * self.encoder.front_end.frames(samples)
        entries = config.latent_groups * config.latent_vars
        per_frame = config.encoder.encoder_embed_dim * entries + entries * config.latent_dim // config.latent_groups
        per_frame += config.reconstruction_dim * (config.latent_dim + self.encoder.front_end.dim)
        return self.encoder.training_flops(samples) + 3 * 2 * scored * per_frame

    def figures(self, batch: Batch) -> dict[str, Any]:
        """The first utterance as it is, with frames hidden, and filled in; and the error of each band."""
        features, frame_lengths = self.encoder.front_end(batch.waveforms, batch.lengths_if_padded)
        positions = batch.extras["masked_positions"]
        predictions, _ = self.predict(features, frame_lengths, batch)
        truth = frames_at(features, positions)
        filled = features.flatten(0, 1).index_copy(0, positions, predictions.to(features.dtype)).view_as(features)
        frames = features.shape[1] if frame_lengths is None else int(frame_lengths[0])
        panels = {"true": features, "heard": self.hide(features, batch.extras["mask"]), "filled in": filled}
        copied = frames_at(features, batch.extras["copied_positions"])
        guesses = {"prediction": predictions, "mean": torch.zeros_like(truth), "last visible frame": copied}
        return {
            "spectrograms": spectrogram_figure(
                {name: panel[0, :frames] for name, panel in panels.items()}, self.encoder.stride_samples / 16_000
            ),
            "error_per_band": band_error_figure({name: band_errors(guess, truth) for name, guess in guesses.items()}),
        }
