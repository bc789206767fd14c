"""Shape and regularisation of the shared speech encoder."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.errors import UserError

EXTRACTOR_MODES = ("default", "layer_norm")
FRAME_LENGTH_RULES = ("fold", "conv")
# Layer type -> how its layers learn positions.
POSITIONS = {"transformer": ("abs", "gated_bias"), "conformer": ("rel_pos", "rope")}


@dataclass
class SpeechEncoderConfig:
    """Shape and regularisation of a speech encoder; the names are fairseq's, the values the recipe's.

    `conv_feature_layers` lists (dim, kernel, stride); `extractor_mode` "default" has a group norm after the first of
    them, "layer_norm" a layer norm after every one. `normalize` brings each waveform to zero mean and unit variance
    over its own samples. `frame_length_rule` says which frames of a padded waveform are real: "conv" the exact count
    (wav2vec 2.0, data2vec, transformers), "fold" fairseq's HuBERT and WavLM rule (a frame is padding only if all
    samples of its stride are).

    `conv_pos` is the number of frames that the positional convolution sees, `pos_conv_depth` the number of convolutions
    that share it (data2vec: 5 of 19 frames); one has a weight norm, several have layer norms.

    `layer_type` "transformer" goes with `pos_enc_type` "abs", the positional convolution, or "gated_bias", WavLM's: the
    convolution and, in the attention of every layer, a bias for each of `num_buckets` buckets of distances up to
    `max_distance` frames (fairseq's `relative_position_embedding` with `gru_rel_pos`).

    "conformer" goes with "rel_pos" or "rope". A conformer uses `dropout` everywhere and, as in fairseq, neither
    `attention_dropout` nor `activation_dropout`; `conv_pos` and `conv_pos_groups` then only shape the unused
    convolution that other projects want in an export. Raises UserError for an unknown name, and for values that do not
    go together.
    """

    extractor_mode: str
    conv_feature_layers: list[list[int]]
    conv_bias: bool
    encoder_layers: int
    encoder_embed_dim: int
    encoder_ffn_embed_dim: int
    encoder_attention_heads: int
    layer_norm_first: bool
    conv_pos: int
    conv_pos_groups: int
    dropout: float
    attention_dropout: float
    activation_dropout: float
    dropout_input: float
    encoder_layerdrop: float
    feature_grad_mult: float
    normalize: bool
    frame_length_rule: str
    layer_type: str = "transformer"
    pos_enc_type: str = "abs"
    depthwise_conv_kernel_size: int = 31
    pos_conv_depth: int = 1
    num_buckets: int = 320
    max_distance: int = 800

    def __post_init__(self) -> None:
        self._check_convolutions()
        if self.frame_length_rule not in FRAME_LENGTH_RULES:
            raise UserError(
                f"method.encoder.frame_length_rule: unknown rule '{self.frame_length_rule}'; use "
                f"{' or '.join(FRAME_LENGTH_RULES)}"
            )
        for name in ("encoder_attention_heads", *(["conv_pos_groups"] if self.layer_type == "transformer" else [])):
            if self.encoder_embed_dim % getattr(self, name):
                raise UserError(
                    f"method.encoder.{name}: {getattr(self, name)} does not divide encoder_embed_dim "
                    f"{self.encoder_embed_dim}; use a number that does"
                )
        if self.layer_type not in POSITIONS:
            raise UserError(
                f"method.encoder.layer_type: unknown type '{self.layer_type}'; use {' or '.join(POSITIONS)}"
            )
        if self.pos_enc_type not in POSITIONS[self.layer_type]:
            raise UserError(
                f"method.encoder.pos_enc_type: '{self.pos_enc_type}' does not go with layer_type {self.layer_type}; "
                f"use {' or '.join(POSITIONS[self.layer_type])}"
            )
        if self.num_buckets % 4 or self.max_distance <= self.num_buckets // 4:
            raise UserError(
                f"method.encoder.num_buckets, method.encoder.max_distance: {self.num_buckets} buckets for distances up "
                f"to {self.max_distance} frames do not go together; give a multiple of 4, and more than a quarter of "
                "it as the distance"
            )
        if self.is_conformer and self.depthwise_conv_kernel_size % 2 == 0:
            raise UserError(
                f"method.encoder.depthwise_conv_kernel_size: {self.depthwise_conv_kernel_size} is even, so that no "
                "padding keeps the number of frames; use an odd one"
            )
        if self.pos_enc_type == "rope" and self.encoder_embed_dim // self.encoder_attention_heads % 2:
            raise UserError(
                "method.encoder.encoder_attention_heads: rope turns pairs of channels, and "
                f"{self.encoder_embed_dim} / {self.encoder_attention_heads} is no even number; use other heads"
            )

    def _check_convolutions(self) -> None:
        if self.extractor_mode not in EXTRACTOR_MODES:
            raise UserError(
                f"method.encoder.extractor_mode: unknown mode '{self.extractor_mode}'; use "
                f"{' or '.join(EXTRACTOR_MODES)}"
            )
        if any(len(layer) != 3 or layer[1] < layer[2] for layer in self.conv_feature_layers):
            raise UserError(
                "method.encoder.conv_feature_layers: state [dim, kernel, stride] for every layer, with kernels at "
                "least as long as their strides, so that every sample is seen"
            )

    @property
    def has_position_bias(self) -> bool:
        """Whether the attention has WavLM's gated relative position bias."""
        return self.pos_enc_type == "gated_bias"

    @property
    def is_conformer(self) -> bool:
        """Whether the layers are conformer blocks."""
        return self.layer_type == "conformer"
