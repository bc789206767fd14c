"""Losses against closed forms: torch's cosine and cross-entropy, fairseq's positive-first form, sums by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.losses.masked_prediction import cosine_logits, prediction_loss
from pretrain.losses.reconstruction import l1_sum

TEMPERATURE = 0.1


def inputs(frames: int = 40, classes: int = 23, dim: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Projected frames (N, P), a codebook (V, P) and targets (N,)."""
    generator = torch.Generator().manual_seed(1)
    projected = torch.randn(frames, dim, generator=generator)
    codebook = torch.rand(classes, dim, generator=generator)
    return projected, codebook, torch.randint(classes, (frames,), generator=generator)


def positive_first(projected: Tensor, codebook: Tensor, targets: Tensor) -> Tensor:
    """fairseq's logits (N, 1 + V): the target's, then all classes with the target's own at minus infinity."""
    positive = codebook[targets]
    table = torch.cat([positive.unsqueeze(0), codebook.unsqueeze(1).expand(-1, len(projected), -1)])
    logits = torch.cosine_similarity(projected.unsqueeze(0), table, dim=-1) / TEMPERATURE
    duplicate = (codebook.unsqueeze(1) == positive).all(-1)
    logits[1:] = logits[1:].masked_fill(duplicate, -torch.inf)
    return logits.T


def test_logits_are_torchs_cosine() -> None:
    projected, codebook, _ = inputs()
    expected = F.cosine_similarity(projected.unsqueeze(1), codebook.unsqueeze(0), dim=-1) / TEMPERATURE
    torch.testing.assert_close(cosine_logits(projected, codebook, TEMPERATURE), expected, rtol=0, atol=1e-5)


def test_loss_accuracy_and_gradients_are_those_of_the_positive_first_form() -> None:
    projected, codebook, targets = (t.requires_grad_() if t.is_floating_point() else t for t in inputs())
    loss, correct = prediction_loss(cosine_logits(projected, codebook, TEMPERATURE), targets)
    logits = positive_first(projected, codebook, targets)
    theirs = F.cross_entropy(logits, torch.zeros_like(targets), reduction="sum")
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert correct.item() == (logits.argmax(-1) == 0).sum().item() > 0
    ours = torch.autograd.grad(loss, (projected, codebook))
    for mine, reference in zip(ours, torch.autograd.grad(theirs, (projected, codebook)), strict=True):
        assert (mine - reference).norm() <= 1e-5 * reference.norm()


def test_a_perfect_and_a_uniform_prediction() -> None:
    codebook = torch.eye(8)
    targets = torch.arange(8)
    loss, correct = prediction_loss(cosine_logits(3.0 * codebook, codebook, TEMPERATURE), targets)
    # Cosine 1 with its own class, 0 with the seven others.
    assert loss.item() == pytest.approx(8 * math.log(1 + 7 * math.exp(-1 / TEMPERATURE)), rel=1e-3)
    assert correct == 8
    loss, _ = prediction_loss(torch.zeros(5, 7), torch.arange(5))
    assert loss.item() == pytest.approx(5 * math.log(7))


def test_frames_without_a_target_are_not_scored() -> None:
    projected, codebook, targets = inputs()
    logits = cosine_logits(projected, codebook, TEMPERATURE)
    hidden = targets.clone()
    hidden[::3] = -1
    kept = hidden >= 0
    some, chosen = prediction_loss(logits, hidden), prediction_loss(logits[kept], targets[kept])
    assert some[0].item() == pytest.approx(chosen[0].item())
    assert some[1] == chosen[1]
    empty, none_correct = prediction_loss(logits[:0], targets[:0])
    assert (empty.item(), none_correct.item()) == (0.0, 0)


def test_logits_are_fp32_under_bf16_autocast_and_finite_for_a_zero_frame() -> None:
    projected, codebook, _ = inputs()
    expected = cosine_logits(projected, codebook, TEMPERATURE)
    with torch.autocast("cpu", torch.bfloat16):
        logits = cosine_logits(projected, codebook, TEMPERATURE)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)
    zero = torch.zeros(1, 12, requires_grad=True)
    cosine_logits(zero, codebook, TEMPERATURE).sum().backward()
    assert torch.isfinite(zero.grad).all()
    assert not cosine_logits(torch.zeros(1, 12), codebook, TEMPERATURE).any()


def test_the_summed_error() -> None:
    predictions, targets = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 4.0], [3.0, 1.0]])
    assert l1_sum(predictions, targets).item() == 6.0
    assert l1_sum(predictions, targets, torch.tensor([[True, False], [True, True]])).item() == 4.0


def test_the_summed_error_of_bf16_is_float32() -> None:
    assert l1_sum(torch.ones(2, 2, dtype=torch.bfloat16), torch.zeros(2, 2)).dtype == torch.float32
