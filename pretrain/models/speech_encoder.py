"""The speech encoder that HuBERT, wav2vec 2.0, WavLM and data2vec share: convolutions, then layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models import conv_features
from pretrain.models.activation_checkpointing import call
from pretrain.models.compiled_layers import compile_in_place
from pretrain.models.context import ContextEncoder, ContextNetwork
from pretrain.models.conv_features import ConvFeatureExtractor, Samples
from pretrain.models.kernels import LayerNorm, Linear, dropout
from pretrain.models.layer_stack import with_layers
from pretrain.models.positions import position_kernel
from pretrain.models.speech_config import SpeechEncoderConfig


class ConvOutput(NamedTuple):
    """`conv` (B, F, C) convolution output, its gradient scaled; `projected` (B, F, D) before dropout; `frame_lengths`
    (B,) int64, or None where nothing is padded.
    """

    conv: Tensor
    projected: Tensor
    frame_lengths: Tensor | None


class ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


class SpeechEncoder(ContextEncoder):
    """Waveforms to the L + 1 hidden states of a convolutional Transformer or conformer.

    Source: HuBERT, arXiv 2106.07447, section III-A; fairseq `hubert.py` and `wav2vec2.py`.
    """

    Config = SpeechEncoderConfig
    config: SpeechEncoderConfig
    weight_independent_fields = (
        "dropout",
        "attention_dropout",
        "activation_dropout",
        "dropout_input",
        "encoder_layerdrop",
        "feature_grad_mult",
        "normalize",
        "frame_length_rule",
    )

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        self.config = config
        conv_dim, dim = config.conv_feature_layers[-1][0], config.encoder_embed_dim
        self.feature_extractor = ConvFeatureExtractor(
            config.conv_feature_layers, config.extractor_mode, config.conv_bias
        )
        self.layer_norm = LayerNorm(conv_dim)
        self.post_extract_proj = Linear(conv_dim, dim)
        self.mask_emb = nn.Parameter(torch.empty(dim).uniform_())
        self.encoder = ContextNetwork(config)
        self.hidden_sizes = [dim] * (config.encoder_layers + 1)
        self.downsample_rates = [self.stride_samples] * (config.encoder_layers + 1)

    @property
    def stride_samples(self) -> int:
        return conv_features.stride_samples(self.config.conv_feature_layers)

    @property
    def receptive_field_samples(self) -> int:
        return conv_features.receptive_field_samples(self.config.conv_feature_layers)

    def frames(self, samples: Samples) -> Samples:
        """Frames that `samples` samples give."""
        return conv_features.frames(samples, self.config.conv_feature_layers)

    def features(self, waveforms: Tensor, lengths: Tensor | None, max_frames: int | None = None) -> ConvOutput:
        """Convolutions and projection.

        `waveforms` (B, T) are zero after `lengths` (B,) samples; `lengths` None says that nothing is padded, and saves
        the attention its mask. `max_frames` cuts the frames to a number of labels, before frame lengths are counted.
        """
        if self.config.normalize:
            waveforms = normalize_waveforms(waveforms, lengths)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.feature_grad_mult > 0):
            conv = call(self.feature_extractor, waveforms, checkpointing=self.layers.checkpointing)[:, :max_frames]
        if self.config.feature_grad_mult != 1 and conv.requires_grad:
            conv = ScaleGradient.apply(conv, self.config.feature_grad_mult)
        projected = self.post_extract_proj(self.layer_norm(conv))
        return ConvOutput(conv, projected, self._frame_lengths(lengths, waveforms.shape[1], conv.shape[1]))

    def context(self, projected: Tensor, frame_lengths: Tensor | None, mask: Tensor | None = None) -> list[Tensor]:
        """Positions and layers over projected frames (B, F, D).

        Returns L + 1 hidden states (B, F, D): the input of every layer, then the output of the encoder (after its
        final layer norm, where the layers have theirs first). Frames where `mask` (B, F) is True are replaced by the
        mask embedding, after the input dropout, as in fairseq's `HubertModel.forward`.
        """
        x = dropout(projected, self.config.dropout_input, self.training)
        if mask is not None:
            x = torch.where(mask.unsqueeze(2), self.mask_emb.to(x.dtype), x)
        return self.encoder(x, frame_lengths)

    def forward(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """(B, T) float32 and (B,) samples, or None where nothing is padded, to hidden states and frame counts."""
        _, projected, frame_lengths = self.features(waveforms, lengths)
        hidden_states = self.context(projected, frame_lengths)
        if frame_lengths is None:
            frame_lengths = torch.full((len(waveforms),), projected.shape[1], device=waveforms.device)
        return hidden_states, [frame_lengths] * len(hidden_states)

    def compile_layers(self) -> None:
        """Compile the convolutions and each layer in place; parameter names stay. Meant for GPUs.

        Every shape of batch gets kernels of its own, once for all layers: batches should come in few shapes.
        """
        compile_in_place((self.feature_extractor, *self.layers))

    def truncated(self, layer: int) -> SpeechEncoder:
        """A copy without the layers above hidden state `layer`, whose hidden states up to `layer` are this one's.

        Where the layers have their norm first, one layer more is kept: the final norm must not touch `layer`.
        """
        return with_layers(self, min(layer + int(self.config.layer_norm_first), self.config.encoder_layers))

    def forward_flops(self, samples: int) -> float:
        """Floating-point operations (two per multiply-add) of one forward of a waveform of `samples`."""
        config, dim = self.config, self.config.encoder_embed_dim
        total, in_dim, length = 0.0, 1, samples
        for out_dim, kernel, stride in config.conv_feature_layers:
            length = (length - kernel) // stride + 1
            total += 2.0 * length * in_dim * out_dim * kernel
            in_dim = out_dim
        return total + 2.0 * length * in_dim * dim + self.context_flops(length)

    def context_flops(self, frames: int) -> float:
        """Floating-point operations of one forward of positions and layers over `frames` frames."""
        config, dim = self.config, self.config.encoder_embed_dim
        if config.is_conformer:
            return config.encoder_layers * self._conformer_flops(frames)
        taps = config.pos_conv_depth * position_kernel(config.conv_pos, config.pos_conv_depth)
        positions = 2.0 * frames * dim * (dim // config.conv_pos_groups) * taps
        linear = 2.0 * frames * (4 * dim * dim + 2 * dim * config.encoder_ffn_embed_dim)
        attention = 4.0 * frames * frames * dim
        return positions + config.encoder_layers * (linear + attention)

    def _conformer_flops(self, length: int) -> float:
        """Forward of one conformer layer over `length` frames."""
        config, dim = self.config, self.config.encoder_embed_dim
        # Four projections of the attention and three of the convolution module; two feed-forwards.
        linear = 2.0 * length * dim * (7 * dim + 4 * config.encoder_ffn_embed_dim + config.depthwise_conv_kernel_size)
        attention = 4.0 * length * length * dim
        if config.pos_enc_type == "rel_pos":
            attention += self._distance_flops(length) + 4.0 * length * length * dim
        return linear + attention

    def _distance_flops(self, length: int) -> float:
        """Projection of one layer's 2 F relative positions."""
        return 4.0 * length * self.config.encoder_embed_dim**2

    def training_flops(self, samples: int) -> float:
        """Forward and backward of one waveform; waveform and table of relative positions need no gradient."""
        config = self.config
        dim, kernel, _ = config.conv_feature_layers[0]
        spared = 2.0 * conv_features.frames(samples, config.conv_feature_layers[:1]) * dim * kernel
        if config.pos_enc_type == "rel_pos":
            spared += config.encoder_layers * self._distance_flops(self.frames(samples))
        return 3 * self.forward_flops(samples) - spared

    def _frame_lengths(self, lengths: Tensor | None, samples: int, frames: int) -> Tensor | None:
        if lengths is None:
            return None
        config = self.config
        return conv_features.valid_frames(
            lengths, samples, frames, config.conv_feature_layers, config.frame_length_rule
        )


def normalize_waveforms(waveforms: Tensor, lengths: Tensor | None) -> Tensor:
    """Zero mean and unit variance per waveform (B, T) over its first `lengths` samples; the padding stays zero.

    The variance is biased and has 1e-5 added, as `F.layer_norm` does it in fairseq's audio dataset.
    """
    if lengths is None:
        return F.layer_norm(waveforms, waveforms.shape[1:])
    valid = torch.arange(waveforms.shape[1], device=waveforms.device) < lengths.unsqueeze(1)
    count = lengths.unsqueeze(1)
    mean = (waveforms * valid).sum(1, keepdim=True) / count
    centred = (waveforms - mean) * valid
    variance = centred.square().sum(1, keepdim=True) / count
    return centred * torch.rsqrt(variance + 1e-5)
