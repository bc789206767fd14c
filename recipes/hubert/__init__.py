"""HuBERT: masked prediction of k-means labels (arXiv 2106.07447)."""

from pretrain.models.speech_encoder import SpeechEncoder as Encoder
from recipes.hubert.method import HubertMethod as Method

__all__ = ["Encoder", "Method"]
