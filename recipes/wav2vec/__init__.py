"""wav2vec and vq-wav2vec: telling the future frames of a clip from others (arXiv 1904.05862, 1910.05453)."""

from recipes.wav2vec.encoder import Wav2VecEncoder as Encoder
from recipes.wav2vec.method import Wav2VecMethod as Method

__all__ = ["Encoder", "Method"]
