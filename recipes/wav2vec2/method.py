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

from pretrain.config import ConfigError
from pretrain.data.collate import stack_waveforms
from pretrain.losses.contrastive import contrastive_logits, contrastive_loss, draw_negatives, guessed_hits
from pretrain.masking import equal_span_masks
from pretrain.method import Batch, Counts, Example, Method, Progress, Ratio, StepOutput
from pretrain.models.conv_features import ConvFrames, stride_samples, valid_frames
from pretrain.models.conv_features import frames as count_frames
from pretrain.models.kernels import Linear, dropout
from pretrain.models.speech_encoder import ConvOutput, SpeechEncoder, SpeechEncoderConfig
from pretrain.quantizers.gumbel import GumbelVectorQuantizer, Quantized, temperature_at
from recipes.wav2vec2.figures import similarity_figure


@dataclass
class Wav2Vec2Config:
    """Published hyper-parameters; `latent_temp` is the Gumbel temperature's [start, end, decay per update]."""

    name: str
    encoder: SpeechEncoderConfig
    final_dim: int
    latent_vars: int
    latent_groups: int
    latent_dim: int
    latent_temp: list[float]
    num_negatives: int
    logit_temp: float
    mask_prob: float
    mask_length: int
    mask_min_spans: int
    dropout_features: float
    diversity_weight: float
    feature_penalty_weight: float

    def __post_init__(self) -> None:
        if len(self.latent_temp) != 3:
            raise ConfigError(f"method.latent_temp: {self.latent_temp}; state start, end and decay")
        if self.latent_dim % self.latent_groups:
            raise ConfigError(
                f"method.latent_dim: {self.latent_dim} does not divide into {self.latent_groups} groups; change one"
            )
        if self.num_negatives < 1:
            raise ConfigError(f"method.num_negatives: {self.num_negatives}; a contrast needs one at least")


@dataclass(frozen=True)
class Wav2Vec2Collator(ConvFrames):
    """Draws masks and distractors of a batch; see `Wav2Vec2Method` for what it puts into `extras`."""

    frame_length_rule: str
    mask_prob: float
    mask_length: int
    mask_min_spans: int
    num_negatives: int

    def __call__(self, examples: list[Example]) -> Batch:
        waveforms, lengths, padded = stack_waveforms(examples)
        samples = waveforms.shape[1]
        frames = int(count_frames(samples, self.conv_feature_layers))
        valid = valid_frames(lengths, samples, frames, self.conv_feature_layers, self.frame_length_rule).tolist()
        rngs = [example.rng for example in examples]
        mask = equal_span_masks(rngs, valid, frames, self.mask_prob, self.mask_length, self.mask_min_spans)
        masked = int(mask[0].sum())
        negatives = [draw_negatives(rng, np.arange(masked), masked, self.num_negatives) for rng in rngs]
        return make_batch(
            waveforms=waveforms,
            lengths=lengths,
            padded=padded,
            rows=torch.tensor([example.row for example in examples]),
            mask=mask,
            negatives=np.stack(negatives),
        )


def make_batch(
    *, waveforms: Tensor, lengths: Tensor, padded: bool, rows: Tensor, mask: np.ndarray, negatives: np.ndarray
) -> Batch:
    """Assemble a batch from a (B, F) mask with K frames in every row and (B, K, N) `negatives` in 0 .. K - 1.

    Masked frames travel as flat positions b * F + f too, so that nothing on the device has to count them.
    """
    positions = np.flatnonzero(mask)
    extras = {"mask": mask, "masked_positions": positions, "negatives": negatives}
    return Batch(
        waveforms=waveforms,
        lengths=lengths,
        sample_size=len(positions),
        rows=rows,
        padded=padded,
        extras={name: torch.from_numpy(value) for name, value in extras.items()},
    )


