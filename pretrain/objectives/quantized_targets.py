"""What wav2vec 2.0 and UniSpeech share: a masked speech encoder that must name the quantized features it cannot see.

Source: arXiv 2006.11477; `fairseq/models/wav2vec/wav2vec2.py`, on which UniSpeech's official code is built.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pretrain.config import MAY_BE_ZERO, ConfigError
from pretrain.method import Method, Progress
from pretrain.models.speech_encoder import SpeechEncoder, SpeechEncoderConfig
from pretrain.objectives.span_masks import SpanMaskCollator, span_mask_options
from pretrain.quantizers.gumbel import GumbelVectorQuantizer, check_codebook, temperature_at


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
    mask_min_spans: int = field(metadata=MAY_BE_ZERO)
    dropout_features: float
    diversity_weight: float

    def __post_init__(self) -> None:
        check_codebook(self.latent_temp, self.latent_groups, self.latent_dim)
        if self.num_negatives < 1:
            raise ConfigError(f"method.num_negatives: {self.num_negatives}; a contrast needs one at least")


@dataclass(frozen=True)
class MaskingCollator(SpanMaskCollator):
    """Draws the masks of a batch; distractors are the method's."""

    num_negatives: int


def masking_options(config: QuantizedTargetsConfig) -> dict[str, Any]:
    """The fields of `MaskingCollator` that `config` gives."""
    return span_mask_options(config) | {"num_negatives": config.num_negatives}


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
