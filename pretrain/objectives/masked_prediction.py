"""Masked prediction of k-means labels: heads, loss and metrics that HuBERT and the methods built on it share.

Source: HuBERT, arXiv 2106.07447, section III; `fairseq/models/hubert/hubert.py` and
`fairseq/criterions/hubert_criterion.py`. Letters: S label sets, B rows, F frames, D width of the encoder, N scored
frames, C clusters of a label set.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pretrain.config import MAY_BE_ZERO, ConfigError
from pretrain.losses.masked_prediction import class_histogram, cosine_logits, prediction_loss
from pretrain.method import Batch, Counts, Method, Ratio, StepOutput, TargetInfo, TargetSpec
from pretrain.models.conv_features import stride_samples
from pretrain.models.speech_encoder import ConvOutput, SpeechEncoder, SpeechEncoderConfig
from pretrain.objectives.masked_units import MaskedUnitsCollator
from pretrain.objectives.span_masks import span_mask_options
from pretrain.objectives.unit_figure import unit_figure

# fairseq's Dictionary puts <s>, <pad>, </s> and <unk> before the clusters: never targets, yet rows of the softmax.
DICTIONARY_SPECIALS = 4


@dataclass
class MaskedPredictionConfig:
    """Published hyper-parameters; `num_classes` (clusters) and `label_rates_hz` have one entry per label set.

    `final_dim` is the width of projected frames and label embeddings. With `untie_final_proj` each label set has a
    projection of its own. `pred_masked_weight` and `pred_nomask_weight` weigh the losses of masked and of unmasked
    frames, `feature_penalty_weight` the mean square of the convolutions' output.
    """

    name: str
    encoder: SpeechEncoderConfig
    final_dim: int
    untie_final_proj: bool
    num_classes: list[int]
    label_rates_hz: list[int]
    mask_prob: float
    mask_length: int
    mask_min_spans: int = field(metadata=MAY_BE_ZERO)
    logit_temp: float
    pred_masked_weight: float
    pred_nomask_weight: float
    feature_penalty_weight: float

    def __post_init__(self) -> None:
        if not self.num_classes or len(self.num_classes) != len(self.label_rates_hz):
            raise ConfigError("method.num_classes, method.label_rates_hz: state one entry of each per label set")


class MaskedPrediction(Method):
    """Encoder, projection and label embeddings; the loss is cross-entropy over cosine logits at masked frames.

    Reads `batch.extras`: `mask` (B, F) bool, True = hidden; `masked_positions` (N,) and `unmasked_positions` (M,)
    flat frame positions; `masked_labels` (S, N) and `unmasked_labels` (S, M) cluster ids from 0.

    A method that adds terms of its own to the loss overrides `forward`, calls `encode` and `prediction` there as
    `forward` does here, and adds to the `StepOutput`.
    """

    Config: ClassVar[type] = MaskedPredictionConfig
    config: MaskedPredictionConfig
    encoder: SpeechEncoder

    def __init__(self, config: MaskedPredictionConfig) -> None:
        super().__init__(config)
        self.encoder = SpeechEncoder(config.encoder)
        self.class_counts = [classes + DICTIONARY_SPECIALS for classes in config.num_classes]
        projections = len(self.class_counts) if config.untie_final_proj else 1
        self.final_proj = nn.Linear(config.encoder.encoder_embed_dim, config.final_dim * projections)
        self.label_embs_concat = nn.Parameter(torch.empty(sum(self.class_counts), config.final_dim).uniform_())

    @classmethod
    def targets(cls, config: MaskedPredictionConfig) -> list[TargetSpec]:
        """Clusters, one label set or several."""
        counts = enumerate(config.num_classes)
        return [TargetSpec(f"labels_{index}", "frames", count, several=True) for index, count in counts]

    @classmethod
    def fit_to_targets(cls, config: MaskedPredictionConfig, found: dict[str, TargetInfo]) -> MaskedPredictionConfig:
        """Take classes and rates from the label sets, so that both iterations run from one recipe."""
        rates, classes = zip(*((info.rate_hz, info.num_classes) for info in found.values()), strict=True)
        return replace(config, label_rates_hz=list(rates), num_classes=list(classes))

    @classmethod
    def collator(cls, config: MaskedPredictionConfig) -> MaskedUnitsCollator:
        """The collator of this configuration."""
        return MaskedUnitsCollator(
            **span_mask_options(config),
            label_rates_hz=tuple(config.label_rates_hz),
            scores_unmasked=config.pred_nomask_weight > 0,
        )

    def forward(self, batch: Batch) -> StepOutput:
        """Loss terms in nats: `loss_masked`, `loss_unmasked` per masked frame, as fairseq divides them."""
        features, hidden_states = self.encode(batch)
        return self.prediction(batch, features, hidden_states[-1])

    def encode(self, batch: Batch) -> tuple[ConvOutput, list[Tensor]]:
        """The convolutions' output, and the L + 1 hidden states (B, F, D) of the masked pass."""
        mask = batch.extras["mask"]
        features = self.encoder.features(batch.waveforms, batch.lengths_if_padded, max_frames=mask.shape[1])
        return features, self.encoder.context(features.projected, features.frame_lengths, mask)

    def prediction(self, batch: Batch, features: ConvOutput, last_state: Tensor) -> StepOutput:
        """Loss and metrics of predicting the labels from `last_state` (B, F, D), and the penalty on `features`."""
        extras = batch.extras
        hidden = last_state.flatten(0, 1)
        weight = self.config.pred_nomask_weight
        masked, metrics = self._predict(hidden, extras["masked_positions"], extras["masked_labels"], "masked")
        with torch.set_grad_enabled(weight > 0 and torch.is_grad_enabled()):
            unmasked, more = self._predict(hidden, extras["unmasked_positions"], extras["unmasked_labels"], "unmasked")
        penalty = self.config.feature_penalty_weight * features.conv.float().square().mean()
        loss = self.config.pred_masked_weight * masked + weight * unmasked
        output = StepOutput(loss, metrics, mean=penalty)
        scored = extras["masked_positions"].numel()
        metrics |= more
        metrics["loss_masked"] = Ratio(masked.detach(), scored)
        metrics["loss_unmasked"] = Ratio(unmasked.detach(), scored)
        metrics["loss_features"] = Ratio.of_mean(penalty, batch.sample_size)
        return output

    def logits(self, hidden: Tensor) -> list[Tensor]:
        """(N, D) frames to one (N, C_s + 4) logit table per label set."""
        projected = self.final_proj(hidden)
        count = len(self.class_counts)
        parts = projected.chunk(count, dim=-1) if self.config.untie_final_proj else [projected] * count
        codebooks = self.label_embs_concat.split(self.class_counts)
        pairs = zip(parts, codebooks, strict=True)
        return [cosine_logits(part, codebook, self.config.logit_temp) for part, codebook in pairs]

    def _predict(
        self, hidden: Tensor, positions: Tensor, labels: Tensor, kind: str
    ) -> tuple[Tensor, dict[str, Ratio | Counts]]:
        """Summed loss over all label sets at `positions`, and what to report of it."""
        total = hidden.new_zeros((), dtype=torch.float32)
        metrics: dict[str, Ratio | Counts] = {}
        for index, logits in enumerate(self.logits(hidden.index_select(0, positions))):
            loss, correct = prediction_loss(logits, labels[index] + DICTIONARY_SPECIALS)
            total = total + loss
            suffix = f"_{index}" if len(self.class_counts) > 1 else ""
            metrics[f"accuracy_{kind}{suffix}"] = Ratio(correct.float(), positions.numel())
            if kind == "masked":
                metrics[f"labels{suffix}"] = Counts(
                    class_histogram(labels[index] + DICTIONARY_SPECIALS, logits.shape[1])
                )
                metrics[f"predictions{suffix}"] = Counts(class_histogram(logits.detach().argmax(-1), logits.shape[1]))
        return total, metrics

    def training_flops(self, samples: int) -> float:
        """Encoder plus heads at the masked half of the frames."""
        stride = stride_samples(self.config.encoder.conv_feature_layers)
        scored = self.config.mask_prob * samples / stride
        width = self.config.encoder.encoder_embed_dim
        heads = 2 * scored * self.final_proj.out_features * width
        heads += 2 * scored * self.config.final_dim * sum(self.class_counts)
        return self.encoder.training_flops(samples) + 3 * heads

    def figures(self, batch: Batch) -> dict[str, Any]:
        """The first utterance's masked spectrogram over its target and predicted units."""
        mask = batch.extras["mask"]
        hidden = self.encode(batch)[1][-1]
        units = self.logits(hidden[0])[0].argmax(dim=-1).cpu() - DICTIONARY_SPECIALS
        targets = torch.full((mask.shape[1],), -1)
        for kind in ("masked", "unmasked"):
            positions = batch.extras[f"{kind}_positions"].cpu()
            first_row = positions < mask.shape[1]
            targets[positions[first_row]] = batch.extras[f"{kind}_labels"][0].cpu()[first_row]
        waveform = batch.waveforms[0, : int(batch.lengths[0])].cpu().float()
        return {"units": unit_figure(waveform, mask[0].cpu(), targets, units)}
