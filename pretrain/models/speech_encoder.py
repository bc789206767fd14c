"""The speech encoder that HuBERT, wav2vec 2.0, WavLM and data2vec share: convolutions, then a Transformer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.method import Encoder
from pretrain.models import conv_features
from pretrain.models.conv_features import ConvFeatureExtractor
from pretrain.models.kernels import LayerNorm, Linear, dropout
from pretrain.models.positions import ConvPositions
from pretrain.models.transformer import TransformerLayer

FRAME_LENGTH_RULES = ("fold", "conv")


@dataclass
class SpeechEncoderConfig:
    """Shape and regularisation of a speech encoder; the names are fairseq's, the values the recipe's.

    `conv_feature_layers` lists (dim, kernel, stride). `normalize` brings each waveform to zero mean and unit variance
    over its own samples. `frame_length_rule` says which frames of a padded waveform are real: "conv" the exact count
    (wav2vec 2.0, data2vec, transformers), "fold" fairseq's HuBERT and WavLM rule (a frame is padding only if all
    samples of its stride are).
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


class TransformerEncoder(nn.Module):
    """Positional convolution and Transformer layers: projected frames to hidden states."""

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        dim = config.encoder_embed_dim
        self.dropout, self.layer_norm_first = config.dropout, config.layer_norm_first
        self.pos_conv = ConvPositions(dim, config.conv_pos, config.conv_pos_groups)
        self.layers = nn.ModuleList(
            TransformerLayer(
                dim,
                config.encoder_ffn_embed_dim,
                config.encoder_attention_heads,
                config.dropout,
                config.attention_dropout,
                config.activation_dropout,
                config.layer_norm_first,
            )
            for _ in range(config.encoder_layers)
        )
        self.layer_norm = LayerNorm(dim)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, mean=0.0, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, frame_lengths: Tensor | None, skipped: list[bool]) -> list[Tensor]:
        """(B, F, D) to L + 1 hidden states (B, F, D): the input of every layer, then the encoder's output."""
        valid = None
        if frame_lengths is not None:
            valid = torch.arange(x.shape[1], device=x.device) < frame_lengths.unsqueeze(1)
            x = torch.where(valid.unsqueeze(2), x, 0.0)
            valid = valid[:, None, None, :]
        x = x + self.pos_conv(x)
        if not self.layer_norm_first:
            x = self.layer_norm(x)
        x = dropout(x, self.dropout, self.training)
        hidden_states = []
        for layer, skip in zip(self.layers, skipped, strict=True):
            hidden_states.append(x)
            if not skip:
                x = layer(x, valid)
        hidden_states.append(self.layer_norm(x) if self.layer_norm_first else x)
        return hidden_states


