"""HuBERT-MGR: HuBERT trained further on distorted speech, with domain adversarial training (arXiv 2203.16104)."""

from pretrain.models.speech_encoder import SpeechEncoder as Encoder
from recipes.hubert_mgr.method import HubertMGRMethod as Method

__all__ = ["Encoder", "Method"]
