"""Mockingjay, TERA and Audio ALBERT: reconstruction of altered acoustic frames (arXiv 1910.12638, 2007.06028)."""

from recipes.mockingjay.encoder import MockingjayEncoder as Encoder
from recipes.mockingjay.method import MockingjayMethod as Method

__all__ = ["Encoder", "Method"]
