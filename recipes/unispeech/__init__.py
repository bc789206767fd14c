"""UniSpeech: CTC on labelled speech beside a contrastive loss on all of it (arXiv 2101.07597)."""

from pretrain.models.speech_encoder import SpeechEncoder as Encoder
from recipes.unispeech.method import UniSpeechMethod as Method

__all__ = ["Encoder", "Method"]
