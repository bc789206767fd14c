"""DeCoAR 2.0's network: every second filter-bank frame into wav2vec 2.0's Transformer.

Source: arXiv 2012.06659, section 2; lingss0918/fairseq `examples/decoar/models/decoar2.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pretrain.features.front_end import FrontEndConfig
from pretrain.models.context import ContextEncoder, ContextNetwork
from pretrain.models.kernels import Linear, dropout
from pretrain.models.predictive_encoder import PredictiveEncoder


@dataclass
class Decoar2EncoderConfig:
    """Names are fairseq's; `dropout_input` follows the projection of the frames."""

    front_end: FrontEndConfig
    encoder_layers: int
    encoder_embed_dim: int
    encoder_ffn_embed_dim: int
    encoder_attention_heads: int
    conv_pos: int
    conv_pos_groups: int
    dropout: float
    attention_dropout: float
    activation_dropout: float
    dropout_input: float
    encoder_layerdrop: float

    # What every version of DeCoAR 2.0 has of `ContextNetwork`'s choices.
    layer_norm_first: ClassVar[bool] = False
    pos_enc_type: ClassVar[str] = "abs"
    is_conformer: ClassVar[bool] = False
    depthwise_conv_kernel_size: ClassVar[int] = 0
    pos_conv_depth: ClassVar[int] = 1
    num_buckets: ClassVar[int] = 0
    max_distance: ClassVar[int] = 0


class Decoar2Encoder(PredictiveEncoder, ContextEncoder):
    """Waveforms to L + 1 hidden states: the input of every layer, then the output of the last."""

    Config = Decoar2EncoderConfig
    config: Decoar2EncoderConfig
    weight_independent_fields = (
        "dropout",
        "attention_dropout",
        "activation_dropout",
        "dropout_input",
        "encoder_layerdrop",
    )

    def __init__(self, config: Decoar2EncoderConfig) -> None:
        super().__init__(config.front_end, None, config.encoder_embed_dim, config.encoder_layers + 1)
        self.config = config
        self.post_extract_proj = Linear(self.front_end.dim, config.encoder_embed_dim)
        self.encoder = ContextNetwork(config)

    def context(self, features: Tensor, frame_lengths: Tensor | None) -> list[Tensor]:
        """(B, F, dim) features, `frame_lengths` (B,) of them real (None: all), to L + 1 hidden states (B, F, D)."""
        x = dropout(self.post_extract_proj(features), self.config.dropout_input, self.training)
        return self.encoder(x, frame_lengths)

    def training_flops(self, samples: int) -> float:
        """Forward and backward of one waveform of `samples`; the features themselves need no gradient."""
        config, dim, frames = self.config, self.config.encoder_embed_dim, self.front_end.frames(samples)
        first = 2.0 * frames * self.front_end.dim * dim
        positions = 2.0 * frames * dim * (dim // config.conv_pos_groups) * config.conv_pos
        linear = 2.0 * frames * (4 * dim * dim + 2 * dim * config.encoder_ffn_embed_dim)
        attention = 4.0 * frames * frames * dim
        # The mask vector takes part in the first product, so that some of its gradient is needed, but only there.
        return 3 * (first + positions + config.encoder_layers * (linear + attention)) - first
