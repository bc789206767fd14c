"""wav2vec's training step in fairseq and in s3prl's copy of it, for tools/benchmark.py and the tests.

Each takes our configuration and our batch and returns the summed loss. The negatives are drawn in the forward, as they
ship it, so those of the batch are not used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.method import Batch
from recipes.wav2vec.interop import config_to_fairseq
from recipes.wav2vec.method import Wav2VecConfig


class OfficialWav2Vec(nn.Module):
    """A `Wav2VecModel` under the loss of fairseq's wav2vec criterion."""

    def __init__(self, config: Wav2VecConfig, model_class: type[nn.Module], config_class: Callable[..., Any]) -> None:
        super().__init__()
        self.config = config
        self.model: Any = model_class(config_class(**config_to_fairseq(asdict(config))))

    def forward(self, batch: Batch) -> Tensor:
        """The sum over the positives of an unpadded batch."""
        return self.loss(self.model(batch.waveforms), batch)

    def loss(self, result: dict[str, Any], batch: Batch) -> Tensor:
        """Of the model's output: binary cross-entropy, and what the quantizer adds."""
        labels = self.model.get_targets(None, result)
        loss = F.binary_cross_entropy_with_logits(result["cpc_logits"].float(), labels.float(), reduction="sum")
        training = self.config.quantizer_training
        weight = getattr(training, "kmeans_loss_weight", 0) or getattr(training, "diversity_loss_weight", 0)
        return loss + weight * self.model.get_extra_losses(result) * batch.sample_size if weight else loss


def s3prl_wav2vec(config: Wav2VecConfig) -> OfficialWav2Vec:
    """s3prl's copy."""
    from s3prl.upstream.wav2vec.wav2vec_model import Wav2VecConfig as TheirConfig
    from s3prl.upstream.wav2vec.wav2vec_model import Wav2VecModel

    return OfficialWav2Vec(config, Wav2VecModel, TheirConfig)


def fairseq_wav2vec(config: Wav2VecConfig) -> OfficialWav2Vec:
    """fairseq's own."""
    from fairseq.models.wav2vec.wav2vec import Wav2VecConfig as TheirConfig
    from fairseq.models.wav2vec.wav2vec import Wav2VecModel

    return OfficialWav2Vec(config, Wav2VecModel, TheirConfig)


REFERENCE_STEPS: dict[str, Callable[[Wav2VecConfig], nn.Module]] = {"s3prl": s3prl_wav2vec, "fairseq": fairseq_wav2vec}
