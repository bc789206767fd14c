"""data2vec's configuration, masks, teacher and loss.

Source: arXiv 2202.03555, sections 3 and 4.2; `examples/data2vec/models/data2vec_audio.py` and
`fairseq/modules/ema_module.py` of fairseq. Letters: N masked frames of all rows, L layers, K of them averaged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config import MAY_BE_ZERO, ConfigError
from pretrain.losses.regression import mean_deviation, regression_sum
from pretrain.method import Batch, Example, Method, Progress, Ratio, Role, StepOutput, TargetInfo
from pretrain.models.context import ContextNetwork
from pretrain.models.conv_features import stride_samples
from pretrain.models.kernels import Linear
from pretrain.models.speech_encoder import ConvOutput, SpeechEncoder, SpeechEncoderConfig
from pretrain.models.teacher import Teacher, linear_ramp
from pretrain.objectives.collate import Stacked
from pretrain.objectives.figures import spectrogram_figure
from pretrain.objectives.masking import frames_at
from pretrain.objectives.span_masks import SpanMaskCollator, span_mask_options

# What of the encoder's context is the student's own in the teacher, instead of its average.
POSITIONS = ("pos_conv.",)


@dataclass
class Data2VecConfig:
    """Published hyper-parameters; the names are fairseq's.

    `average_top_k_layers` feed-forwards make the targets. `loss_beta` is where smooth L1 turns linear, 0 the squared
    error; `loss_scale` a factor on the loss, None 1 / sqrt(width). The teacher's decay goes from `ema_decay` to
    `ema_end_decay` in `ema_anneal_end_step` updates; with `ema_layers_only` its positional convolutions are copies of
    the student's. After `min_var_from_update` updates the run stops where `target_var` or `pred_var` stays below
    `min_target_var` or `min_pred_var`.
    """

    name: str
    encoder: SpeechEncoderConfig
    mask_prob: float
    mask_length: int
    mask_min_spans: int = field(metadata=MAY_BE_ZERO)
    average_top_k_layers: int
    loss_beta: float
    loss_scale: float | None
    ema_decay: float
    ema_end_decay: float
    ema_anneal_end_step: int = field(metadata=MAY_BE_ZERO)
    ema_layers_only: bool
    min_target_var: float
    min_pred_var: float
    min_var_from_update: int = field(metadata=MAY_BE_ZERO)

    def __post_init__(self) -> None:
        layers = self.encoder.encoder_layers
        if not 1 <= self.average_top_k_layers <= layers:
            raise ConfigError(
                f"method.average_top_k_layers: {self.average_top_k_layers} of {layers} layers; give 1 to {layers}"
            )
        if self.encoder.is_conformer:
            raise ConfigError(
                "method.encoder.layer_type: conformer; the targets are feed-forwards of Transformer layers, so use "
                "transformer"
            )
        for name in ("ema_decay", "ema_end_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"method.{name}: {getattr(self, name):g} is no share of an average; give 0 to 1")


@dataclass(frozen=True)
class Data2VecCollator(SpanMaskCollator):
    """Draws the masks of a batch; see `Data2VecMethod` for what it puts into `extras`."""

    def __call__(self, examples: list[Example]) -> Batch:
        drawn = self.draw(examples)
        return make_batch(drawn.stacked, drawn.mask)


def make_batch(stacked: Stacked, mask: np.ndarray) -> Batch:
    """Assemble a batch from a (B, F) mask.

    Masked frames travel as flat positions b * F + f too, so that nothing on the device has to count them.
    """
    positions = np.flatnonzero(mask)
    return stacked.batch(len(positions), {"mask": mask, "masked_positions": positions})


class Data2VecMethod(Method):
    """Encoder, projection and teacher; at masked frames the encoder must name what the teacher makes of the whole.

    The teacher is a moving average of the encoder behind its convolutions. Both get the student's projected features,
    the teacher without masks. Reads `batch.extras`: `mask` (B, F) bool, True = hidden; `masked_positions` (N,) flat
    frame positions.
    """

    Config = Data2VecConfig
    config: Data2VecConfig
    encoder: SpeechEncoder

    def __init__(self, config: Data2VecConfig) -> None:
        super().__init__(config)
        width = config.encoder.encoder_embed_dim
        self.encoder = SpeechEncoder(config.encoder)
        self.teacher = Teacher.copy_of(self.encoder.encoder)
        self.final_proj = Linear(width, width)
        self.loss_scale = width**-0.5 if config.loss_scale is None else config.loss_scale
        self._update = 0

    @classmethod
    def collator(cls, config: Data2VecConfig) -> Data2VecCollator:
        """The collator of this configuration."""
        return Data2VecCollator(**span_mask_options(config))

    def begin(self, found: dict[str, TargetInfo]) -> None:
        """The teacher starts where the student does."""
        self.teacher.start_at(self.encoder.encoder)

    def before_step(self, progress: Progress) -> None:
        """Note the update, beside what every method does."""
        super().before_step(progress)
        self._update = progress.update

    def after_step(self, progress: Progress) -> None:
        """The teacher follows its student."""
        copied = POSITIONS if self.config.ema_layers_only else ()
        self.teacher.update(self.encoder.encoder, self.decay(progress.update), copied)

    def decay(self, update: int) -> float:
        """The teacher's share of itself in the average that follows update number `update`, from 1."""
        config = self.config
        return linear_ramp(update, config.ema_decay, config.ema_end_decay, config.ema_anneal_end_step)

    def forward(self, batch: Batch) -> StepOutput:
        """`loss_of_mean` per masked frame is what the mean of these very targets would cost."""
        positions, units = batch.extras["masked_positions"], batch.sample_size
        features = self.encoder.features(batch.waveforms, batch.lengths_if_padded)
        targets = frames_at(self.target_frames(features), positions)
        hidden = self.encoder.context(features.projected, features.frame_lengths, batch.extras["mask"])[-1]
        predictions = self.final_proj(frames_at(hidden, positions))
        loss = regression_sum(predictions, targets, self.config.loss_beta) * self.loss_scale
        constant = regression_sum(targets.mean(0).expand_as(targets), targets, self.config.loss_beta) * self.loss_scale
        metrics = {
            "loss_of_mean": Ratio(constant, units),
            "target_var": self._variance(targets, "target_variance", self.config.min_target_var),
            "pred_var": self._variance(predictions.detach(), "prediction_variance", self.config.min_pred_var),
            "ema_decay": Ratio(loss.new_full((), self.decay(self._update)), 1.0),
        }
        return StepOutput(loss, metrics)

    @torch.no_grad()
    def target_frames(self, features: ConvOutput) -> Tensor:
        """(B, F, D) float32 targets of all frames.

        The outputs of the teacher's top K feed-forwards, each with zero mean and unit variance over the frames of its
        row, channel by channel, averaged. As in the official code the frames behind the end of a padded row count.
        """
        config, network = self.config, cast(ContextNetwork, self.teacher.network)
        outputs = network.feed_forwards(features.projected, features.frame_lengths)
        top = islice(outputs, config.encoder.encoder_layers - config.average_top_k_layers, None)
        # One by one, so that no more than two of them are held.
        total = reduce(torch.add, (F.instance_norm(output.float().transpose(1, 2)) for output in top))
        return (total / config.average_top_k_layers).transpose(1, 2)

    def _variance(self, vectors: Tensor, role: Role, minimum: float) -> Ratio:
        """How much the (N, D) vectors of a micro-batch differ, and from when on the least that is healthy."""
        weight = len(vectors)
        guarded = self._update > self.config.min_var_from_update
        return Ratio(mean_deviation(vectors) * weight, weight, role, minimum if guarded else None)

    def training_flops(self, samples: int) -> float:
        """Encoder, forward of the teacher, and projection of the masked frames."""
        config, width = self.config, self.config.encoder.encoder_embed_dim
        scored = config.mask_prob * samples / stride_samples(config.encoder.conv_feature_layers)
        teacher = self.encoder.context_flops(self.encoder.frames(samples))
        return self.encoder.training_flops(samples) + teacher + 3 * 2 * scored * width**2

    def figures(self, batch: Batch) -> dict[str, Any]:
        """The first utterance's targets over what is predicted for its frames, 64 channels of each."""
        mask = batch.extras["mask"]
        features = self.encoder.features(batch.waveforms, batch.lengths_if_padded)
        hidden = self.encoder.context(features.projected, features.frame_lengths, mask)[-1]
        panels = {
            "targets": self.target_frames(features)[0, :, :64],
            "predictions": self.final_proj(hidden[0])[:, :64],
            "masked frames": mask[0, :, None].float(),
        }
        seconds = self.encoder.stride_samples / 16_000
        return {"targets": spectrogram_figure(panels, seconds)}
