"""data2vec (audio): regression of what a moving average of the network makes of the unmasked waveform (2202.03555)."""

from pretrain.models.speech_encoder import SpeechEncoder as Encoder
from recipes.data2vec.method import Data2VecMethod as Method

__all__ = ["Encoder", "Method"]
