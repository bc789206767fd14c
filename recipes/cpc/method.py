"""CPC's configuration, negatives, prediction heads and loss.

Sources: arXiv 1807.03748; arXiv 2002.02848; facebookresearch/CPC_audio `cpc/criterion/criterion.py`.
Letters: B windows, F frames, K steps, W = F - K contexts per window, P scored contexts of the batch, N negatives.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.config import ConfigError, nearest
from pretrain.losses.contrastive import contrastive_loss
from pretrain.method import Batch, CollatorDefaults, Example, Method, Ratio, StepOutput
from pretrain.models.kernels import linear
from pretrain.objectives.collate import stack_waveforms
from recipes.cpc.encoder import CpcEncoder, CpcEncoderConfig
from recipes.cpc.figures import prediction_figure
from recipes.cpc.transformer import CausalLayers

SCOPES = ("batch", "window")
PREDICTORS = ("linear", "transformer")


@dataclass
class CpcConfig:
    """Published hyper-parameters.

    `steps` are predicted ahead, each against `negatives` vectors z from the windows of the micro-batch
    (`negatives_from: batch`; windows of one speaker with `batch.within`) or from the context's own window (`window`).
    `predictor` is linear or transformer; the transformer reads `predictor_heads`, `predictor_ffn_dim`,
    `predictor_dropout` and `window_frames`, the longest window that it takes.
    """

    name: str
    encoder: CpcEncoderConfig
    steps: int
    negatives: int
    negatives_from: str
    predictor: str
    predictor_heads: int
    predictor_ffn_dim: int
    predictor_dropout: float
    window_frames: int

    def __post_init__(self) -> None:
        if self.negatives_from not in SCOPES:
            known = nearest(self.negatives_from, list(SCOPES))
            raise ConfigError(f"method.negatives_from: unknown scope '{self.negatives_from}'; {known}")
        if self.predictor not in PREDICTORS:
            known = nearest(self.predictor, list(PREDICTORS))
            raise ConfigError(f"method.predictor: unknown kind '{self.predictor}'; {known}")
        if min(self.steps, self.negatives) < 1:
            raise ConfigError("method.steps, method.negatives: both must be positive")
        if self.predictor == "transformer" and self.encoder.context_dim != self.encoder.dim:
            raise ConfigError(
                f"method.encoder.context_dim: transformer predictors keep the width, which must be that of z; set "
                f"{self.encoder.dim}, or method.predictor=linear"
            )
        if self.predictor == "transformer" and self.window_frames <= self.steps:
            raise ConfigError(
                f"method.window_frames: {self.window_frames} frames leave none beyond the steps; raise it"
            )


@dataclass(frozen=True)
class CpcCollator(CollatorDefaults):
    """Draws the negatives of a batch; see `CpcMethod` for what it puts into `extras`."""

    encoder: CpcEncoderConfig
    steps: int
    negatives: int
    negatives_from: str
    max_frames: int | None

    @property
    def stride_samples(self) -> int:
        """Samples from one frame to the next."""
        return self.encoder.stride_samples

    @property
    def receptive_field_samples(self) -> int:
        """One stride: the convolutions pad, so every stride of a crop gives a frame, the first one too."""
        return self.encoder.stride_samples

    def __call__(self, examples: list[Example]) -> Batch:
        stacked = stack_waveforms(examples)
        frames = self.encoder.frames(stacked.waveforms.shape[1])
        if self.max_frames is not None and frames > self.max_frames:
            raise ConfigError(
                f"crop.max_seconds: windows of {frames} frames, but the transformer predictors take "
                f"{self.max_frames}; lower it, or raise method.window_frames"
            )
        counts = np.array([self.encoder.frames(int(length)) for length in stacked.lengths])
        windows = [np.arange(max(0, count - self.steps)) for count in counts]
        contexts = [row * max(0, frames - self.steps) + times for row, times in enumerate(windows)]
        targets = [row * frames + times for row, times in enumerate(windows)]
        pairs = enumerate(zip(examples, windows, strict=True))
        negatives = [self._negatives(example.rng, row, times, counts, frames) for row, (example, times) in pairs]
        extras = {
            "contexts": np.concatenate(contexts),
            "targets": np.concatenate(targets),
            "negatives": np.concatenate(negatives, axis=1),
        }
        return stacked.batch(len(extras["targets"]), extras)

    def _negatives(
        self, rng: np.random.Generator, row: int, times: np.ndarray, counts: np.ndarray, frames: int
    ) -> np.ndarray:
        """(directions, W, N) flat frame positions for the contexts of one window.

        A window uniformly, then a frame of it uniformly, except the context's own time (`sampleClean`). What is
        excluded is time t in every window, and not the positive t + k of the own window.
        """
        shape = (2 if self.encoder.bidirectional else 1, len(times), self.negatives)
        within = self.negatives_from == "window"
        chosen = np.full(shape, row) if within else rng.integers(len(counts), size=shape)
        count = counts[chosen]
        offset = 1 + (rng.random(shape) * (count - 1)).astype(np.int64)
        return chosen * frames + (times[:, None] + offset) % count


class LinearPredictors(nn.Module):
    """One matrix per step, without bias: (B, W, C) to (K, B, W, D).

    Where z is wider than the context, the first rows start from N(0, 1) and the others from a hundredth of it
    (CPC_audio, PredictionNetwork); else as `nn.Linear` does.
    """

    def __init__(self, steps: int, context_dim: int, dim: int) -> None:
        super().__init__()
        weight = torch.empty(steps, dim, context_dim).uniform_(-(context_dim**-0.5), context_dim**-0.5)
        if dim > context_dim:
            weight = torch.randn(steps, dim, context_dim)
            weight[:, context_dim:] *= 0.01
        self.weight = nn.Parameter(weight)

    def forward(self, contexts: Tensor) -> Tensor:
        predictions = linear(contexts, self.weight.flatten(0, 1))
        return predictions.unflatten(2, self.weight.shape[:2]).permute(2, 0, 1, 3)

    def forward_flops(self, frames: int) -> float:
        """Floating-point operations of one forward of `frames` contexts."""
        return 2.0 * frames * self.weight.numel()


class CpcMethod(Method):
    """Encoder and one predictor per step and direction; the loss tells z[t + k] from negatives by c[t].

    Reads `batch.extras`, int64: `contexts` (P,) flat positions b * W + t of the scored contexts, `targets` (P,) the
    same frames as b * F + t, so that step k finds its positive k further on; `negatives` (directions, P, N) positions
    b * F + t, shared by all steps. All count in the direction of reading.
    """

    Config = CpcConfig
    config: CpcConfig
    encoder: CpcEncoder

    def __init__(self, config: CpcConfig) -> None:
        super().__init__(config)
        self.encoder = CpcEncoder(config.encoder)
        self.predictors = nn.ModuleList(self._predictors() for _ in self.encoder.contexts)

    def _predictors(self) -> nn.Module:
        config = self.config
        if config.predictor == "linear":
            return LinearPredictors(config.steps, config.encoder.context_dim, config.encoder.dim)
        return CausalLayers(
            config.steps,
            config.encoder.dim,
            config.predictor_heads,
            config.predictor_ffn_dim,
            config.window_frames - config.steps,
            config.predictor_dropout,
        )

    @classmethod
    def collator(cls, config: CpcConfig) -> CpcCollator:
        """The collator of this configuration."""
        max_frames = config.window_frames if config.predictor == "transformer" else None
        return CpcCollator(config.encoder, config.steps, config.negatives, config.negatives_from, max_frames)

    def forward(self, batch: Batch) -> StepOutput:
        """Cross-entropies in nats, summed over contexts, steps and directions; `loss_step_k` is per prediction."""
        z, frame_lengths = self.encoder.features(batch.waveforms, batch.lengths_if_padded)
        readings = self.encoder.readings(z, frame_lengths)
        predictions = batch.sample_size * len(readings)
        losses, hits = [], []
        for direction, reading in enumerate(readings):
            scored = [contrastive_loss(step) for step in self.logits(batch, direction, *reading)]
            losses.append(torch.stack([loss for loss, _ in scored]))
            hits.append(torch.stack([hit for _, hit in scored]).float())
        step_loss, step_hits = torch.stack(losses).sum(0), torch.stack(hits).sum(0)
        loss = step_loss.sum()
        metrics = {
            "accuracy": Ratio(step_hits.sum(), predictions * self.config.steps),
            "latent_variance": Ratio(z.detach().float().flatten(0, 1).var(0).mean(), 1.0, role="feature_variance"),
        }
        for k, step in enumerate(step_loss.detach(), start=1):
            metrics[f"loss_step_{k}"] = Ratio(step, predictions)
        for k in sorted({1, (self.config.steps + 1) // 2, self.config.steps}):
            metrics[f"accuracy_step_{k}"] = Ratio(step_hits[k - 1], predictions)
        if len(readings) > 1:
            for name, total in zip(("forward", "backward"), hits, strict=True):
                metrics[f"accuracy_{name}"] = Ratio(total.sum(), batch.sample_size * self.config.steps)
        return StepOutput(loss, metrics)

    def logits(self, batch: Batch, direction: int, z: Tensor, c: Tensor) -> Tensor:
        """z (B, F, D) and c (B, F, C) in one direction of reading to (K, P, 1 + N) float32, the positive first.

        A score is the mean, not the sum, of the products of prediction and z. The negatives are copied once, and all
        steps are scored by one product: at eight windows that costs as much as scoring all frames, at more it is
        cheaper.
        """
        steps, dim = self.config.steps, z.shape[-1]
        contexts, targets = batch.extras["contexts"], batch.extras["targets"]
        predicted = self.predictors[direction](c[:, : c.shape[1] - steps]).flatten(1, 2)
        if batch.padded:
            predicted = predicted.index_select(1, contexts)
        negatives = batch.extras["negatives"][direction]
        positives = targets.unsqueeze(1) + torch.arange(1, steps + 1, device=z.device)
        with torch.autocast(z.device.type, enabled=False):
            predicted, frames = predicted.float(), z.float().flatten(0, 1)
            others = frames.index_select(0, negatives.flatten()).view(*negatives.shape, dim)
            against = others @ predicted.permute(1, 2, 0)
            true = frames.index_select(0, positives.flatten()).view(*positives.shape, dim)
            own = (true * predicted.transpose(0, 1)).sum(2).unsqueeze(1)
            # A negative may be the positive itself: rounding shall not decide which of the two scores higher.
            same = negatives.unsqueeze(2) == positives.unsqueeze(1)
            return torch.cat([own, torch.where(same, own, against)], dim=1).permute(2, 0, 1) / dim

    def training_flops(self, samples: int) -> float:
        """Encoder, predictors and scores."""
        config = self.config
        contexts = max(0, config.encoder.frames(samples) - config.steps)
        scores = 2.0 * contexts * config.steps * (config.negatives + 1) * config.encoder.dim
        predictors = cast(Iterable[LinearPredictors | CausalLayers], self.predictors)
        heads = sum(predictor.forward_flops(contexts) + scores for predictor in predictors)
        return self.encoder.training_flops(samples) + 3 * heads

    def figures(self, batch: Batch) -> dict[str, Any]:
        """How surely every context of the first window tells each step from its negatives."""
        z, frame_lengths = self.encoder.features(batch.waveforms, batch.lengths_if_padded)
        logits = self.logits(batch, 0, *self.encoder.readings(z, frame_lengths)[0])
        contexts = int((batch.extras["targets"] < z.shape[1]).sum())
        probabilities = logits[:, :contexts].softmax(-1)[..., 0].detach().cpu()
        waveform = batch.waveforms[0, : int(batch.lengths[0])].cpu().float()
        return {"predictions": prediction_figure(waveform, probabilities, self.encoder.config.stride_samples)}
