"""APC, VQ-APC and multi-target APC: prediction of a frame to come (arXiv 1904.03240, 2005.08392, 2004.05274)."""

from recipes.apc.encoder import ApcEncoder as Encoder
from recipes.apc.method import ApcMethod as Method

__all__ = ["Encoder", "Method"]
