"""BEST-RQ: masked prediction of the codes of a random-projection quantizer (arXiv 2202.01855)."""

from recipes.best_rq.encoder import BestRqEncoder as Encoder
from recipes.best_rq.method import BestRqMethod as Method

__all__ = ["Encoder", "Method"]
