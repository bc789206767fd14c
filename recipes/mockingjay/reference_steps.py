"""The training step of s3prl's own pre-training, for tools/benchmark.py; a peer is named like the package it needs.

s3prl computes features and alterations in the workers of its data loader, one utterance after the other. Here its
pre-processor runs on the whole batch and the alteration is the batch's, so that the steps do the same work. Its expert
class cannot be imported beside a package named pretrain: the network is put together from the two modules that it
consists of, with its loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from pretrain.bench.pipeline import S3prlTraining
from pretrain.config import ConfigError
from pretrain.method import Batch
from pretrain.models.positions import SinusoidalPositions
from recipes.mockingjay.alterations import alter, band_mask
from recipes.mockingjay.interop import audio_config, task_config, transformer_config
from recipes.mockingjay.method import MockingjayConfig


class S3prlMockingjay(nn.Module):
    """`TransformerModel` and `TransformerSpecPredictionHead` of s3prl, on features of its `OnlinePreprocessor`."""

    def __init__(self, config: MockingjayConfig) -> None:
        from s3prl.upstream.baseline.preprocessor import get_preprocessor
        from s3prl.upstream.mockingjay.model import TransformerConfig, TransformerModel, TransformerSpecPredictionHead

        super().__init__()
        encoder, target = asdict(config.encoder), asdict(config)["target"]
        if encoder["front_end"]["kind"] == "fbank":
            raise ConfigError(
                "method.encoder.front_end: s3prl's filter banks take one waveform; benchmark a log_mel recipe"
            )
        self.config = config
        self.extract, heard, predicted = get_preprocessor(audio_config(encoder["front_end"], target))
        model_config = TransformerConfig(transformer_config(encoder))
        self.model = TransformerModel(model_config, heard)
        self.head = TransformerSpecPredictionHead(model_config, predicted)
        self.level = 10 ** (encoder["front_end"]["level_db"] / 20)
        self.positions = SinusoidalPositions(model_config.hidden_size)

    def forward(self, batch: Batch) -> Tensor:
        """The summed loss of a batch without padding."""
        with torch.no_grad(), torch.autocast(batch.waveforms.device.type, enabled=False):
            heard, truth = self._features(batch.waveforms)
            altered = alter(heard, batch.extras, self.config.alteration)
            label = batch.extras["mask"].unsqueeze(2) | band_mask(batch.extras["band"], truth.shape[2]).unsqueeze(1)
        positions = self.positions(truth.shape[1], truth.device).expand(len(truth), -1, -1)
        hidden = self.model(altered, positions, torch.ones(truth.shape[:2], device=truth.device), False)
        predictions, _ = self.head(hidden)
        error = nn.functional.l1_loss(predictions.masked_select(label).float(), truth.masked_select(label))
        return error * batch.sample_size

    def _features(self, waveforms: Tensor) -> tuple[Tensor, Tensor]:
        rms = waveforms.square().mean(1, keepdim=True).sqrt()
        scaled = (waveforms * (self.level / (rms + 1e-10))).unsqueeze(1)
        heard, truth = self.extract(scaled, wavs_len=[waveforms.shape[1]] * len(waveforms))
        return heard, truth


def s3prl_training(config: MockingjayConfig) -> S3prlTraining:
    """`s3prl/pretrain/tera` with the runner's optimiser of `config_runner.yaml`."""
    values = asdict(config)
    front_end = values["encoder"]["front_end"]
    blocks = {
        "transformer": transformer_config(values["encoder"]),
        "task": task_config(values),
        "audio": audio_config(front_end, values["target"]),
    }
    optimizer = {"name": "AdamW_with_schedule", "lr": 2e-4, "warmup_proportion": 0.07}
    # Its data set of filter banks compares lengths in samples with a number of frames; a batch holds masks of frames.
    samples = 1 if front_end["kind"] == "fbank" else 160
    return S3prlTraining("tera", blocks, optimizer, samples_per_timestep=samples, lengths_item=3)


REFERENCE_STEPS: dict[str, Callable[[MockingjayConfig], nn.Module]] = {"s3prl": S3prlMockingjay}
