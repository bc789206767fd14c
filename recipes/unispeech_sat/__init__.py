"""UniSpeech-SAT: masked prediction beside a contrastive loss that tells utterances apart (arXiv 2110.05752)."""

from pretrain.models.speech_encoder import SpeechEncoder as Encoder
from recipes.unispeech_sat.method import UniSpeechSatMethod as Method

__all__ = ["Encoder", "Method"]
