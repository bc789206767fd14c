"""wav2vec 2.0's configuration, masks, distractors, quantizer and loss.

Source: arXiv 2006.11477; `fairseq/models/wav2vec/wav2vec2.py`, `fairseq/criterions/wav2vec_criterion.py`.
Letters: K masked frames per row, N negatives, G groups and V entries of the codebook, P projection width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.losses.contrastive import contrastive_logits, contrastive_loss, draw_negatives, guessed_hits
from pretrain.method import Batch, Counts, Example, Metric, Ratio, StepOutput
from pretrain.models.conv_features import stride_samples
from pretrain.models.kernels import Linear, dropout
from pretrain.models.speech_encoder import ConvOutput
from pretrain.objectives.collate import Stacked
from pretrain.objectives.masking import frames_at
from pretrain.objectives.quantized_targets import (
    MaskingCollator,
    QuantizedTargetsConfig,
    QuantizedTargetsMethod,
    masking_options,
)
from pretrain.quantizers.gumbel import Quantized
from recipes.wav2vec2.figures import similarity_figure


@dataclass
class Wav2Vec2Config(QuantizedTargetsConfig):
    """`feature_penalty_weight` is that of the squared convolution output."""

    feature_penalty_weight: float


@dataclass(frozen=True)
class Wav2Vec2Collator(MaskingCollator):
    """Draws masks and distractors of a batch; see `Wav2Vec2Method` for what it puts into `extras`."""

    def __call__(self, examples: list[Example]) -> Batch:
        drawn = self.draw(examples)
        masked = int(drawn.mask[0].sum())
        own = np.arange(masked)
        negatives = [draw_negatives(example.rng, own, masked, self.num_negatives) for example in examples]
        return make_batch(
            drawn.stacked,
            mask=drawn.mask,
            negatives=np.stack(negatives),
        )


def make_batch(stacked: Stacked, *, mask: np.ndarray, negatives: np.ndarray) -> Batch:
    """Assemble a batch from a (B, F) mask with K frames in every row and (B, K, N) `negatives` in 0 .. K - 1.

    Masked frames travel as flat positions b * F + f too, so that nothing on the device has to count them.
    """
    positions = np.flatnonzero(mask)
    extras = {"mask": mask, "masked_positions": positions, "negatives": negatives}
    return stacked.batch(len(positions), extras)


class Wav2Vec2Method(QuantizedTargetsMethod):
    """Encoder, quantizer and two projections; at every masked frame the encoder must name the quantized features.

    Reads `batch.extras`: `mask` (B, F) bool, True = hidden; `masked_positions` (B * K,) flat frame positions; and
    `negatives` (B, K, N) int64, ordinals of other masked frames of the row.
    """

    Config = Wav2Vec2Config
    config: Wav2Vec2Config

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__(config)
        self.project_q = Linear(config.latent_dim, config.final_dim)
        self.final_proj = Linear(config.encoder.encoder_embed_dim, config.final_dim)

    @classmethod
    def collator(cls, config: Wav2Vec2Config) -> Wav2Vec2Collator:
        """The collator of this configuration."""
        return Wav2Vec2Collator(**masking_options(config))

    def forward(self, batch: Batch) -> StepOutput:
        """Loss terms in nats per masked frame, weights included; means as fairseq forms them, per micro-batch."""
        features, predictions = self.predict(batch)
        quantized = self.quantize(features, batch.extras["masked_positions"])
        logits = self.logits(predictions, quantized, batch.extras["negatives"])
        contrastive, hits = contrastive_loss(logits)
        units = batch.sample_size
        entries = self.config.latent_groups * self.config.latent_vars
        diversity = self.config.diversity_weight * (entries - quantized.prob_perplexity) / entries
        penalty = self.config.feature_penalty_weight * features.conv.float().square().mean()
        metrics: dict[str, Metric] = {
            "loss_contrastive": Ratio(contrastive.detach(), units),
            "loss_diversity": Ratio.of_mean(diversity, units),
            "loss_features": Ratio.of_mean(penalty, units),
            "accuracy": Ratio(hits.float(), units),
            "chance": Ratio(guessed_hits(logits.detach()), units),
            "prob_perplexity": Ratio(quantized.prob_perplexity.detach(), 1.0),
            "temperature": Ratio(contrastive.new_full((), self.quantizer.temperature), 1.0),
        }
        for group, counts in enumerate(quantized.counts):
            metrics[f"codes_{group}"] = Counts(counts)
        return StepOutput(contrastive, metrics, mean=diversity + penalty)

    def predict(self, batch: Batch) -> tuple[ConvOutput, Tensor]:
        """The features of a batch, and what the encoder predicts at its masked frames: (B, K, P)."""
        mask, positions = batch.extras["mask"], batch.extras["masked_positions"]
        features = self.encoder.features(batch.waveforms, batch.lengths_if_padded)
        hidden = self.encoder.context(features.projected, features.frame_lengths, mask)[-1]
        masked = frames_at(hidden, positions)
        return features, self.final_proj(masked).view(len(mask), -1, self.config.final_dim)

    def quantize(self, features: ConvOutput, positions: Tensor) -> Quantized:
        """The codebook entries of the features at `positions` (N,), which are not masked."""
        masked = self.encoder.layer_norm(frames_at(features.conv, positions))
        return self.quantizer(dropout(masked, self.config.dropout_features, self.training))

    def logits(self, predictions: Tensor, quantized: Quantized, negatives: Tensor) -> Tensor:
        """(B, K, 1 + N), the true target first."""
        rows, masked, _ = predictions.shape
        targets = self.project_q(quantized.vectors).view(rows, masked, -1)
        entries = quantized.entries().view(rows, masked)
        return contrastive_logits(predictions, targets, targets, negatives, entries, entries, self.config.logit_temp)

    def training_flops(self, samples: int) -> float:
        """Encoder plus quantizer, projections and similarities at the masked frames."""
        config, width = self.config, self.config.encoder.encoder_embed_dim
        scored = config.mask_prob * samples / stride_samples(config.encoder.conv_feature_layers)
        conv_dim, entries = config.encoder.conv_feature_layers[-1][0], config.latent_groups * config.latent_vars
        per_frame: float = conv_dim * entries + entries * config.latent_dim // config.latent_groups
        per_frame += config.latent_dim * config.final_dim + width * config.final_dim + scored * config.final_dim
        return self.encoder.training_flops(samples) + 3 * 2 * scored * per_frame

    def figures(self, batch: Batch) -> dict[str, Any]:
        """How like the first utterance's predictions are to its targets."""
        features, predictions = self.predict(batch)
        quantized = self.quantize(features, batch.extras["masked_positions"])
        count = predictions.shape[1]
        targets = self.project_q(quantized.vectors[:count])
        similarity = torch.cosine_similarity(predictions[0, :, None].float(), targets[None].float(), dim=-1)
        return {"similarity": similarity_figure(similarity.cpu(), quantized.codes[:count].cpu())}
