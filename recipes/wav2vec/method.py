"""wav2vec's and vq-wav2vec's configuration, negatives and loss.

Source: arXiv 1904.05862 and 1910.05453; `fairseq/models/wav2vec/wav2vec.py`, `fairseq/criterions/wav2vec_criterion.py`.
Letters: B rows, F frames, S steps, N negatives, G groups, V entries; U = F - offset frames are targets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from pretrain.config import ConfigError
from pretrain.losses.contrastive import draw_negatives
from pretrain.method import Batch, Counts, Example, Method, Progress, Ratio, StepOutput
from pretrain.models.conv_features import ConvFrames, receptive_field_samples, stride_samples
from pretrain.models.conv_features import frames as count_frames
from pretrain.objectives.collate import Stacked, stack_waveforms
from pretrain.quantizers.gumbel import GumbelVectorQuantizer, temperature_at
from recipes.wav2vec.encoder import Wav2VecEncoder, Wav2VecEncoderConfig
from recipes.wav2vec.kmeans_quantizer import KMeansVectorQuantizer
from recipes.wav2vec.loss import StepPredictor, candidate_logits, step_hits, step_loss


@dataclass
class QuantizerTrainingConfig:
    """How the codebooks of the encoder's quantizer are trained; `kind` is the quantizer's."""

    VARIANTS: ClassVar[dict[str, type[QuantizerTrainingConfig]]] = {}

    kind: str


@dataclass
class GumbelTrainingConfig(QuantizerTrainingConfig):
    """`vq_temp` is the temperature's start, its end and its decay per update.

    `diversity_loss_weight` multiplies the entries that the softmax leaves unused, groups times entries less
    `prob_perplexity`.
    """

    vq_temp: list[float]
    diversity_loss_weight: float

    def __post_init__(self) -> None:
        if len(self.vq_temp) != 3:
            raise ConfigError(
                f"method.quantizer_training.vq_temp: {self.vq_temp}; give start, end and decay per update"
            )


@dataclass
class KMeansTrainingConfig(QuantizerTrainingConfig):
    """`vq_gamma` is the weight of the commitment beside the codebook loss, `kmeans_loss_weight` that of both.

    `kmeans_init_std` is the spread of the first entries.
    """

    vq_gamma: float
    kmeans_loss_weight: float
    kmeans_init_std: float


QuantizerTrainingConfig.VARIANTS.update(gumbel=GumbelTrainingConfig, kmeans=KMeansTrainingConfig)


@dataclass
class Wav2VecConfig:
    """Published hyper-parameters; `quantizer_training` is of the kind of `encoder.quantizer`, null for wav2vec."""

    name: str
    encoder: Wav2VecEncoderConfig
    prediction_steps: int
    num_negatives: int
    quantizer_training: QuantizerTrainingConfig | None

    def __post_init__(self) -> None:
        used, trained = (block and block.kind for block in (self.encoder.quantizer, self.quantizer_training))
        if used != trained:
            raise ConfigError(
                f"method.quantizer_training: is {trained or 'null'} where method.encoder.quantizer is "
                f"{used or 'null'}; make both of one kind"
            )

    @staticmethod
    def upgraded(values: dict[str, Any]) -> dict[str, Any]:
        """A block of before `quantizer_training`: its fields flat, null for the other quantizer."""
        if "vq_temp" not in values:
            return values
        flat = ("vq_temp", "diversity_loss_weight", "vq_gamma", "kmeans_loss_weight", "kmeans_init_std")
        given = {name: values[name] for name in flat if values.get(name) is not None}
        kind = "gumbel" if "vq_temp" in given else "kmeans"
        rest = {name: value for name, value in values.items() if name not in flat}
        return rest | {"quantizer_training": {"kind": kind, **given} if given else None}

    @property
    def offset(self) -> int:
        """Frames between a context frame and its nearest target, so that they share no sample: 3 for wav2vec."""
        layers = self.encoder.conv_feature_layers
        return math.ceil(receptive_field_samples(layers) / stride_samples(layers))


@dataclass(frozen=True)
class Wav2VecCollator(ConvFrames):
    """Draws the negatives of a batch; see `Wav2VecMethod` for what it puts into `extras`."""

    offset: int
    prediction_steps: int
    num_negatives: int

    def __call__(self, examples: list[Example]) -> Batch:
        stacked = stack_waveforms(examples)
        frames = int(count_frames(stacked.waveforms.shape[1], self.conv_feature_layers))
        valid = count_frames(stacked.lengths, self.conv_feature_layers).tolist()
        negatives = np.zeros((len(examples), frames, self.num_negatives), dtype=np.int64)
        for row, (example, count) in enumerate(zip(examples, valid, strict=True)):
            negatives[row, :count] = draw_negatives(example.rng, np.arange(count), count, self.num_negatives)
        return make_batch(
            stacked,
            negatives=negatives,
            valid=np.arange(frames) < np.array(valid)[:, None],
            offset=self.offset,
            steps=self.prediction_steps,
        )


def make_batch(
    stacked: Stacked,
    *,
    negatives: np.ndarray,
    valid: np.ndarray,
    offset: int,
    steps: int,
) -> Batch:
    """Assemble a batch from negatives (B, F, N), frame numbers within their row, and valid frames (B, F)."""
    count, frames = valid.shape
    own = np.broadcast_to(np.arange(frames)[None, :, None], (count, frames, 1))
    candidates = np.concatenate([own, negatives], axis=2) + frames * np.arange(count)[:, None, None]
    targets = np.arange(max(0, frames - offset))
    scored = valid[:, offset:, None] & (targets[:, None] >= np.arange(steps))
    extras = {
        "candidates": candidates[:, offset:],
        "scored": scored,
        "valid": valid,
        "valid_positions": np.flatnonzero(valid),
    }
    return stacked.batch(int(scored.sum()), extras)


class Targets(NamedTuple):
    """`frames` (B, F, E) what the aggregator sees and the steps predict; `codes` (B, F, G) of these, None without a
    codebook; `losses` () of the quantizer by name, weighted, as means; `metrics` of the codebooks.
    """

    frames: Tensor
    codes: Tensor | None
    losses: dict[str, Tensor]
    metrics: dict[str, Ratio | Counts]


class Wav2VecMethod(Method):
    """Encoder and step predictions; the loss tells the next frames from others of the same clip.

    Reads `batch.extras`: `candidates` (B, U, 1 + N) int64 flat frame positions, each target frame's own and then its
    negatives; `scored` (B, U, S) bool, True where step i leads from a frame of the clip to this target; `valid` (B, F)
    bool and `valid_positions` (M,) int64, the frames that are no padding.
    """

    Config = Wav2VecConfig
    config: Wav2VecConfig
    encoder: Wav2VecEncoder

    def __init__(self, config: Wav2VecConfig) -> None:
        super().__init__(config)
        self.encoder = Wav2VecEncoder(config.encoder)
        if isinstance(config.quantizer_training, KMeansTrainingConfig):
            std = config.quantizer_training.kmeans_init_std
            quantizer = self.encoder.vector_quantizer
            assert isinstance(quantizer, KMeansVectorQuantizer)  # the configuration has checked that the kinds agree
            torch.nn.init.normal_(quantizer.embedding, std=std)
        target_dim, context_dim = self.encoder.hidden_sizes[0], self.encoder.hidden_sizes[-1]
        self.wav2vec_predictions = StepPredictor(context_dim, target_dim, config.prediction_steps)

    @classmethod
    def collator(cls, config: Wav2VecConfig) -> Wav2VecCollator:
        """The collator of this configuration."""
        return Wav2VecCollator(
            conv_feature_layers=config.encoder.conv_feature_layers,
            offset=config.offset,
            prediction_steps=config.prediction_steps,
            num_negatives=config.num_negatives,
        )

    def before_step(self, progress: Progress) -> None:
        """Set the temperature of this update, beside what every method does."""
        super().before_step(progress)
        training = self.config.quantizer_training
        if isinstance(training, GumbelTrainingConfig):
            quantizer = self.encoder.vector_quantizer
            assert isinstance(quantizer, GumbelVectorQuantizer)
            quantizer.temperature = temperature_at(progress.update, *training.vq_temp)

    def forward(self, batch: Batch) -> StepOutput:
        """Loss terms in nats per positive; `accuracy` the share of positives above all negatives, see `step_hits`."""
        targets = self.latent_targets(batch)
        context = self.encoder.context(targets.frames)[-1]
        logits = self.logits(context, targets.frames, batch)
        with torch.autocast(logits.device.type, enabled=False):
            prediction = step_loss(logits, batch.extras["scored"])
        hits = step_hits(logits, batch.extras["scored"], batch.extras["candidates"], targets.codes)
        metrics = targets.metrics
        for name, mean in targets.losses.items():
            metrics[f"loss_{name}"] = Ratio(mean.detach(), 1.0)
        mean_loss = cast(Tensor, sum(targets.losses.values())) if targets.losses else None
        output = StepOutput(prediction, metrics, mean=mean_loss)
        metrics["loss_prediction"] = Ratio(prediction.detach(), batch.sample_size)
        metrics["accuracy"] = Ratio(hits, batch.sample_size)
        return output

    def logits(self, context: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        """(B, U, S, 1 + N) logits of context (B, F, C) against targets (B, F, E), the true target first."""
        candidates = batch.extras["candidates"]
        return candidate_logits(self.wav2vec_predictions(context[:, : candidates.shape[1]]), targets, candidates)

    def latent_targets(self, batch: Batch) -> Targets:
        """Latent frames of the batch, quantized where the encoder has a codebook."""
        z = self.encoder.features(batch.waveforms)
        quantizer = self.encoder.vector_quantizer
        if isinstance(quantizer, GumbelVectorQuantizer):
            return self._gumbel(quantizer, z, batch)
        if isinstance(quantizer, KMeansVectorQuantizer):
            return self._kmeans(quantizer, z, batch)
        return Targets(z, None, {}, {})

    def _gumbel(self, quantizer: GumbelVectorQuantizer, z: Tensor, batch: Batch) -> Targets:
        flat, positions = z.flatten(0, 1), batch.extras["valid_positions"]
        # Padding has no part in how the codebook is used; the aggregator sees zeros there.
        quantized = quantizer(flat.index_select(0, positions) if batch.padded else flat)
        vectors, codes = quantized.vectors, quantized.codes
        if batch.padded:
            vectors = vectors.new_zeros(flat.shape).index_copy(0, positions, vectors)
            codes = codes.new_zeros(len(flat), quantizer.groups).index_copy(0, positions, codes)
        metrics = _histograms(quantized.counts)
        metrics["prob_perplexity"] = Ratio(quantized.prob_perplexity.detach(), 1.0)
        metrics["temperature"] = Ratio(torch.full((), quantizer.temperature, device=z.device), 1.0)
        unused = quantizer.groups * quantizer.num_vars - quantized.prob_perplexity
        assert isinstance(self.config.quantizer_training, GumbelTrainingConfig)
        weight = self.config.quantizer_training.diversity_loss_weight
        losses = {"diversity": weight * unused} if weight else {}
        return Targets(vectors.view(z.shape), codes.unflatten(0, z.shape[:2]), losses, metrics)

    def _kmeans(self, quantizer: KMeansVectorQuantizer, z: Tensor, batch: Batch) -> Targets:
        quantized = quantizer(z, batch.extras["valid"] if batch.padded else None)
        training = self.config.quantizer_training
        assert isinstance(training, KMeansTrainingConfig)
        loss = quantized.codebook_loss + training.vq_gamma * quantized.commitment_loss
        losses = {"kmeans": training.kmeans_loss_weight * loss}
        codes = quantized.codes.flatten(0, 1).index_select(0, batch.extras["valid_positions"]).T
        counts = torch.zeros(quantizer.groups, quantizer.num_vars, device=z.device)
        counts.scatter_add_(1, codes, torch.ones_like(codes, dtype=counts.dtype))
        return Targets(quantized.vectors, quantized.codes, losses, _histograms(counts))

    def training_flops(self, samples: int) -> float:
        """Encoder, step matrices, and products with the candidates."""
        frames = count_frames(samples, self.config.encoder.conv_feature_layers)
        head = self.wav2vec_predictions.project_to_steps.weight.numel()
        products = self.config.prediction_steps * (1 + self.config.num_negatives) * self.encoder.hidden_sizes[0]
        return self.encoder.training_flops(samples) + 3 * 2.0 * frames * (head + products)


def _histograms(counts: Tensor) -> dict[str, Ratio | Counts]:
    """How often each entry was taken, one histogram per group of (G, V)."""
    return {f"codes_{group}": Counts(row) for group, row in enumerate(counts)}
