"""The random-projection quantizer: a matrix and a codebook that are drawn once and never trained.

Source: arXiv 2202.01855, section 3.1; speechbrain/speechbrain `speechbrain/nnet/quantisers.py`; google/praxis
`praxis/layers/quantizer.py` (RandomVectorQuantizer).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RandomProjectionQuantizer(nn.Module):
    """(N, D) features to (N,) codes: the entry of the codebook that is nearest to the projected feature.

    `projection` (D, d) is Xavier-uniform, the rows of `codebook` (V, d) are normal and of length 1. Both are buffers:
    they get no gradient, and every checkpoint holds them.
    """

    projection: Tensor
    codebook: Tensor

    def __init__(self, input_dim: int, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.register_buffer("projection", nn.init.xavier_uniform_(torch.empty(input_dim, codebook_dim)))
        self.register_buffer("codebook", F.normalize(torch.randn(codebook_size, codebook_dim), dim=1))

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """(N, D) float32 to (N,) int64.

        For vectors of length 1 the nearest is the one with the largest inner product, so that no (N, V, d) differences
        are needed. In float32 under autocast too: codes must not depend on the precision of the run.
        """
        with torch.autocast(features.device.type, enabled=False):
            return (F.normalize(features.float() @ self.projection, dim=1) @ self.codebook.T).argmax(dim=1)
