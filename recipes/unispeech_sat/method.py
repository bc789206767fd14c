"""UniSpeech-SAT: HuBERT's masked prediction, and at a middle layer a loss that tells utterances apart.

A recipe's block `augment` has the mixing of utterances (`pretrain/data/augment/`). Source: arXiv 2110.05752;
`src/fairseq/models/unispeech_sat/unispeech_sat.py` and `src/fairseq/criterions/hubert_criterion.py` of
microsoft/UniSpeech. Letters: B rows, F frames, D width of the encoder, N masked frames of all rows, M instances per
frame, P projection width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from pretrain.config import ConfigError
from pretrain.losses.contrastive import draw_negatives
from pretrain.method import Batch, Counts, Example, Metric, Progress, Ratio, StepOutput
from pretrain.models.conv_features import stride_samples
from pretrain.models.kernels import LayerNorm, Linear
from pretrain.objectives.masked_prediction import MaskedPrediction, MaskedPredictionConfig
from pretrain.objectives.masked_units import MaskedUnitsCollator
from pretrain.objectives.masking import frames_at
from pretrain.quantizers.gumbel import GumbelVectorQuantizer, Quantized, check_codebook, temperature_at
from recipes.unispeech_sat.contrast import Contrast, instance_logits, utterance_contrast


@dataclass
class UniSpeechSatConfig(MaskedPredictionConfig):
    """Published hyper-parameters; the names are the official code's, and see `MaskedPredictionConfig`.

    `utterance_contrastive_layer` counts from 1; each of its masked frames is compared with `cross_sample_instances`
    other masked frames of the micro-batch, quantized. `latent_temp` is the Gumbel temperature's [start, end, decay per
    update]. `utterance_contrastive_weight` and `diversity_weight` weigh the loss and that of the codebook during the
    first `utterance_contrastive_updates` updates (None: to the end); after them masked prediction trains alone.
    Raises ConfigError for values that do not go together.
    """

    utterance_contrastive_layer: int
    utterance_contrastive_weight: float
    utterance_contrastive_updates: int | None
    cross_sample_instances: int
    latent_vars: int
    latent_groups: int
    latent_dim: int
    latent_temp: list[float]
    diversity_weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_codebook(self.latent_temp, self.latent_groups, self.latent_dim)
        if self.encoder.is_conformer:
            raise ConfigError(
                "method.encoder.layer_type: conformer; UniSpeech-SAT's encoder is HuBERT's, so use transformer"
            )
        layers = self.encoder.encoder_layers
        if not 1 <= self.utterance_contrastive_layer < layers:
            raise ConfigError(
                f"method.utterance_contrastive_layer: {self.utterance_contrastive_layer} is no layer below the last of "
                f"{layers}; give 1 to {layers - 1}"
            )


@dataclass(frozen=True)
class UniSpeechSatCollator(MaskedUnitsCollator):
    """Draws masks, labels and instances of a batch; see `UniSpeechSatMethod` for what it puts into `extras`."""

    cross_sample_instances: int

    def __call__(self, examples: list[Example]) -> Batch:
        batch = super().__call__(examples)
        positions = batch.extras["masked_positions"].numpy()
        rows = positions // batch.extras["mask"].shape[1]
        # By the generator of the frame's own row, after its mask: masks are HuBERT's, and a restart changes nothing.
        drawn = [
            draw_negatives(example.rng, np.flatnonzero(rows == row), len(rows), self.cross_sample_instances)
            for row, example in enumerate(examples)
        ]
        batch.extras["instances"] = torch.from_numpy(np.concatenate(drawn))
        return batch


class UniSpeechSatMethod(MaskedPrediction):
    """HuBERT with a second loss: frames of a middle layer must find the quantized frames of their own utterance.

    Reads `batch.extras` as `MaskedPrediction` does, and `instances` (N, M) int64: for each masked frame, in the order
    of `masked_positions`, which other masked frames of the micro-batch it is compared with.
    """

    Config = UniSpeechSatConfig
    config: UniSpeechSatConfig

    def __init__(self, config: UniSpeechSatConfig) -> None:
        super().__init__(config)
        width = config.encoder.encoder_embed_dim
        self.quantizer = GumbelVectorQuantizer(width, config.latent_vars, config.latent_groups, config.latent_dim)
        self.quantizer.temperature = config.latent_temp[0]
        self.project_q = Linear(config.latent_dim, config.final_dim)
        self.spk_proj = Linear(width, config.final_dim)
        # Layers that have their norm first leave their output without one.
        self.layer_norm_for_extract = LayerNorm(width) if config.encoder.layer_norm_first else None
        self._contrasting = True

    @classmethod
    def collator(cls, config: MaskedPredictionConfig) -> UniSpeechSatCollator:
        """The collator of this configuration."""
        config = cast(UniSpeechSatConfig, config)
        shared = vars(super().collator(config))
        return UniSpeechSatCollator(**shared, cross_sample_instances=config.cross_sample_instances)

    def before_step(self, progress: Progress) -> None:
        """Set the temperature and the losses of this update, beside what every method does."""
        super().before_step(progress)
        self.quantizer.temperature = temperature_at(progress.update, *self.config.latent_temp)
        last = self.config.utterance_contrastive_updates
        self._contrasting = last is None or progress.update < last

    def forward(self, batch: Batch) -> StepOutput:
        """Terms of masked prediction as there; `loss_contrastive` and `loss_diversity` in nats, without weights."""
        features, hidden_states = self.encode(batch)
        output = self.prediction(batch, features, hidden_states[-1])
        contrast, quantized = self.contrast(hidden_states[self.config.utterance_contrastive_layer], batch)
        entries = self.config.latent_groups * self.config.latent_vars
        diversity = (entries - quantized.prob_perplexity) / entries
        added = self.config.utterance_contrastive_weight * contrast.loss + self.config.diversity_weight * diversity
        units = len(batch.extras["instances"])
        metrics: dict[str, Metric] = {
            **output.metrics,
            "loss_contrastive": Ratio.of_mean(contrast.loss, units),
            "loss_contrastive_of_share": Ratio.of_mean(contrast.loss_of_share, units),
            "loss_diversity": Ratio.of_mean(diversity, units),
            "contrastive_accuracy": Ratio.of_mean(contrast.accuracy, units),
            "contrastive_chance": Ratio.of_mean(contrast.chance, units),
            "mean_targets": Ratio.of_mean(contrast.share, units),
            "prob_perplexity": Ratio(quantized.prob_perplexity.detach(), 1.0),
            "temperature": Ratio(contrast.share.new_full((), self.quantizer.temperature), 1.0),
        }
        metrics |= {f"codes_{group}": Counts(counts) for group, counts in enumerate(quantized.counts)}
        penalty = cast(Tensor, output.mean)  # masked prediction always has one
        # Times zero rather than left out: every parameter has a gradient on every rank.
        return output._replace(metrics=metrics, mean=penalty + float(self._contrasting) * added)

    def contrast(self, state: Tensor, batch: Batch) -> tuple[Contrast, Quantized]:
        """The contrastive loss of the masked frames of `state` (B, F, D), and what they are quantized to."""
        positions, instances = batch.extras["masked_positions"], batch.extras["instances"]
        masked = frames_at(state, positions)
        if self.layer_norm_for_extract is not None:
            masked = self.layer_norm_for_extract(masked)
        quantized = self.quantizer(masked)
        targets = self.project_q(quantized.vectors)
        logits = instance_logits(self.spk_proj(masked), targets, instances, self.config.logit_temp)
        rows = torch.div(positions, state.shape[1], rounding_mode="floor")
        return utterance_contrast(logits, rows, instances), quantized

    def training_flops(self, samples: int) -> float:
        """Masked prediction, and quantizer, projections and similarities at the masked frames.

        Similarities with the frames of one row alone: how many rows a micro-batch has is not known here.
        """
        config, width = self.config, self.config.encoder.encoder_embed_dim
        scored = config.mask_prob * samples / stride_samples(config.encoder.conv_feature_layers)
        entries = config.latent_groups * config.latent_vars
        per_frame: float = width * entries + entries * config.latent_dim // config.latent_groups
        per_frame += (config.latent_dim + width + scored) * config.final_dim
        return super().training_flops(samples) + 3 * 2 * scored * per_frame
