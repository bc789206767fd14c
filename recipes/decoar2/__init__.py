"""DeCoAR 2.0: reconstruction of hidden filter-bank frames through a codebook (arXiv 2012.06659)."""

from recipes.decoar2.encoder import Decoar2Encoder as Encoder
from recipes.decoar2.method import Decoar2Method as Method

__all__ = ["Encoder", "Method"]
