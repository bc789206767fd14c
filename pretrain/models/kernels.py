"""Building blocks whose best form depends on the processor: products, convolutions, attention, dropout, layer norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of x (..., K) with weight (N, K); in float32 on the CPU as a 1x1 convolution.

    torch gives float32 products to MKL, which runs at half speed on AMD processors, but convolutions (and bfloat16
    products) to oneDNN, which does not. On one thread it gives oneDNN only convolutions that are strided or dilated:
    dilating a kernel of height 1 changes nothing, and halves the time.
    """
    if not x.is_cpu or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    image = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    out = F.conv2d(image, weight[:, :, None, None], bias, dilation=(2, 1))
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def grouped_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, groups: int) -> Tensor:
    """`F.conv1d` of x (B, C, F) in `groups`; on the CPU in float32 where a group is not 16, 32, ... channels wide.

    The oneDNN that comes with torch 2.11 has a bfloat16 kernel for AMX that returns noise for such groups and kernel
    sizes of 16, 32 and more, forward and backward. float32 is also the fastest right way: a product over windows takes
    twice as long. The result has the data type of `F.conv1d`.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if not x.is_cpu or dtype not in (torch.bfloat16, torch.float16) or weight.shape[1] % 16 == 0:
        return F.conv1d(x, weight, bias, padding=padding, groups=groups)
    with torch.autocast("cpu", enabled=False):
        bias = None if bias is None else bias.float()
        return F.conv1d(x.float(), weight.float(), bias, padding=padding, groups=groups).to(dtype)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`F.dropout`; on the CPU with 16 random bits per element, `p` being rounded to 1 / 65536.

    A Bernoulli draw per element costs there more than the product that it follows.
    """
    if not x.is_cpu or not training or p == 0:
        return F.dropout(x, p, training)
    words = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 3) // 4,))
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    dropped = round(p * 2**16)
    return x * ((bits >= dropped - 2**15).to(x.dtype) * (2**16 / (2**16 - dropped)))


def attention(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, dropout_p: float, bias: Tensor | None = None
) -> Tensor:
    """Scaled dot-product attention of (B, H, F, D); keys where `valid` (B, 1, 1, F) is False are hidden.

    `bias` (B, H, F, F) is added to the scaled scores. torch has no fused kernel with dropout, or with a gradient for a
    bias, for the CPU, and its fallback is slower than these lines.
    """
    if bias is None and (not q.is_cpu or dropout_p == 0):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=valid, dropout_p=dropout_p)
    if bias is not None and not q.is_cpu:
        bias = bias if valid is None else bias.masked_fill(~valid, -torch.inf)
        # Fused kernels want rows that start at aligned addresses, which a shifted view does not offer.
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.contiguous(), dropout_p=dropout_p)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    if bias is not None:
        scores = scores + bias
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
    return dropout(scores.softmax(-1).to(v.dtype), dropout_p, True) @ v


class Linear(nn.Linear):
    """`nn.Linear` through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` in the precision of its weights: float32 in and out under autocast, on the CPU too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))
