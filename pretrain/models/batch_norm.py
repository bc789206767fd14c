"""Batch norm whose running statistics follow from the update, not from how many processes share it."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` over the last dimension of (..., D), in the precision of its weights.

    In training every micro-batch is normalised by its own mean and variance, all of its frames counted. The running
    statistics do not move then: the micro-batch's are added to `pending`, and `update_running_statistics`, which the
    trainer calls, moves them once per update towards the mean over the update's micro-batches on all ranks. torch's own
    would move per micro-batch and rank, and a checkpoint would hold those of one rank. A forward that activation
    checkpointing repeats adds its statistics again; as every micro-batch is repeated alike, the mean stays.
    """

    pending: Tensor
    # torch's may be None, without affine weights or statistics; here they are always there.
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        # Rows: sum of means, sum of unbiased variances, number of forwards (in every column). Empty between updates.
        self.register_buffer("pending", torch.zeros(3, dim), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D), over all positions; training leaves the statistics for `update_running_statistics`."""
        flat = x.to(self.weight.dtype).reshape(-1, x.shape[-1])
        if not self.training:
            out = F.batch_norm(flat, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
            return out.view(x.shape)
        mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        # Momentum 1 writes the statistics of this call into the two tensors.
        out = F.batch_norm(flat, mean, variance, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
        self.pending += torch.stack([mean, variance, torch.ones_like(mean)])
        return out.view(x.shape)


def update_running_statistics(module: nn.Module, applied: bool) -> None:
    """Move the running statistics of every `BatchNorm` in `module` by one update; a collective call.

    Nothing moves where the update was not `applied`, or in a layer that no forward went through.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, BatchNorm)]
    if not norms:
        return
    pending = torch.cat([norm.pending for norm in norms], dim=1)
    if applied and dist.is_initialized():
        dist.all_reduce(pending)
    for norm, (mean, variance, count) in zip(
        norms, pending.split([norm.num_features for norm in norms], dim=1), strict=True
    ):
        if applied:
            count_or_one = count.clamp(min=1)
            momentum = torch.where(count > 0, norm.momentum, 0.0)
            norm.running_mean.lerp_(mean / count_or_one, momentum)
            norm.running_var.lerp_(variance / count_or_one, momentum)
            norm.num_batches_tracked += count[0] > 0
        norm.pending.zero_()
