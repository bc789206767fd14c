"""MPC: masked predictive coding of filter banks (arXiv 1910.09932)."""

from recipes.mpc.encoder import MpcEncoder as Encoder
from recipes.mpc.method import MpcMethod as Method

__all__ = ["Encoder", "Method"]
