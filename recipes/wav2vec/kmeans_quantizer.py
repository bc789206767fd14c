"""vq-wav2vec's quantizer by nearest neighbour: differentiable k-means.

Source: arXiv 1910.05453, section 3.2; `fairseq/modules/kmeans_vector_quantizer.py`.
Letters: B rows, F frames, D width, G groups, V entries per group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.models.kernels import linear


class KMeansQuantized(NamedTuple):
    """`vectors` (B, F, D) float32, the nearest entries of all groups side by side, with the gradient of the frames;
    `codes` (B, F, G) int64; `codebook_loss` and `commitment_loss` () float32: the mean squared distance of frames and
    entries per element, the first with the gradient of the entries, the second with that of the frames.
    """

    vectors: Tensor
    codes: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


class KMeansVectorQuantizer(nn.Module):
    """Picks, in each of `groups` groups, the entry nearest to the group's share of a projected, normalised frame.

    The norm runs over a whole row, padding included, as everywhere in wav2vec. With `combine_groups` all groups choose
    from one codebook.
    """

    def __init__(self, dim: int, num_vars: int, groups: int, combine_groups: bool) -> None:
        """Raises UserError where `dim` does not divide into `groups`."""
        super().__init__()
        if dim % groups:
            raise UserError(f"vq_groups: {dim} channels do not divide into {groups} groups; change one of them")
        self.num_vars, self.groups = num_vars, groups
        self.embedding = nn.Parameter(torch.randn(num_vars, 1 if combine_groups else groups, dim // groups))
        self.projection = nn.Sequential(
            nn.Conv1d(dim, dim, kernel_size=1, groups=groups, bias=False), nn.GroupNorm(groups, dim)
        )

    def forward(self, x: Tensor, valid: Tensor | None = None) -> KMeansQuantized:
        """(B, F, D) frames to their entries; frames where `valid` (B, F) is False stay out of the losses."""
        with torch.autocast(x.device.type, enabled=False):
            frames = self._project(x.float()).unflatten(2, (self.groups, -1))
            entries = self.embedding.expand(-1, self.groups, -1)
            with torch.no_grad():
                # |frame - entry|^2 without |frame|^2, which is the same for all entries.
                scores = entries.square().sum(2).T - 2 * torch.einsum("bfge,vge->bfgv", frames, entries)
                codes = scores.argmin(3)
            nearest = entries[codes, torch.arange(self.groups, device=x.device)]
            vectors = nearest.detach() + (frames - frames.detach())
            return KMeansQuantized(
                vectors.flatten(2),
                codes,
                _mean_square(nearest - frames.detach(), valid),
                _mean_square(frames - nearest.detach(), valid),
            )

    def _project(self, x: Tensor) -> Tensor:
        """Grouped projection and norm of (B, F, D)."""
        conv, norm = self.projection
        assert isinstance(conv, nn.Conv1d)
        parts = zip(x.chunk(self.groups, dim=2), conv.weight.squeeze(2).chunk(self.groups), strict=True)
        projected = torch.cat([linear(part, weight) for part, weight in parts], dim=2)
        return norm(projected.transpose(1, 2)).transpose(1, 2)


def _mean_square(difference: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over all elements of (B, F, G, E), or over those of the valid frames."""
    squares = difference.square()
    if valid is None:
        return squares.mean()
    return (squares.mean((2, 3)) * valid).sum() / valid.sum()
