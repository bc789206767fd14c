"""What wav2vec 2.0 and UniSpeech share: a masked speech encoder that must name the quantized features it cannot see.

Source: arXiv 2006.11477; `fairseq/models/wav2vec/wav2vec2.py`, on which UniSpeech's official code is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pretrain.config import ConfigError
from pretrain.method import Example, Method, Progress
from pretrain.models.conv_features import ConvFrames, valid_frames
from pretrain.models.conv_features import frames as count_frames
from pretrain.models.speech_encoder import SpeechEncoder, SpeechEncoderConfig
from pretrain.objectives.collate import Stacked, stack_waveforms
from pretrain.objectives.masking import equal_span_masks
from pretrain.quantizers.gumbel import GumbelVectorQuantizer, temperature_at


@dataclass
class QuantizedTargetsConfig:
    """Published hyper-parameters; `latent_temp` is the Gumbel temperature's [start, end, decay per update]."""

    name: str
    encoder: SpeechEncoderConfig
    final_dim: int
    latent_vars: int
    latent_groups: int
    latent_dim: int
    latent_temp: list[float]
    num_negatives: int
    logit_temp: float
    mask_prob: float
    mask_length: int
    mask_min_spans: int
    dropout_features: float
    diversity_weight: float

    def __post_init__(self) -> None:
        if len(self.latent_temp) != 3:
            raise ConfigError(f"method.latent_temp: {self.latent_temp}; state start, end and decay")
        if self.latent_dim % self.latent_groups:
            raise ConfigError(
                f"method.latent_dim: {self.latent_dim} does not divide into {self.latent_groups} groups; change one"
            )
        if self.num_negatives < 1:
            raise ConfigError(f"method.num_negatives: {self.num_negatives}; a contrast needs one at least")


class Masked(NamedTuple):
    """Stacked waveforms, `valid` frames of each row, and `mask` (B, F) with K True in every row."""

    stacked: Stacked
    valid: list[int]
    mask: np.ndarray


@dataclass(frozen=True)
class MaskingCollator(ConvFrames):
    """Draws the masks of a batch; `draw` is what a method's collator begins with."""

    frame_length_rule: str
    mask_prob: float
    mask_length: int
    mask_min_spans: int
    num_negatives: int

    def draw(self, examples: list[Example]) -> Masked:
        """Stack the waveforms, and hide spans in each row by its own generator."""
        stacked = stack_waveforms(examples)
        samples, lengths = stacked.waveforms.shape[1], stacked.lengths
        frames = int(count_frames(samples, self.conv_feature_layers))
        valid = valid_frames(lengths, samples, frames, self.conv_feature_layers, self.frame_length_rule).tolist()
        rngs = [example.rng for example in examples]
        mask = equal_span_masks(rngs, valid, frames, self.mask_prob, self.mask_length, self.mask_min_spans)
        return Masked(stacked, valid, mask)


def masking_options(config: QuantizedTargetsConfig) -> dict[str, Any]:
    """The fields of `MaskingCollator` that `config` gives."""
    return {
        "conv_feature_layers": config.encoder.conv_feature_layers,
        "frame_length_rule": config.encoder.frame_length_rule,
        "mask_prob": config.mask_prob,
        "mask_length": config.mask_length,
        "mask_min_spans": config.mask_min_spans,
        "num_negatives": config.num_negatives,
    }


class QuantizedTargetsMethod(Method):
    """Encoder and quantizer, whose temperature falls from update to update."""

    config: QuantizedTargetsConfig
    encoder: SpeechEncoder

    def __init__(self, config: QuantizedTargetsConfig) -> None:
        super().__init__(config)
        self.encoder = SpeechEncoder(config.encoder)
        conv_dim = config.encoder.conv_feature_layers[-1][0]
        self.quantizer = GumbelVectorQuantizer(conv_dim, config.latent_vars, config.latent_groups, config.latent_dim)
        self.quantizer.temperature = config.latent_temp[0]

    def before_step(self, progress: Progress) -> None:
        """Set the temperature of this update, beside what every method does."""
        super().before_step(progress)
        self.quantizer.temperature = temperature_at(progress.update, *self.config.latent_temp)
