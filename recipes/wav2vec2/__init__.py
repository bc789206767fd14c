"""wav2vec 2.0: telling the quantized speech under a mask from distractors (arXiv 2006.11477)."""

from pretrain.models.speech_encoder import SpeechEncoder as Encoder
from recipes.wav2vec2.method import Wav2Vec2Method as Method

__all__ = ["Encoder", "Method"]
