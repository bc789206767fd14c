"""The quantizer of VQ-APC and NPC: per group a linear layer for the logits and a codebook, chosen by Gumbel-softmax.

Source: arXiv 2005.08392, section 2; `s3prl/upstream/{apc,npc}/vq.py`. It has no loss of its own: codes live from the
gradient of the reconstruction alone.
Letters: G groups, V_g codes and D_g numbers per code in group g.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import ConfigError
from pretrain.models.kernels import Linear
from pretrain.quantizers.gumbel import gumbel_noise


@dataclass
class LinearGumbelConfig:
    """One entry of `codebook_sizes` and `code_dims` per group; the dims of all groups add up to the input's width."""

    codebook_sizes: list[int]
    code_dims: list[int]
    temperature: float

    def __post_init__(self) -> None:
        if not self.codebook_sizes or len(self.codebook_sizes) != len(self.code_dims):
            raise ConfigError("codebook_sizes, code_dims: state one entry of each per group of the quantizer")
        if self.temperature <= 0:
            raise ConfigError(f"temperature: {self.temperature} must be positive")


class Chosen(NamedTuple):
    """`vectors` (B, F, D) float32, the codes of all groups side by side; `codes` (B, F, G) int64, which ones."""

    vectors: Tensor
    codes: Tensor


class StraightThrough(torch.autograd.Function):
    """Chosen code vectors forwards; backwards also the gradient that the soft mixture `soft @ codebook` would get."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, soft: Tensor, codebook: Tensor) -> Tensor:
        ctx.save_for_backward(codebook)
        return vectors.view_as(vectors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (codebook,) = ctx.saved_tensors
        return grad, grad @ codebook.T, None


class CodeGroup(nn.Module):
    """One group: (..., D_g) frames to code vectors of the same width, and their indices."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.logits = Linear(dim, size)
        # s3prl has the codebook as a linear layer without bias over one-hot vectors; this is its initial range.
        self.codebook = nn.Parameter(torch.empty(size, dim).uniform_(-1 / math.sqrt(size), 1 / math.sqrt(size)))

    def forward(self, x: Tensor, temperature: float, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """(..., D) parts of frames to the entries (..., D) that stand for them and their codes (...) int64."""
        logits = self.logits(x)
        if not self.training:
            codes = logits.argmax(-1)
            return F.embedding(codes, self.codebook), codes
        noise = gumbel_noise(logits) if noise is None else noise
        soft = ((logits + noise) / temperature).softmax(-1)
        codes = soft.detach().argmax(-1)
        return StraightThrough.apply(F.embedding(codes, self.codebook), soft, self.codebook), codes


class LinearGumbelQuantizer(nn.Module):
    """Replaces each group's part of a frame by one of that group's learned codes.

    Training draws the code from softmax((logits + Gumbel noise) / temperature) and gives the logits the gradient of the
    soft mixture; evaluation takes the likeliest code. All of it is float32.
    """

    def __init__(self, config: LinearGumbelConfig) -> None:
        super().__init__()
        self.config = config
        pairs = zip(config.codebook_sizes, config.code_dims, strict=True)
        self.groups = nn.ModuleList(CodeGroup(size, dim) for size, dim in pairs)

    def forward(self, x: Tensor, noise: list[Tensor] | None = None) -> Chosen:
        """(B, F, D) frames; `noise`, one (B, F, V_g) per group, takes the place of the noise that training draws."""
        with torch.autocast(x.device.type, enabled=False):
            parts = x.float().split(self.config.code_dims, dim=-1)
            noises: list[Tensor | None] = [None] * len(self.groups) if noise is None else list(noise)
            results = [
                group(part, self.config.temperature, given)
                for group, part, given in zip(self.groups, parts, noises, strict=True)
            ]
            vectors, codes = zip(*results, strict=True)
            return Chosen(torch.cat(vectors, dim=-1), torch.stack(codes, dim=-1))

    def counts(self, codes: Tensor, valid: Tensor | None) -> list[Tensor]:
        """How often each code occurs in (B, F, G) `codes`, one (V_g,) per group; frames not `valid` (B, F) left out."""
        weights = torch.ones(codes.shape[:-1], device=codes.device) if valid is None else valid.float()
        totals = []
        for group, size in enumerate(self.config.codebook_sizes):
            total = torch.zeros(size, device=codes.device)
            totals.append(total.index_add_(0, codes[..., group].flatten(), weights.flatten()))
        return totals

    def flops(self, frames: float) -> float:
        """Floating-point operations of one forward; looking a code up costs none."""
        pairs = zip(self.config.codebook_sizes, self.config.code_dims, strict=True)
        return 2.0 * frames * sum(size * dim for size, dim in pairs)


def check_width(config: LinearGumbelConfig | None, width: int) -> None:
    """Raises ConfigError where the groups do not add up to frames of `width` numbers."""
    if config is not None and sum(config.code_dims) != width:
        raise ConfigError(
            f"encoder.quantizer.code_dims: {config.code_dims} add up to {sum(config.code_dims)}, the frames are "
            f"{width} wide; make them equal"
        )