class Wav2Vec2Method(Method):
    """Encoder, quantizer and two projections; at every masked frame the encoder must name the quantized features.

    Reads `batch.extras`: `mask` (B, F) bool, True = hidden; `masked_positions` (B * K,) flat frame positions; and
    `negatives` (B, K, N) int64, ordinals of other masked frames of the row.
    """

    Config = Wav2Vec2Config
    config: Wav2Vec2Config
    encoder: SpeechEncoder

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__(config)
        self.encoder = SpeechEncoder(config.encoder)
        conv_dim = config.encoder.conv_feature_layers[-1][0]
        self.quantizer = GumbelVectorQuantizer(conv_dim, config.latent_vars, config.latent_groups, config.latent_dim)
        self.quantizer.temperature = config.latent_temp[0]
        self.project_q = Linear(config.latent_dim, config.final_dim)
        self.final_proj = Linear(config.encoder.encoder_embed_dim, config.final_dim)

    @classmethod
    def collator(cls, config: Wav2Vec2Config) -> Wav2Vec2Collator:
        """The collator of this configuration."""
        return Wav2Vec2Collator(
            conv_feature_layers=config.encoder.conv_feature_layers,
            frame_length_rule=config.encoder.frame_length_rule,
            mask_prob=config.mask_prob,
            mask_length=config.mask_length,
            mask_min_spans=config.mask_min_spans,
            num_negatives=config.num_negatives,
        )

    def before_step(self, progress: Progress) -> None:
        """Set the temperature and draw the layers that this update skips."""
        self.quantizer.temperature = temperature_at(progress.update, *self.config.latent_temp)
        self.encoder.draw_layerdrop(progress.rng())

    def forward(self, batch: Batch) -> StepOutput:
        """Loss terms in nats per masked frame, weights included; means as fairseq forms them, per micro-batch."""
        features, predictions = self.predict(batch)
        quantized = self.quantize(features, batch.extras["masked_positions"])
        logits = self.logits(predictions, quantized, batch.extras["negatives"])
        contrastive, hits = contrastive_loss(logits)
        units = batch.sample_size
        # The two penalties are means; times the unit count they survive the trainer's division as means.
        entries = self.config.latent_groups * self.config.latent_vars
        diversity = self.config.diversity_weight * (entries - quantized.prob_perplexity) / entries * units
        penalty = self.config.feature_penalty_weight * features.conv.float().square().mean() * units
        loss = contrastive + diversity + penalty
        metrics: dict[str, Ratio | Counts] = {
            "loss": Ratio(loss.detach(), units),
            "loss_contrastive": Ratio(contrastive.detach(), units),
            "loss_diversity": Ratio(diversity.detach(), units),
            "loss_features": Ratio(penalty.detach(), units),
            "accuracy": Ratio(hits.float(), units),
            "chance": Ratio(guessed_hits(logits.detach()), units),
            "prob_perplexity": Ratio(quantized.prob_perplexity.detach(), 1.0),
            "temperature": Ratio(loss.new_full((), self.quantizer.temperature), 1.0),
        }
        for group, counts in enumerate(quantized.counts):
            metrics[f"codes_{group}"] = Counts(counts)
        return StepOutput(loss, metrics)

    def predict(self, batch: Batch) -> tuple[ConvOutput, Tensor]:
        """The features of a batch, and what the encoder predicts at its masked frames: (B, K, P)."""
        mask, positions = batch.extras["mask"], batch.extras["masked_positions"]
        features = self.encoder.features(batch.waveforms, batch.lengths if batch.padded else None)
        hidden = self.encoder.context(features.projected, features.frame_lengths, mask)[-1]
        masked = hidden.flatten(0, 1).index_select(0, positions)
        return features, self.final_proj(masked).view(len(mask), -1, self.config.final_dim)

    def quantize(self, features: ConvOutput, positions: Tensor) -> Quantized:
        """The codebook entries of the features at `positions` (N,), which are not masked."""
        masked = self.encoder.layer_norm(features.conv.flatten(0, 1).index_select(0, positions))
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
        per_frame = conv_dim * entries + entries * config.latent_dim // config.latent_groups
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
