"""NPC's network: convolution blocks, and after each a convolution that cannot see the frame it describes.

Source: arXiv 2011.00406, section 2; Alexander-H-Liu/NPC `model/npc.py` (the same as `s3prl/upstream/npc/npc.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import ConfigError
from pretrain.features.front_end import FrontEndConfig
from pretrain.models.batch_norm import BatchNorm
from pretrain.models.conv_features import Conv1d, convolve
from pretrain.models.kernels import Linear, dropout
from pretrain.models.predictive_encoder import PredictiveEncoder
from pretrain.quantizers.linear_gumbel import LinearGumbelConfig, check_width

BLOCK_KERNEL = 3


@dataclass
class NpcEncoderConfig:
    """`kernel_size` frames seen by every masked convolution, `mask_size` input frames around the present one hidden.

    Each block widens what a frame has seen by one frame on either side, so block i (from 0) hides `mask_size` +
    2 (i + 1) taps. `residual` adds a block's input to its output, in every block but the first. `quantizer` null
    predicts from the masked features themselves.
    """

    front_end: FrontEndConfig
    hidden_size: int
    n_blocks: int
    kernel_size: int
    mask_size: int
    dropout: float
    residual: bool
    quantizer: LinearGumbelConfig | None

    def __post_init__(self) -> None:
        if self.n_blocks < 1 or self.kernel_size % 2 == 0 or self.mask_size % 2 == 0:
            raise ConfigError("encoder: n_blocks must be at least 1, kernel_size and mask_size odd; correct the recipe")
        if self.hidden_taps(self.n_blocks - 1) >= self.kernel_size:
            raise ConfigError(
                f"encoder.kernel_size: {self.kernel_size} is hidden whole by mask_size {self.mask_size} after "
                f"{self.n_blocks} blocks; make it at least {self.hidden_taps(self.n_blocks - 1) + 2}"
            )
        check_width(self.quantizer, self.hidden_size)

    def hidden_taps(self, block: int) -> int:
        """Taps in the middle of the masked convolution after `block` that are zero."""
        return self.mask_size + (BLOCK_KERNEL - 1) * (block + 1)


class ConvBlock(nn.Module):
    """Convolution over three frames and a linear layer, a batch norm after each: (B, F, C_in) to (B, F, C)."""

    def __init__(self, in_dim: int, dim: int, dropout_p: float, residual: bool) -> None:
        super().__init__()
        self.dropout, self.residual = dropout_p, residual
        self.conv = Conv1d(in_dim, dim, BLOCK_KERNEL)
        self.linear = Linear(dim, dim)
        self.bn1 = BatchNorm(dim)
        self.bn2 = BatchNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        reach = BLOCK_KERNEL // 2
        out = F.relu(self.bn1(self.conv(F.pad(x, (0, 0, reach, reach)))))
        out = dropout(self.bn2(self.linear(out)), self.dropout, self.training)
        return F.relu(out + x if self.residual else out)


class MaskedConv(nn.Module):
    """Convolution whose `hidden` middle taps count as zero, then tanh: (B, F, C) to (B, F, C).

    The weight has all taps, as in published checkpoints; those in the middle are neither multiplied nor trained.
    """

    def __init__(self, dim: int, kernel: int, hidden: int) -> None:
        super().__init__()
        self.kernel, self.side = kernel, (kernel - hidden) // 2
        self.conv = nn.Conv1d(dim, dim, kernel)

    def forward(self, x: Tensor) -> Tensor:
        weight, reach, side = self.conv.weight, self.kernel // 2, self.side
        frames, after = x.shape[1], self.kernel - side
        padded = F.pad(x, (0, 0, reach, reach))
        left = convolve(padded[:, : frames + side - 1], weight[:, :, :side], self.conv.bias)
        right = convolve(padded[:, after : after + frames + side - 1], weight[:, :, after:], None)
        return torch.tanh(left + right)


class NpcEncoder(PredictiveEncoder):
    """Waveforms to 2 n_blocks + 1 hidden states in the order of computation: block 0, its masked features, block 1, ...

    The last state is the sum of the masked features, from which a frame is predicted. It does not depend on the
    `mask_size` frames around its own; the blocks' outputs do. Convolutions read the zeros after a waveform's end, and
    in deeper blocks what these became: in a padded batch the last frames of a shorter waveform differ from those of
    the waveform alone, here as in the official code.
    """

    Config = NpcEncoderConfig
    config: NpcEncoderConfig
    weight_independent_fields = ("dropout", "quantizer.temperature")

    def __init__(self, config: NpcEncoderConfig) -> None:
        dim = config.hidden_size
        super().__init__(config.front_end, config.quantizer, dim, states=2 * config.n_blocks + 1)
        self.config = config
        self.blocks = nn.ModuleList(
            ConvBlock(dim if i else self.front_end.dim, dim, config.dropout, config.residual and i > 0)
            for i in range(config.n_blocks)
        )
        self.masked_convs = nn.ModuleList(
            MaskedConv(dim, config.kernel_size, config.hidden_taps(i)) for i in range(config.n_blocks)
        )

    def context(self, features: Tensor, frame_lengths: Tensor | None = None) -> list[Tensor]:
        """(B, F, dim) features, zero in padding, to all hidden states (B, F, C), whatever `frame_lengths`."""
        hidden_states = []
        x, masked = features, []
        for block, masked_conv in zip(self.blocks, self.masked_convs, strict=True):
            x = block(x)
            masked.append(masked_conv(x))
            hidden_states += [x, masked[-1]]
        return [*hidden_states, torch.stack(masked).sum(0)]

    def training_flops(self, samples: int) -> float:
        """Forward and backward of one waveform of `samples`; hidden taps cost nothing, features need no gradient."""
        frames, dim, config = self.front_end.frames(samples), self.config.hidden_size, self.config
        first = 2.0 * frames * BLOCK_KERNEL * self.front_end.dim * dim
        taps = [config.kernel_size - config.hidden_taps(i) for i in range(config.n_blocks)]
        per_pair = (config.n_blocks - 1) * BLOCK_KERNEL + config.n_blocks + sum(taps)
        codes = self.quantizer.flops(frames) if self.quantizer else 0.0
        # Choosing a code costs the logits alone, its gradient those of the logits and of the soft mixture.
        return 2 * first + 3 * 2.0 * frames * per_pair * dim * dim + 4 * codes
