"""Contrastive predictive coding: CPC (arXiv 1807.03748), modified CPC (arXiv 2002.02848), bidirectional CPC."""

from recipes.cpc.encoder import CpcEncoder as Encoder
from recipes.cpc.method import CpcMethod as Method

__all__ = ["Encoder", "Method"]
