"""APC's training step in s3prl, for tools/benchmark.py: the model of its pre-training on the features of its front end.

Like s3prl's data loader the peer computes the features one utterance at a time, and like its pre-training expert it
gives the model the list of lengths, with which the model packs its sequences before every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from pretrain.bench.pipeline import S3prlTraining
from pretrain.config import ConfigError
from pretrain.method import Batch
from pretrain.weights.interop.s3prl_fbank import audio_of, vq_of
from recipes.apc.interop import SHAPE
from recipes.apc.method import ApcConfig


class S3prlApc(nn.Module):
    """`s3prl.upstream.apc.apc.APC` with the loss of `s3prl/pretrain/apc/pretrain_expert.py`."""

    def __init__(self, config: ApcConfig) -> None:
        from s3prl.upstream.apc.apc import APC
        from s3prl.upstream.apc.audio import create_transform

        super().__init__()
        if config.past:
            raise ConfigError("method.past: s3prl has no second objective; benchmark a recipe without it")
        encoder = asdict(config.encoder)
        self.time_shift = config.time_shift
        self.extract, dim = create_transform(audio_of(encoder["front_end"]))
        self.model = APC(dim, **{name: encoder[name] for name in SHAPE}, **vq_of(encoder["quantizer"]))
        self.loss = nn.L1Loss()

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch without padding, summed over its frames."""
        features = torch.stack([self.extract(waveform.unsqueeze(0)) for waveform in batch.waveforms])
        lengths = [features.shape[1] - self.time_shift] * len(features)
        predicted, _ = self.model(features[:, : -self.time_shift], lengths, testing=False)
        return self.loss(predicted, features[:, self.time_shift :]) * batch.sample_size


def s3prl_training(config: ApcConfig) -> S3prlTraining:
    """`s3prl/pretrain/apc` with the runner's optimiser of `config_runner.yaml`."""
    encoder = asdict(config.encoder)
    paras = {name: encoder[name] for name in SHAPE} | vq_of(encoder["quantizer"])
    blocks = {
        "model": {"paras": paras},
        "task": {"n_future": config.time_shift},
        "data": {"audio": audio_of(encoder["front_end"])},
    }
    return S3prlTraining("apc", blocks, {"name": "Adam", "lr": 1e-4}, samples_per_timestep=1, lengths_item=1)


REFERENCE_STEPS: dict[str, Callable[[ApcConfig], nn.Module]] = {"s3prl": S3prlApc}
