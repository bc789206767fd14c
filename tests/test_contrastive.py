"""Distractors as a distribution; logits and loss against the plain way of computing them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from pretrain.errors import UserError
from pretrain.losses.contrastive import contrastive_logits, contrastive_loss, draw_negatives, guessed_hits


@pytest.mark.parametrize(("own", "candidates"), [(np.arange(12), 12), (np.array([0, 3, 4, 19]), 20)])
def test_negatives_are_uniform_over_the_others(own: np.ndarray, candidates: int) -> None:
    rng = np.random.default_rng(0)
    drawn = draw_negatives(rng, own, candidates, 20_000)
    assert drawn.shape == (len(own), 20_000)
    assert drawn.dtype == np.int64
    for frame, line in zip(own, drawn, strict=True):
        counts = np.bincount(line, minlength=candidates)
        assert len(counts) == candidates
        assert counts[frame] == 0
        assert chisquare(np.delete(counts, frame)).pvalue > 1e-4
    # With replacement: among 100 of a few, some come twice.
    assert len(np.unique(draw_negatives(rng, own, candidates, 100)[0])) < 100


def test_a_row_with_one_frame_has_no_distractor() -> None:
    with pytest.raises(UserError, match="leave no distractor"):
        draw_negatives(np.random.default_rng(0), np.arange(1), 1, 10)


def example() -> dict[str, torch.Tensor]:
    """B 2, K 5, M 8, N 6, D 4, with few codebook entries, so that some negatives equal their positive."""
    torch.manual_seed(0)
    return {
        "predictions": torch.randn(2, 5, 4, requires_grad=True),
        "positives": torch.randn(2, 5, 4, requires_grad=True),
        "candidates": torch.randn(2, 8, 4, requires_grad=True),
        "negatives": torch.randint(8, (2, 5, 6)),
        "positive_entries": torch.randint(3, (2, 5)),
        "candidate_entries": torch.randint(3, (2, 8)),
    }


def test_logits_and_gradients_are_those_of_copied_vectors() -> None:
    inputs = example()
    logits = contrastive_logits(**inputs, logit_temp=0.1)
    loss, _ = contrastive_loss(logits)
    loss.backward()
    leaves = [inputs[name] for name in ("predictions", "positives", "candidates")]
    gradients = [leaf.grad.clone() for leaf in leaves]
    rows = torch.arange(2)[:, None, None]
    copied = torch.cat([inputs["positives"].unsqueeze(2), inputs["candidates"][rows, inputs["negatives"]]], dim=2)
    expected = torch.cosine_similarity(inputs["predictions"].unsqueeze(2), copied, dim=-1) / 0.1
    same = inputs["candidate_entries"][rows, inputs["negatives"]] == inputs["positive_entries"].unsqueeze(2)
    assert 0 < same.sum() < same.numel()
    expected[:, :, 1:][same] = -torch.inf
    torch.testing.assert_close(logits, expected)
    targets = torch.zeros(10, dtype=torch.int64)
    plain = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets, reduction="sum")
    torch.testing.assert_close(loss, plain)
    for leaf in leaves:
        leaf.grad = None
    plain.backward()
    for gradient, leaf in zip(gradients, leaves, strict=True):
        torch.testing.assert_close(gradient, leaf.grad)


def test_float32_under_bf16_autocast() -> None:
    inputs = example()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = contrastive_logits(**inputs, logit_temp=0.1)
    assert torch.equal(mixed, contrastive_logits(**inputs, logit_temp=0.1))


def test_a_uniform_guess_costs_the_logarithm_of_the_choices_and_hits_nothing() -> None:
    logits = torch.full((3, 7, 101), 0.4)
    loss, hits = contrastive_loss(logits)
    assert loss.item() / 21 / math.log(2) == pytest.approx(6.6582, abs=1e-4)
    assert hits.item() == 0
    assert guessed_hits(logits).item() == pytest.approx(21 / 101)


def test_hits_are_counted_as_fairseq_counts_them() -> None:
    rows = torch.tensor(
        [
            [2.0, 1.0, 0.0],  # right
            [1.0, 2.0, 0.0],  # wrong
            [2.0, 2.0, 0.0],  # a tie at the top: argmax takes the first
            [1.0, 1.0, 1.0],  # all equal: largest and smallest at once
            [1.0, -torch.inf, -torch.inf],  # nothing left to be taken for it
        ]
    )
    largest, smallest = rows.argmax(-1) == 0, rows.argmin(-1) == 0
    assert contrastive_loss(rows)[1].item() == (largest.sum() - (largest & smallest).sum()).item() == 3


def test_a_collapsed_codebook_costs_nothing_and_teaches_nothing() -> None:
    inputs = example() | {
        "positive_entries": torch.zeros(2, 5, dtype=torch.int64),
        "candidate_entries": torch.zeros(2, 8, dtype=torch.int64),
    }
    logits = contrastive_logits(**inputs, logit_temp=0.1)
    loss, hits = contrastive_loss(logits)
    loss.backward()
    assert loss.item() == 0
    assert hits.item() == 10
    # What tells this from success: guessing would do as well.
    assert guessed_hits(logits).item() == 10
    assert not inputs["predictions"].grad.any()
