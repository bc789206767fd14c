"""data2vec's training step in another project, for tools/benchmark.py; a peer is named like the package it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.losses.regression import mean_deviation
from pretrain.method import Batch
from pretrain.weights.interop.speech_encoder import config_to_fairseq
from recipes.data2vec.interop import FIXED_OPTIONS, OPTIONS
from recipes.data2vec.method import Data2VecConfig


class S3prlData2Vec(nn.Module):
    """fairseq's `Data2VecAudioModel` in the copy that s3prl ships, which needs no fairseq."""

    def __init__(self, config: Data2VecConfig) -> None:
        from s3prl.upstream.data2vec import data2vec_model

        super().__init__()
        values = config_to_fairseq(asdict(config.encoder))[0] | {"encoder_layerdrop": 0.0} | FIXED_OPTIONS
        values |= {name: getattr(config, name) for name in OPTIONS}
        known = data2vec_model.Data2VecAudioConfig.__dataclass_fields__
        fields = {name: value for name, value in values.items() if name in known}
        self.normalize = config.encoder.normalize
        self.model = data2vec_model.Data2VecAudioModel(data2vec_model.Data2VecAudioConfig(**fields))
        # Its own way of making the teacher is broken: the configuration class takes no arguments.
        copied = {f"pos_conv.{name}" for name, _ in self.model.encoder.pos_conv.named_parameters()}
        self.model.ema = data2vec_model.EMAModule(
            self.model.encoder,
            SimpleNamespace(ema_decay=config.ema_decay, ema_fp32=True),
            skip_keys=copied if config.ema_layers_only else set(),
        )
        # Inside a process group theirs works on a GPU, which may be absent; the loss does not depend on it.
        self.model.compute_var = mean_deviation

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch without padding."""
        waveforms = batch.waveforms
        # fairseq's data set normalises, one waveform at a time; ours does it in the encoder.
        if self.normalize:
            waveforms = F.layer_norm(waveforms, waveforms.shape[1:])
        mask = batch.extras["mask"]
        self.model.apply_mask = lambda x, padding_mask, **_: self._apply_mask(x, mask)
        return self.model(waveforms)["losses"]["regression"]

    def _apply_mask(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What it does with the mask that it would draw here; the cast lets it run under autocast."""
        x[mask] = self.model.mask_emb.to(x.dtype)
        return x, mask


REFERENCE_STEPS: dict[str, Callable[[Data2VecConfig], nn.Module]] = {"s3prl": S3prlData2Vec}
