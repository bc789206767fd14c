"""WavLM: HuBERT's masked prediction with a gated relative position bias, from speech mixed with other speech and noise.

The encoder has the bias (`pretrain/models/position_bias.py`), a recipe's block `augment` the mixing
(`pretrain/data/augment/`), and the objective is HuBERT's: the labels are those of the clean primary utterance.

Source: arXiv 2110.13900; `src/fairseq/models/wavlm/wavlm.py` and `src/fairseq/criterions/wavlm_criterion.py` of
microsoft/UniSpeech.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config import ConfigError
from pretrain.objectives.masked_prediction import MaskedPrediction, MaskedPredictionConfig


@dataclass
class WavLMConfig(MaskedPredictionConfig):
    """Published hyper-parameters; see `MaskedPredictionConfig`. Raises ConfigError for an encoder without the bias."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.encoder.has_position_bias:
            raise ConfigError(
                f"method.encoder.pos_enc_type: {self.encoder.pos_enc_type}; WavLM is HuBERT with a relative position "
                "bias, so use gated_bias, or a recipe of HuBERT"
            )


class WavLMMethod(MaskedPrediction):
    """Heads and loss are those of `MaskedPrediction`; labels and masks are those of the utterance before mixing."""

    Config = WavLMConfig
    config: WavLMConfig
