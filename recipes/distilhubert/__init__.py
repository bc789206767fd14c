"""DistilHuBERT: a student of two layers learns to name several layers of a trained network at once (2110.01900)."""

from recipes.distilhubert.encoder import StudentEncoder as Encoder
from recipes.distilhubert.method import DistilHubertMethod as Method

__all__ = ["Encoder", "Method"]
