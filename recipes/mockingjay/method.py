"""Mockingjay, TERA and Audio ALBERT: hear altered acoustic frames, give back the true ones.

Source: arXiv 1910.12638, 2007.06028, 2005.08575; s3prl `pretrain/mockingjay/{task,pretrain_expert}.py`.
Letters: N frames with a scored element, E bands of the target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config import ConfigError
from pretrain.features.front_end import FeatureFrames, FrontEnd, FrontEndConfig
from pretrain.losses.reconstruction import l1_sum
from pretrain.method import Batch, Example, Method, Ratio, StepOutput
from pretrain.models.kernels import LayerNorm, Linear
from pretrain.objectives.collate import stack_waveforms
from pretrain.objectives.figures import band_error_figure, band_errors, spectrogram_figure
from pretrain.objectives.masking import frames_at
from recipes.mockingjay.alterations import (
    AlterationConfig,
    alter,
    draw_alteration,
    scored_elements,
    stack_alterations,
)
from recipes.mockingjay.encoder import LAYER_NORM_EPS, MockingjayEncoder, MockingjayEncoderConfig, initialise


@dataclass
class MockingjayConfig:
    """Published hyper-parameters; `target` are the features to predict, null for those that the encoder hears."""

    name: str
    encoder: MockingjayEncoderConfig
    target: FrontEndConfig | None
    alteration: AlterationConfig

    def __post_init__(self) -> None:
        heard = self.encoder.front_end
        if self.target is None:
            return
        if self.target.dim != heard.dim and self.alteration.mask_frequency > 0:
            raise ConfigError(
                f"method.alteration.mask_frequency: the hidden bands of {heard.dim} name none of the target's "
                f"{self.target.dim}; set it to 0, or predict the features that are heard"
            )
        if any(self.target.frames(samples) != heard.frames(samples) for samples in range(400, 1200)):
            raise ConfigError("method.target: has other frames than method.encoder.front_end; take the same kind")


@dataclass(frozen=True)
class MockingjayCollator(FeatureFrames):
    """Draws what is altered; see `MockingjayMethod` for what it puts into `extras`."""

    target_dim: int
    alteration: AlterationConfig

    def __call__(self, examples: list[Example]) -> Batch:
        stacked = stack_waveforms(examples)
        frames = self.front_end.frames(stacked.waveforms.shape[1])
        valid = self.front_end.frames(stacked.lengths).tolist()
        rows = [
            draw_alteration(example.rng, count, frames, self.front_end.dim, self.alteration)
            for example, count in zip(examples, valid, strict=True)
        ]
        return stacked.batch(sum(row.scored_elements(self.target_dim) for row in rows), stack_alterations(rows))


class SpecHead(nn.Module):
    """A hidden state to a frame of features: linear, GELU, layer norm, linear."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.dense = Linear(dim, dim)
        self.layer_norm = LayerNorm(dim, LAYER_NORM_EPS)
        self.output = Linear(dim, out_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., E)."""
        return self.output(self.layer_norm(F.gelu(self.dense(hidden))))


class MockingjayMethod(Method):
    """Encoder and head; the loss is the absolute error on the elements that the alteration marks.

    Reads `batch.extras` as `alterations.stack_alterations` lists them. One unit of the loss is one element.
    """

    Config = MockingjayConfig
    config: MockingjayConfig
    encoder: MockingjayEncoder

    def __init__(self, config: MockingjayConfig) -> None:
        super().__init__(config)
        self.encoder = MockingjayEncoder(config.encoder)
        self.target = None if config.target is None else FrontEnd(config.target)
        self.target_dim = target_dim(config)
        self.spec_head = SpecHead(config.encoder.encoder_embed_dim, self.target_dim)
        initialise(self.spec_head, config.encoder.initializer_range)

    @classmethod
    def collator(cls, config: MockingjayConfig) -> MockingjayCollator:
        """The collator of this configuration."""
        return MockingjayCollator(config.encoder.front_end, target_dim(config), config.alteration)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Biases and layer norms do not decay, as in s3prl's AdamW_with_schedule; all of them are vectors."""
        decayed = [p for p in self.parameters() if p.dim() > 1]
        free = [p for p in self.parameters() if p.dim() <= 1]
        return [{"params": decayed}, {"params": free, "weight_decay": 0.0}]

    def forward(self, batch: Batch) -> StepOutput:
        """Losses per scored element, and on the same elements those of predictors that look at nothing.

        `error_of_mean` says 0, the mean of normalised features. Frames hidden whole are also counted alone, as
        `error_frames`, beside `error_frames_of_copy`, which repeats the last visible frame; the rest is `error_bands`.
        """
        features, targets, frame_lengths = self.features(batch)
        altered = alter(features, batch.extras, self.config.alteration)
        return self.reconstruct(altered, targets, frame_lengths, batch)

    def features(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the encoder hears (B, F, D), what is to be predicted (B, F, E), and the frame counts."""
        lengths = batch.lengths_if_padded
        features, frame_lengths = self.encoder.front_end(batch.waveforms, lengths)
        targets = features if self.target is None else self.target(batch.waveforms, lengths)[0]
        return features, targets, frame_lengths

    def reconstruct(self, altered: Tensor, targets: Tensor, frame_lengths: Tensor | None, batch: Batch) -> StepOutput:
        """The loss of given altered features (B, F, D) and targets (B, F, E)."""
        positions = batch.extras["scored_positions"]
        hidden = self.encoder.context(altered, frame_lengths)[-1]
        predictions = self.spec_head(frames_at(hidden, positions))
        truth = frames_at(targets, positions)
        elements = scored_elements(batch.extras, self.target_dim) if self._scores_bands else None
        loss = l1_sum(predictions, truth, elements)
        metrics = {"error": Ratio(loss.detach(), batch.sample_size)}
        with torch.no_grad():
            mean = l1_sum(torch.zeros_like(truth), truth, elements)
            metrics["error_of_mean"] = Ratio(mean, batch.sample_size)
            if self.config.alteration.mask_proportion > 0:
                metrics |= self._by_axis(predictions, truth, targets, loss, batch)
        return StepOutput(loss, metrics)

    def _by_axis(
        self, predictions: Tensor, truth: Tensor, targets: Tensor, loss: Tensor, batch: Batch
    ) -> dict[str, Ratio]:
        extras = batch.extras
        whole = extras["mask"].flatten().index_select(0, extras["scored_positions"]).unsqueeze(1)
        copied = frames_at(targets, extras["copied_positions"])
        count = whole.sum() * self.target_dim
        frames = l1_sum(predictions, truth, whole)
        metrics = {
            "error_frames": Ratio(frames, count),
            "error_frames_of_copy": Ratio(l1_sum(copied, truth, whole), count),
        }
        if self._scores_bands:
            metrics["error_bands"] = Ratio(loss.detach() - frames, batch.sample_size - count)
        return metrics

    @property
    def _scores_bands(self) -> bool:
        return self.config.alteration.mask_frequency > 0

    def training_flops(self, samples: int) -> float:
        """Encoder, and head at the scored frames, forward and backward; the features need no gradient."""
        frames, dim = self.encoder.front_end.frames(samples), self.config.encoder.encoder_embed_dim
        share = 1.0 if self._scores_bands else self.config.alteration.mask_proportion or 1.0
        head = 2.0 * share * frames * dim * (dim + self.target_dim)
        first = 2.0 * frames * self.encoder.front_end.dim * dim
        return 3 * (self.encoder.forward_flops(samples) + head) - first

    def figures(self, batch: Batch) -> dict[str, Any]:
        """The first utterance as heard, altered, predicted and true; and the error of each band over the batch."""
        features, targets, frame_lengths = self.features(batch)
        altered = alter(features, batch.extras, self.config.alteration)
        predictions = self.spec_head(self.encoder.context(altered, frame_lengths)[-1])
        positions = batch.extras["scored_positions"]
        truth = frames_at(targets, positions)
        elements = scored_elements(batch.extras, self.target_dim)
        guesses = {
            "prediction": frames_at(predictions, positions),
            "mean": torch.zeros_like(truth),
            "last visible frame": frames_at(targets, batch.extras["copied_positions"]),
        }
        if self._scores_bands:
            del guesses["last visible frame"]  # in frames that are not hidden it would copy what is to be predicted
        frames = features.shape[1] if frame_lengths is None else int(frame_lengths[0])
        panels = {"heard": features, "altered": altered, "predicted": predictions, "true": targets}
        return {
            "spectrograms": spectrogram_figure({name: panel[0, :frames] for name, panel in panels.items()}),
            "error_per_band": band_error_figure(
                {name: band_errors(guess, truth, elements) for name, guess in guesses.items()}
            ),
        }


def target_dim(config: MockingjayConfig) -> int:
    """Bands of what is predicted."""
    return (config.target or config.encoder.front_end).dim
