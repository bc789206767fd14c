"""Masked predictive coding: hear filter banks of which runs of four frames are zero, and give those back.

Source: arXiv 1910.09932; athena-team/athena `athena/models/masked_pc.py` and `athena/loss.py` (MPCLoss).
Letters: P positions of four frames in a row, N hidden ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.config import ConfigError
from pretrain.features.front_end import FeatureFrames
from pretrain.losses.reconstruction import l1_sum
from pretrain.method import Batch, Example, Method, Ratio, StepOutput
from pretrain.models.kernels import Linear
from pretrain.objectives.collate import stack_waveforms
from pretrain.objectives.figures import band_error_figure, band_errors, spectrogram_figure
from pretrain.objectives.masking import frames_at, last_visible
from recipes.mpc.encoder import SUBSAMPLING, MpcEncoder, MpcEncoderConfig


@dataclass
class MpcConfig:
    """Each run of `chunk_size` positions is hidden with probability 1 - `keep_probability`; names are athena's."""

    name: str
    encoder: MpcEncoderConfig
    chunk_size: int
    keep_probability: float

    def __post_init__(self) -> None:
        if self.chunk_size < 1 or not 0 <= self.keep_probability < 1:
            raise ConfigError(
                "method: needs chunk_size of at least 1, and 0 <= keep_probability < 1; correct the recipe"
            )


@dataclass(frozen=True)
class MpcCollator(FeatureFrames):
    """Draws what is hidden; see `MpcMethod` for what it puts into `extras`."""

    chunk_size: int
    keep_probability: float

    @property
    def stride_samples(self) -> int:
        """Samples from one position to the next."""
        return SUBSAMPLING * self.front_end.stride_samples

    @property
    def fewest_frames(self) -> int:
        """Those behind one position."""
        return SUBSAMPLING

    def __call__(self, examples: list[Example]) -> Batch:
        stacked = stack_waveforms(examples)
        frames = max(1, self.front_end.frames(stacked.waveforms.shape[1]) // SUBSAMPLING) * SUBSAMPLING
        counts = (self.front_end.frames(stacked.lengths) // SUBSAMPLING).clamp(min=1)
        masks = np.stack(
            [self._mask(example.rng, count, frames) for example, count in zip(examples, counts.tolist(), strict=True)]
        )
        hidden = np.flatnonzero(masks)
        copied = np.stack([last_visible(mask) for mask in masks]) + np.arange(len(masks))[:, None] * frames
        extras = {
            "mask": masks,
            "masked_positions": np.flatnonzero(masks[:, ::SUBSAMPLING]),
            "copied_frames": copied.ravel()[hidden],
        }
        return stacked.batch(int(counts.sum()), extras)

    def _mask(self, rng: np.random.Generator, positions: int, frames: int) -> np.ndarray:
        """(frames,) bool; where less than a chunk would be hidden on average, chunks are of one position."""
        valid, share, chunk = positions * SUBSAMPLING, 1 - self.keep_probability, self.chunk_size * SUBSAMPLING
        return chunk_mask(rng, valid, frames, SUBSAMPLING if share * valid <= chunk else chunk, share)


def chunk_mask(rng: np.random.Generator, valid: int, frames: int, chunk: int, share: float) -> np.ndarray:
    """(frames,) bool: each run of `chunk` frames among the first `valid` is hidden whole with probability `share`.

    Masked predictive coding (arXiv 1910.09932; athena `models/masked_pc.py`).
    """
    hidden = np.repeat(rng.random(-(-frames // chunk)) < share, chunk)[:frames]
    hidden[valid:] = False
    return hidden


class MpcMethod(Method):
    """Encoder and linear head; the loss is the absolute error of hidden positions, summed over their 4 x bins elements.

    A unit is a position, hidden or not, as in athena. Reads `batch.extras`: `mask` (B, 4 P) bool, True = hidden;
    `masked_positions` (N,) flat positions b * P + p; `copied_frames` (4 N,) the last visible frame, as b * 4 P + f, for
    each hidden one.
    """

    Config = MpcConfig
    config: MpcConfig
    encoder: MpcEncoder

    def __init__(self, config: MpcConfig) -> None:
        super().__init__(config)
        self.encoder = MpcEncoder(config.encoder)
        self.final_layer = Linear(config.encoder.encoder_embed_dim, SUBSAMPLING * self.encoder.front_end.dim)

    @classmethod
    def collator(cls, config: MpcConfig) -> MpcCollator:
        """The collator of this configuration."""
        return MpcCollator(config.encoder.front_end, config.chunk_size, config.keep_probability)

    def predict(self, features: Tensor, positions: Tensor | None, batch: Batch) -> Tensor:
        """(B, 4 P, bins) features, hidden where the batch says so, to what the hidden positions hold: (N, 4 * bins)."""
        heard = torch.where(batch.extras["mask"].unsqueeze(2), 0.0, features)
        hidden = self.encoder.context(heard, positions)[-1]
        return self.final_layer(frames_at(hidden, batch.extras["masked_positions"]))

    def forward(self, batch: Batch) -> StepOutput:
        """`error`, `error_of_copy` and `error_of_mean` are per hidden element: of the prediction, of the last visible
        frame, and of the utterance's mean.
        """
        features, positions = self.encoder.features(batch.waveforms, batch.lengths_if_padded)
        predictions = self.predict(features, positions, batch)
        truth, copied = self._truth(features, batch)
        loss = l1_sum(predictions, truth)
        elements = truth.numel()
        return StepOutput(
            loss,
            {
                "error": Ratio(loss.detach(), elements),
                "error_of_copy": Ratio(l1_sum(copied, truth), elements),
                # Features have zero mean per utterance, so the mean predictor says zero.
                "error_of_mean": Ratio(l1_sum(torch.zeros_like(truth), truth), elements),
            },
        )

    def _truth(self, features: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(N, 4 * bins): what hidden positions hold, and the last visible frame repeated."""
        width = SUBSAMPLING * features.shape[2]
        truth = features.reshape(-1, width).index_select(0, batch.extras["masked_positions"])
        return truth, frames_at(features, batch.extras["copied_frames"]).view(-1, width)

    def training_flops(self, samples: int) -> float:
        """Encoder, and head at the hidden positions."""
        share = (1 - self.config.keep_probability) * samples / self.encoder.stride_samples
        head = 2.0 * share * self.final_layer.in_features * self.final_layer.out_features
        return self.encoder.training_flops(samples) + 3 * head

    def figures(self, batch: Batch) -> dict[str, Any]:
        """The first utterance as it is, with frames hidden, and filled in; and the error of each band."""
        features, positions = self.encoder.features(batch.waveforms, batch.lengths_if_padded)
        predictions = self.predict(features, positions, batch)
        truth, copied = self._truth(features, batch)
        bins, chosen = features.shape[2], batch.extras["masked_positions"]
        filled = features.reshape(-1, SUBSAMPLING * bins).index_copy(0, chosen, predictions.to(features.dtype))
        heard = torch.where(batch.extras["mask"].unsqueeze(2), 0.0, features)
        frames = features.shape[1] if positions is None else SUBSAMPLING * int(positions[0])
        panels = {"true": features, "heard": heard, "filled in": filled.view_as(features)}
        guesses = {"prediction": predictions, "mean": torch.zeros_like(truth), "last visible frame": copied}
        return {
            "spectrograms": spectrogram_figure({name: panel[0, :frames] for name, panel in panels.items()}),
            "error_per_band": band_error_figure(
                {name: band_errors(guess.view(-1, bins), truth.view(-1, bins)) for name, guess in guesses.items()}
            ),
        }
