"""The quantizer of VQ-APC and NPC against `F.gumbel_softmax` over one-hot vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.quantizers.linear_gumbel import LinearGumbelConfig, LinearGumbelQuantizer

CONFIG = LinearGumbelConfig(codebook_sizes=[7, 5], code_dims=[6, 10], temperature=0.7)


@pytest.fixture
def quantizer() -> LinearGumbelQuantizer:
    torch.manual_seed(0)
    return LinearGumbelQuantizer(CONFIG)


@pytest.fixture
def frames() -> Tensor:
    return torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)


def reference(quantizer: LinearGumbelQuantizer, x: Tensor, noise: list[Tensor]) -> Tensor:
    """One-hot vectors with the gradient of the softmax, times the codebook, as s3prl writes it."""
    parts = []
    for group, part, given in zip(quantizer.groups, x.split([6, 10], dim=-1), noise, strict=True):
        soft = ((group.logits(part) + given) / 0.7).softmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        parts.append((hard - soft.detach() + soft) @ group.codebook)
    return torch.cat(parts, dim=-1)


def test_values_and_gradients_are_those_of_one_hot_vectors(quantizer: LinearGumbelQuantizer, frames: Tensor) -> None:
    generator = torch.Generator().manual_seed(2)
    noise = [-torch.empty(3, 20, size).exponential_(generator=generator).log() for size in (7, 5)]
    wish = torch.randn(3, 20, 16, generator=generator)
    leaves = [frames, *quantizer.parameters()]
    ours, theirs = quantizer.train()(frames, noise).vectors, reference(quantizer, frames, noise)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad((vectors * wish).sum(), leaves) for vectors in (ours, theirs)]
    for mine, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_evaluation_takes_the_likeliest_code(quantizer: LinearGumbelQuantizer, frames: Tensor) -> None:
    chosen = quantizer.eval()(frames)
    for index, (group, part) in enumerate(zip(quantizer.groups, frames.split([6, 10], dim=-1), strict=True)):
        assert torch.equal(chosen.codes[..., index], group.logits(part).argmax(-1))
    assert torch.equal(chosen.vectors[..., :6], quantizer.groups[0].codebook[chosen.codes[..., 0]])


def test_codes_are_drawn_from_the_softmax(quantizer: LinearGumbelQuantizer) -> None:
    x = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(3))
    codes = quantizer.train()(x.expand(1, 40_000, -1)).codes
    for index, (group, part) in enumerate(zip(quantizer.groups, x.split([6, 10], dim=-1), strict=True)):
        shares = torch.bincount(codes[..., index].flatten(), minlength=CONFIG.codebook_sizes[index]) / 40_000
        # The temperature shapes the gradient, not the draw.
        torch.testing.assert_close(shares, group.logits(part).softmax(-1).flatten(), rtol=0, atol=0.02)


def test_counts_leave_padding_out(quantizer: LinearGumbelQuantizer, frames: Tensor) -> None:
    codes = quantizer.eval()(frames).codes
    valid = torch.arange(20) < torch.tensor([[20], [3], [0]])
    for group, size in enumerate(CONFIG.codebook_sizes):
        expected = torch.bincount(codes[valid][:, group], minlength=size).float()
        assert torch.equal(quantizer.counts(codes, valid)[group], expected)
        assert quantizer.counts(codes, None)[group].sum() == 60


def test_it_stays_in_float32_under_bf16_autocast(quantizer: LinearGumbelQuantizer, frames: Tensor) -> None:
    exact = quantizer.eval()(frames.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        chosen = quantizer(frames.bfloat16())
    assert chosen.vectors.dtype == torch.float32
    assert torch.equal(chosen.vectors, exact.vectors)
