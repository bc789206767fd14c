"""Batch norm against torch's own, and running statistics that processes share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pretrain.models import batch_norm
from pretrain.models.batch_norm import BatchNorm, update_running_statistics


def micro_batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, 4, generator=generator) * (1 + index) + index for index in range(count)]


def statistics(norm: nn.BatchNorm1d) -> Tensor:
    return torch.stack([norm.running_mean, norm.running_var])


def test_equals_torch_where_an_update_is_one_micro_batch() -> None:
    ours, theirs = BatchNorm(4), nn.BatchNorm1d(4)
    for x in micro_batches(3):
        torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2)).transpose(1, 2))
        update_running_statistics(ours, applied=True)
    torch.testing.assert_close(statistics(ours), statistics(theirs))
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 3
    x = micro_batches(1)[0]
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x.transpose(1, 2)).transpose(1, 2))
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_an_update_moves_once_towards_the_mean_of_its_micro_batches() -> None:
    norm = BatchNorm(4)
    batches = micro_batches(4)
    for x in batches:
        norm(x)
    assert torch.equal(statistics(norm), statistics(BatchNorm(4)))
    update_running_statistics(norm, applied=True)
    flat = torch.stack([x.flatten(0, 1) for x in batches])
    torch.testing.assert_close(norm.running_mean, 0.1 * flat.mean(1).mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * flat.var(1).mean(0))


def test_a_refused_update_a_skipped_layer_and_evaluation_leave_no_trace() -> None:
    norm = BatchNorm(4)
    norm(torch.full((2, 5, 4), torch.nan))
    update_running_statistics(norm, applied=False)
    update_running_statistics(norm, applied=True)
    norm.eval()(micro_batches(1)[0])
    update_running_statistics(norm, applied=True)
    assert torch.equal(statistics(norm), statistics(BatchNorm(4)))
    assert norm.num_batches_tracked == 0


def test_a_repeated_forward_counts_as_one() -> None:
    once, twice = BatchNorm(4), BatchNorm(4)
    for x in micro_batches(3):
        once(x)
        twice(x)
        twice(x)
    update_running_statistics(once, applied=True)
    update_running_statistics(twice, applied=True)
    torch.testing.assert_close(statistics(once), statistics(twice))


def test_two_processes_end_where_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collective is replaced by the sum over two layers in this process; test_engine.py has two processes."""
    alone, ranks = BatchNorm(4), [BatchNorm(4), BatchNorm(4)]
    for index, x in enumerate(micro_batches(4)):
        alone(x)
        ranks[index % 2](x)
    update_running_statistics(alone, applied=True)
    total = ranks[0].pending + ranks[1].pending
    monkeypatch.setattr(batch_norm.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(batch_norm.dist, "all_reduce", lambda pending: pending.copy_(total))
    for norm in ranks:
        update_running_statistics(norm, applied=True)
        torch.testing.assert_close(statistics(norm), statistics(alone))
