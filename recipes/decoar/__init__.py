"""DeCoAR: reconstruction of a slice of frames from its two ends (arXiv 1912.01679)."""

from recipes.decoar.encoder import DecoarEncoder as Encoder
from recipes.decoar.method import DecoarMethod as Method

__all__ = ["Encoder", "Method"]