class SpeechEncoder(Encoder):
    """Waveforms to the L + 1 hidden states of a convolutional Transformer.

    Source: HuBERT, arXiv 2106.07447, section III-A; fairseq `hubert.py` and `wav2vec2.py`.
    """

    def __init__(self, config: SpeechEncoderConfig) -> None:
        """Raises ValueError for an unknown `extractor_mode` or `frame_length_rule`."""
        super().__init__()
        if config.frame_length_rule not in FRAME_LENGTH_RULES:
            raise ValueError(f"frame_length_rule: unknown rule '{config.frame_length_rule}'; use 'fold' or 'conv'")
        self.config = config
        conv_dim, dim = config.conv_feature_layers[-1][0], config.encoder_embed_dim
        self.feature_extractor = ConvFeatureExtractor(
            config.conv_feature_layers, config.extractor_mode, config.conv_bias
        )
        self.layer_norm = LayerNorm(conv_dim)
        self.post_extract_proj = Linear(conv_dim, dim)
        self.mask_emb = nn.Parameter(torch.empty(dim).uniform_())
        self.encoder = TransformerEncoder(config)
        self.hidden_sizes = [dim] * (config.encoder_layers + 1)
        self.downsample_rates = [self.stride_samples] * (config.encoder_layers + 1)
        self._skipped = [False] * config.encoder_layers

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SpeechEncoder:
        return cls(SpeechEncoderConfig(**config))

    def to_config(self) -> dict[str, Any]:
        return asdict(self.config)

    @property
    def stride_samples(self) -> int:
        return conv_features.stride_samples(self.config.conv_feature_layers)

    @property
    def receptive_field_samples(self) -> int:
        return conv_features.receptive_field_samples(self.config.conv_feature_layers)

    def frames(self, samples: int | Tensor) -> int | Tensor:
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
            conv = self.feature_extractor(waveforms)[:, :max_frames]
        if self.config.feature_grad_mult != 1 and conv.requires_grad:
            conv = ScaleGradient.apply(conv, self.config.feature_grad_mult)
        projected = self.post_extract_proj(self.layer_norm(conv))
        return ConvOutput(conv, projected, self._frame_lengths(lengths, waveforms.shape[1], conv.shape[1]))

    def context(self, projected: Tensor, frame_lengths: Tensor | None, mask: Tensor | None = None) -> list[Tensor]:
        """Transformer over projected frames (B, F, D).

        Returns L + 1 hidden states (B, F, D): the input of every layer, then the output of the encoder (after its
        final layer norm, where the layers have theirs first). Frames where `mask` (B, F) is True are replaced by the
        mask embedding, after the input dropout, as in fairseq's `HubertModel.forward`.
        """
        x = dropout(projected, self.config.dropout_input, self.training)
        if mask is not None:
            x = torch.where(mask.unsqueeze(2), self.mask_emb.to(x.dtype), x)
        skipped = self._skipped if self.training else [False] * self.config.encoder_layers
        return self.encoder(x, frame_lengths, skipped)

    def forward(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """(B, T) float32 and (B,) samples, or None where nothing is padded, to hidden states and frame counts."""
        _, projected, frame_lengths = self.features(waveforms, lengths)
        hidden_states = self.context(projected, frame_lengths)
        if frame_lengths is None:
            frame_lengths = torch.full((len(waveforms),), projected.shape[1], device=waveforms.device)
        return hidden_states, [frame_lengths] * len(hidden_states)

    def compile_regions(self) -> None:
        """Compile the convolutions and each Transformer layer in place; parameter names stay. Meant for GPUs.

        Every shape of batch gets kernels of its own, once for all layers: batches should come in few shapes.
        """
        # Each shape is compiled for training and evaluation; torch gives up after eight by default.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for region in (self.feature_extractor, *self.encoder.layers):
            region.compile(dynamic=False)

    def draw_layerdrop(self, rng: np.random.Generator) -> None:
        """Draw which layers the next training forwards skip, each with probability `encoder_layerdrop`.

        Drawn per update and not per forward, so that all micro-batches and ranks give gradients to the same layers.
        """
        self._skipped = [bool(rng.random() <= self.config.encoder_layerdrop) for _ in self._skipped]

    def truncated(self, layer: int) -> SpeechEncoder:
        """A copy without the layers above hidden state `layer`, whose hidden states up to `layer` are this one's.

        Where the layers have their norm first, one layer more is kept: the final norm must not touch `layer`.
        """
        kept = min(layer + int(self.config.layer_norm_first), self.config.encoder_layers)
        dropped = tuple(f"encoder.layers.{index}." for index in range(kept, self.config.encoder_layers))
        copy = SpeechEncoder(replace(self.config, encoder_layers=kept))
        copy.load_state_dict({key: value for key, value in self.state_dict().items() if not key.startswith(dropped)})
        return copy.to(self.mask_emb.device).train(self.training)

    def forward_flops(self, samples: int) -> float:
        """Floating-point operations (two per multiply-add) of one forward of a waveform of `samples`."""
        config, dim = self.config, self.config.encoder_embed_dim
        total, in_dim, length = 0.0, 1, samples
        for out_dim, kernel, stride in config.conv_feature_layers:
            length = (length - kernel) // stride + 1
            total += 2.0 * length * in_dim * out_dim * kernel
            in_dim = out_dim
        projection = 2.0 * length * in_dim * dim
        positions = 2.0 * length * dim * (dim // config.conv_pos_groups) * config.conv_pos
        linear = 2.0 * length * (4 * dim * dim + 2 * dim * config.encoder_ffn_embed_dim)
        attention = 4.0 * length * length * dim
        return total + projection + positions + config.encoder_layers * (linear + attention)

    def training_flops(self, samples: int) -> float:
        """Forward and backward of one waveform; the waveform itself needs no gradient."""
        dim, kernel, _ = self.config.conv_feature_layers[0]
        first = 2.0 * conv_features.frames(samples, self.config.conv_feature_layers[:1]) * dim * kernel
        return 3 * self.forward_flops(samples) - first

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
