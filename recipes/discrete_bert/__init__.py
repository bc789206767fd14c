"""Discrete BERT: RoBERTa over the codes of vq-wav2vec (arXiv 1910.05453, section 4; 1911.03912)."""

from recipes.discrete_bert.encoder import DiscreteBertEncoder as Encoder
from recipes.discrete_bert.method import DiscreteBertMethod as Method

__all__ = ["Encoder", "Method"]
