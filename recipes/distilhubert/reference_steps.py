"""DistilHuBERT's step in another project, for tools/benchmark.py; a peer is named like the package that it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import ConfigError
from pretrain.method import Batch
from pretrain.weights.interop.speech_encoder import config_to_fairseq
from recipes.distilhubert.interop import distiller_config
from recipes.distilhubert.method import DistilHubertConfig


class S3prlDistiller(nn.Module):
    """s3prl's `DistillerModel`, taught by fairseq's HuBERT in the copy that s3prl ships, which needs no fairseq.

    s3prl's package lacks its `DistillerForPretrain`; teacher, loss and precision are as there: float32 for the teacher,
    all of its hidden states by hooks, the chosen ones stacked. The teacher is in evaluation mode, as ours, which saves
    it the dropout that it has there.
    """

    def __init__(self, config: DistilHubertConfig) -> None:
        from s3prl.upstream.distiller.model import DistillerConfig, DistillerModel

        super().__init__()
        width = config.encoder.encoder_embed_dim
        self.config = config
        self.distiller = DistillerModel(DistillerConfig(distiller_config(asdict(config), width)))
        self.teacher = _teacher(config).requires_grad_(False)
        self._states: list[Tensor] = []
        for layer in self.teacher.encoder.layers:
            layer.register_forward_hook(lambda module, inputs, output: self._states.append(inputs[0].transpose(0, 1)))
        self.teacher.encoder.register_forward_hook(lambda module, inputs, output: self._states.append(output[0]))

    def train(self, mode: bool = True) -> S3prlDistiller:
        """The teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        waveforms, lengths = batch.waveforms, batch.lengths
        real = torch.arange(waveforms.shape[1], device=waveforms.device) < lengths.unsqueeze(1)
        prediction = self.distiller(waveforms, real.to(waveforms.dtype))[2]
        self._states.clear()
        with torch.no_grad(), torch.autocast(waveforms.device.type, enabled=False):
            self.teacher.extract_features(waveforms, padding_mask=~real, mask=None)
        frames = prediction.shape[2]  # fairseq pads to an even number of frames
        target = torch.stack([self._states[layer][:, :frames] for layer in self.config.pred_layer_id], dim=1)
        distance = nn.L1Loss(reduction="none")(prediction, target).mean()
        similarity = -F.logsigmoid(F.cosine_similarity(prediction, target, dim=-1)).mean()
        return (distance + self.config.cosine_loss * similarity) * batch.sample_size


def _teacher(config: DistilHubertConfig) -> Any:
    """The HuBERT of `config.teacher`. Raises ConfigError for another teacher."""
    from s3prl.upstream.hubert import hubert_model

    if config.teacher.method != "hubert" or config.teacher.encoder is None:
        raise ConfigError("method.teacher.method: the peer's teacher is a HuBERT; benchmark a recipe that has one")
    values, task = config_to_fairseq(config.teacher.encoder)
    known = hubert_model.HubertConfig.__dataclass_fields__
    values = {name: value for name, value in values.items() if name in known} | {"encoder_layerdrop": 0.0}
    return hubert_model.HubertModel(
        hubert_model.HubertConfig(**values, label_rate=50.0),
        hubert_model.HubertPretrainingConfig(normalize=task["normalize"]),
        [None],
    )


REFERENCE_STEPS: dict[str, Callable[[DistilHubertConfig], nn.Module]] = {"s3prl": S3prlDistiller}
