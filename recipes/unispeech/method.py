"""UniSpeech's configuration, masks, distractors, replaced frames and two losses.

Source: arXiv 2101.07597; microsoft/UniSpeech `src/fairseq/models/unispeech/unispeech.py`,
`src/fairseq/models/wav2vec/wav2vec2.py` (with `transpose`), `src/fairseq/criterions/unispeech_criterion.py`.
Letters: K masked frames per row, N negatives, D encoder width, L labelled rows, C symbols with the four special ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.config import ConfigError
from pretrain.losses.contrastive import contrastive_logits, contrastive_loss, draw_negatives, guessed_hits
from pretrain.method import Batch, Counts, Example, Metric, Ratio, StepOutput, TargetInfo, TargetSpec
from pretrain.models.conv_features import stride_samples
from pretrain.models.kernels import Linear, dropout
from pretrain.objectives.collate import Stacked
from pretrain.objectives.masking import frames_at
from pretrain.objectives.quantized_targets import (
    MaskingCollator,
    QuantizedTargetsConfig,
    QuantizedTargetsMethod,
    masking_options,
)
from pretrain.quantizers.gumbel import Quantized
from recipes.unispeech.ctc import SPECIAL_SYMBOLS, ctc_loss, shortest_alignment, symbol_errors

TRANSCRIPT = "phones"  # the target, and the column of its table


@dataclass
class UniSpeechConfig(QuantizedTargetsConfig):
    """`ctc_weight` is the share of CTC in the loss (the official `mtlalpha`); at 0 no transcripts are read.

    `symbols` are those of the run's dictionary: the recipe leaves them empty.
    """

    ctc_weight: float
    replace_prob: float
    final_dropout: float
    symbols: list[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ctc_weight < 1:
            raise ConfigError(
                f"method.ctc_weight: {self.ctc_weight} is not in [0, 1); the rest of 1 is the contrastive loss"
            )


@dataclass(frozen=True)
class UniSpeechCollator(MaskingCollator):
    """Draws masks, distractors and the frames to replace; see `UniSpeechMethod` for what it puts into `extras`."""

    replace_prob: float

    def __call__(self, examples: list[Example]) -> Batch:
        drawn = self.draw(examples)
        rngs, frames = [example.rng for example in examples], drawn.mask.shape[1]
        rows = zip(rngs, map(np.flatnonzero, drawn.mask), drawn.valid, strict=True)
        return make_batch(
            drawn.stacked,
            mask=drawn.mask,
            negatives=np.stack([draw_negatives(rng, own, count, self.num_negatives) for rng, own, count in rows]),
            replaced=np.stack([rng.random(frames) < self.replace_prob for rng in rngs]),
            valid=drawn.valid,
            transcripts=[example.targets.get(TRANSCRIPT) for example in examples],
        )


def make_batch(
    stacked: Stacked,
    *,
    mask: np.ndarray,
    negatives: np.ndarray,
    replaced: np.ndarray,
    valid: list[int],
    transcripts: list[np.ndarray | None],
) -> Batch:
    """Assemble a batch from a (B, F) mask with K frames in every row, (B, K, N) frames as `negatives`, (B, F)
    `replaced`, the `valid` frames of each row and symbol ids from 0, or None, as `transcripts`.
    """
    classes = [None if t is None else torch.from_numpy(t) + len(SPECIAL_SYMBOLS) for t in transcripts]
    # A transcript that no alignment fits would make the loss infinite: its row is taken as unlabelled.
    fits = [c is not None and shortest_alignment(c) <= count for c, count in zip(classes, valid, strict=True)]
    labelled = [row for row, fitting in enumerate(fits) if fitting]
    chosen = [row for row, fitting in zip(classes, fits, strict=True) if row is not None and fitting]
    extras: dict[str, np.ndarray | Tensor] = {
        "mask": mask,
        "masked_positions": np.flatnonzero(mask),
        "negatives": negatives,
        "replaced": replaced,
        "labelled_rows": torch.tensor(labelled, dtype=torch.int64),
        "labelled_frames": torch.tensor([valid[row] for row in labelled], dtype=torch.int64),
        "targets": torch.cat([*chosen, torch.empty(0, dtype=torch.int64)]),
        "target_lengths": torch.tensor([len(c) for c in chosen], dtype=torch.int64),
        "too_long": torch.tensor(sum(c is not None for c in classes) - len(labelled)),
    }
    return stacked.batch(int(mask.sum()), extras)


class States(NamedTuple):
    """`context` (B, F, D) encoder output of masked input; `chosen` the quantizer's entries of the masked frames, and
    `positives` (B, K, D) what they are projected to; `all_entries` (B, F) and `all_targets` (B, F, D) the same of a
    second draw for every frame.
    """

    context: Tensor
    chosen: Quantized
    positives: Tensor
    all_entries: Tensor
    all_targets: Tensor


class UniSpeechMethod(QuantizedTargetsMethod):
    """Encoder, quantizer with two projections up to the encoder's width, and a CTC head.

    The encoder must name the quantized features at masked frames, and the head must read the transcript from the
    encoder's frames, some of which are replaced by quantized ones: so the codebook learns phones.

    Reads `batch.extras`: `mask` and `replaced` (B, F) bool; `masked_positions` (B * K,) flat frame positions;
    `negatives` (B, K, N) int64 frames of the row; `labelled_rows`, `labelled_frames`, `target_lengths` (L,) int64;
    `targets` int64 classes of all labelled rows; `too_long` () transcripts left out because no alignment fits.
    """

    Config = UniSpeechConfig
    exported_heads = ("ctc_proj",)
    config: UniSpeechConfig

    def __init__(self, config: UniSpeechConfig) -> None:
        super().__init__(config)
        width = config.encoder.encoder_embed_dim
        self.project_q = Linear(config.latent_dim, config.final_dim)
        self.final_proj = Linear(config.final_dim, width)
        # torch's own, which also takes a micro-batch without any labelled row.
        classes = len(SPECIAL_SYMBOLS) + len(config.symbols)
        self.ctc_proj = nn.Linear(width, classes) if config.ctc_weight else None

    @classmethod
    def targets(cls, config: UniSpeechConfig) -> list[TargetSpec]:
        """Transcripts, where CTC takes part in the loss."""
        return [TargetSpec(TRANSCRIPT, "symbols", column="phones")] if config.ctc_weight > 0 else []

    @classmethod
    def fit_to_targets(cls, config: UniSpeechConfig, found: dict[str, TargetInfo]) -> UniSpeechConfig:
        """One class per symbol of the dictionary, beside the special ones."""
        return replace(config, symbols=list(found[TRANSCRIPT].names))

    @classmethod
    def collator(cls, config: UniSpeechConfig) -> UniSpeechCollator:
        """The collator of this configuration."""
        return UniSpeechCollator(**masking_options(config), replace_prob=config.replace_prob)

    def forward(self, batch: Batch) -> StepOutput:
        """Both losses are divided by the masked frames, as officially; terms are reported in nats, without weights."""
        extras, units = batch.extras, batch.sample_size
        states = self.states(batch)
        logits = self.logits(states, extras["masked_positions"], extras["negatives"])
        contrastive, hits = contrastive_loss(logits)
        entries = self.config.latent_groups * self.config.latent_vars
        diversity = (entries - states.chosen.prob_perplexity) / entries
        weight = self.config.ctc_weight
        loss = (1 - weight) * contrastive
        metrics: dict[str, Metric] = {
            "loss_contrastive": Ratio(contrastive.detach(), units),
            "loss_diversity": Ratio.of_mean(diversity, units),
            "accuracy": Ratio(hits.float(), units),
            "chance": Ratio(guessed_hits(logits.detach()), units),
            "prob_perplexity": Ratio(states.chosen.prob_perplexity.detach(), 1.0),
            "temperature": Ratio(loss.new_full((), self.quantizer.temperature), 1.0),
        }
        metrics |= {f"codes_{group}": Counts(counts) for group, counts in enumerate(states.chosen.counts)}
        if self.ctc_proj is not None:
            ctc, more = self._read_aloud(states, batch)
            loss = loss + weight * ctc
            metrics |= more
        return StepOutput(loss, metrics, mean=(1 - weight) * self.config.diversity_weight * diversity)

    def states(self, batch: Batch) -> States:
        """Encode a batch and quantize its features twice: the masked frames, then all, each with noise of its own."""
        extras = batch.extras
        features = self.encoder.features(batch.waveforms, batch.lengths_if_padded)
        context = self.encoder.context(features.projected, features.frame_lengths, extras["mask"])[-1]
        rows, frames, width = context.shape
        unmasked = dropout(self.encoder.layer_norm(features.conv), self.config.dropout_features, self.training)
        flat = unmasked.flatten(0, 1)
        chosen = self.quantizer(flat.index_select(0, extras["masked_positions"]))
        everywhere = self.quantizer(flat)
        positives, all_targets = (self.final_proj(self.project_q(q.vectors)) for q in (chosen, everywhere))
        return States(
            context,
            chosen,
            positives.view(rows, -1, width),
            everywhere.entries().view(rows, frames),
            all_targets.view(rows, frames, width),
        )

    def logits(self, states: States, positions: Tensor, negatives: Tensor) -> Tensor:
        """(B, K, 1 + N), the true target first; distractors come from all frames of the row."""
        rows, masked, width = states.positives.shape
        predictions = frames_at(states.context, positions).view(rows, masked, width)
        return contrastive_logits(
            predictions,
            states.positives,
            states.all_targets,
            negatives,
            states.chosen.entries().view(rows, masked),
            states.all_entries,
            self.config.logit_temp,
        )

    def ctc_logits(self, states: States, replaced: Tensor, rows: Tensor) -> Tensor:
        """(L, F, C) of the chosen rows, whose frames are quantized ones where `replaced` (B, F)."""
        mixed = torch.where(replaced.unsqueeze(2), states.all_targets.to(states.context.dtype), states.context)
        mixed = mixed.index_select(0, rows)
        assert self.ctc_proj is not None  # without a CTC loss nothing is read aloud
        return self.ctc_proj(dropout(mixed, self.config.final_dropout, self.training))

    def _read_aloud(self, states: States, batch: Batch) -> tuple[Tensor, dict[str, Ratio | Counts]]:
        """Summed CTC loss of the labelled rows, and what to report of it."""
        extras = batch.extras
        logits = self.ctc_logits(states, extras["replaced"], extras["labelled_rows"])
        spoken = (extras["labelled_frames"], extras["targets"], extras["target_lengths"])
        loss = ctc_loss(logits, *spoken)
        metrics: dict[str, Ratio | Counts] = {
            "loss_ctc": Ratio(loss.detach(), extras["targets"].numel()),
            "labelled_share": Ratio(loss.new_full((), float(len(logits))), len(batch.rows)),
            "too_long_share": Ratio(extras["too_long"].float(), len(batch.rows)),
        }
        if not self.training:
            errors = loss.new_full((), float(symbol_errors(logits, *spoken)))
            metrics["symbol_error_rate"] = Ratio(errors, extras["targets"].numel())
        return loss, metrics

    def training_flops(self, samples: int) -> float:
        """Encoder, quantizer and projections at every frame and once more at the masked ones, CTC head."""
        config, width = self.config, self.config.encoder.encoder_embed_dim
        frames = samples / stride_samples(config.encoder.conv_feature_layers)
        conv_dim, entries = config.encoder.conv_feature_layers[-1][0], config.latent_groups * config.latent_vars
        quantized = conv_dim * entries + entries * config.latent_dim // config.latent_groups
        quantized += config.latent_dim * config.final_dim + config.final_dim * width
        scored = config.mask_prob * frames
        head = 0 if self.ctc_proj is None else width * self.ctc_proj.out_features
        total = (frames + scored) * quantized + scored * frames * width + frames * head
        return self.encoder.training_flops(samples) + 3 * 2 * total
