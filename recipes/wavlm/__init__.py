"""WavLM: masked prediction of the clean utterance's labels from mixed speech (arXiv 2110.13900)."""

from pretrain.models.speech_encoder import SpeechEncoder as Encoder
from recipes.wavlm.method import WavLMMethod as Method

__all__ = ["Encoder", "Method"]
