"""NPC's training step in s3prl, for tools/benchmark.py: the model of its pre-training on the features of its front end.

Like s3prl's data loader the peer computes the features one utterance at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.bench.pipeline import S3prlTraining
from pretrain.method import Batch
from pretrain.weights.interop.s3prl_fbank import audio_of, vq_of
from recipes.npc.interop import FIXED, SHAPE
from recipes.npc.method import NpcConfig


class S3prlNpc(nn.Module):
    """`s3prl.upstream.npc.npc.NPC` with the loss of `s3prl/pretrain/npc/pretrain_expert.py`."""

    def __init__(self, config: NpcConfig) -> None:
        from s3prl.upstream.npc.audio import create_transform
        from s3prl.upstream.npc.npc import NPC

        super().__init__()
        encoder = asdict(config.encoder)
        self.extract, dim = create_transform(audio_of(encoder["front_end"]))
        self.model = NPC(dim, **{name: encoder[name] for name in SHAPE}, **FIXED, **vq_of(encoder["quantizer"]))

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch without padding, summed over its frames."""
        features = torch.stack([self.extract(waveform.unsqueeze(0)) for waveform in batch.waveforms])
        predicted, _ = self.model(features)
        return F.l1_loss(predicted, features, reduction="none").mean(-1).sum()


def s3prl_training(config: NpcConfig) -> S3prlTraining:
    """`s3prl/pretrain/npc` with the runner's optimiser of `config_runner.yaml`."""
    encoder = asdict(config.encoder)
    paras = {name: encoder[name] for name in SHAPE} | FIXED | vq_of(encoder["quantizer"])
    blocks = {"model": {"paras": paras}, "task": {}, "data": {"audio": audio_of(encoder["front_end"])}}
    return S3prlTraining("npc", blocks, {"name": "Adam", "lr": 1e-3}, samples_per_timestep=1, lengths_item=1)


REFERENCE_STEPS: dict[str, Callable[[NpcConfig], nn.Module]] = {"s3prl": S3prlNpc}
