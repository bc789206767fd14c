"""DistilHuBERT's configuration, prediction heads and loss.

Source: arXiv 2110.01900, section 2; `s3prl/pretrain/distiller/pretrain_expert.py` and `s3prl/upstream/distiller/
model.py` of s3prl. Letters: N predicted layers, D width of the student, W width of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import MAY_BE_ZERO, ConfigError
from pretrain.method import Batch, Encoder, Example, Method, Metric, Ratio, StepOutput, TargetInfo
from pretrain.models.conv_features import ConvFrames, frames
from pretrain.models.kernels import Linear, linear
from pretrain.models.speech_config import SpeechEncoderConfig
from pretrain.models.speech_encoder import SpeechEncoder
from pretrain.models.teacher import TeacherConfig, complete_teacher, frozen_teacher, load_teacher
from pretrain.objectives.collate import stack_waveforms
from pretrain.objectives.figures import spectrogram_figure
from recipes.distilhubert.encoder import CONVOLUTIONS, StudentEncoder, check_parts, copy_parts


@dataclass
class DistilHubertConfig:
    """Published hyper-parameters; the names are s3prl's.

    `pred_layer_id` lists the teacher's hidden states that are predicted, 0 being the input of its first layer.
    `cosine_loss` weighs the cosine term beside the L1 term. With `init_teacher_conv_layers` the student's convolutions
    and projection start as the teacher's, with `init_teacher_encoder_layers` its positional convolution and layers as
    the teacher's first ones.
    """

    name: str
    encoder: SpeechEncoderConfig
    teacher: TeacherConfig
    pred_layer_id: list[int] = field(metadata=MAY_BE_ZERO)
    cosine_loss: float
    init_teacher_conv_layers: bool
    init_teacher_encoder_layers: bool

    def __post_init__(self) -> None:
        if not self.pred_layer_id or len(set(self.pred_layer_id)) != len(self.pred_layer_id):
            raise ConfigError(
                f"method.pred_layer_id: {self.pred_layer_id}; list hidden states of the teacher, each of them once"
            )
        if self.cosine_loss < 0:
            raise ConfigError(f"method.cosine_loss: {self.cosine_loss:g} is negative; give 0 or more")
        if self.encoder.is_conformer:
            raise ConfigError("method.encoder.layer_type: conformer; the student is a Transformer: use transformer")


@dataclass(frozen=True)
class DistilHubertCollator(ConvFrames):
    """Stacks waveforms. Every frame of a batch is a unit, those of the padding too, as in the official loss."""

    def __call__(self, examples: list[Example]) -> Batch:
        stacked = stack_waveforms(examples)
        rows, samples = stacked.waveforms.shape
        return stacked.batch(rows * int(frames(samples, self.conv_feature_layers)))


class PredictionHeads(nn.Module):
    """One head a layer: a share of a common projection, GELU, and a matrix of its own (N, D, W) with its bias (N, W).

    s3prl's `output_layer` with its `SplitLinear`.
    """

    def __init__(self, dim: int, heads: int, width: int) -> None:
        super().__init__()
        self.hidden = Linear(dim, heads * dim)
        bound = dim**-0.5
        self.weight = nn.Parameter(torch.empty(heads, dim, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(heads, width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, F, D) to N predictions (B, F, W)."""
        parts = F.gelu(self.hidden(x)).chunk(len(self.weight), dim=-1)
        return [
            linear(part, weight.t(), bias)
            for part, weight, bias in zip(parts, self.weight.unbind(), self.bias.unbind(), strict=True)
        ]


class HeadLoss(NamedTuple):
    """() float32 terms of one head, means over its frames."""

    rec: Tensor
    sim: Tensor


class DistilHubertMethod(Method):
    """A student, one prediction head for each chosen layer of a frozen teacher, and the teacher.

    Both hear the whole waveform. Where the teacher makes several frames in the time of one of the student, the student
    predicts the first of them.
    """

    Config = DistilHubertConfig
    separate_parts = ("teacher",)
    config: DistilHubertConfig
    encoder: StudentEncoder

    def __init__(self, config: DistilHubertConfig) -> None:
        super().__init__(config)
        self.encoder = StudentEncoder(config.encoder)
        self.teacher = frozen_teacher(config.teacher)
        network = cast(Encoder, self.teacher.network)
        self.step = _checked_step(config.pred_layer_id, network, self.encoder)
        check_parts(self.encoder, network, self._conv_parts, "method.init_teacher_conv_layers")
        check_parts(self.encoder, network, self._context_parts, "method.init_teacher_encoder_layers")
        width = network.hidden_sizes[config.pred_layer_id[0]]
        self.heads = PredictionHeads(config.encoder.encoder_embed_dim, len(config.pred_layer_id), width)

    @property
    def _conv_parts(self) -> tuple[str, ...]:
        return CONVOLUTIONS if self.config.init_teacher_conv_layers else ()

    @property
    def _context_parts(self) -> tuple[str, ...]:
        return self.encoder.context_parts if self.config.init_teacher_encoder_layers else ()

    @classmethod
    def complete(cls, config: DistilHubertConfig, earlier: dict[str, Any] | None) -> DistilHubertConfig:
        """With the teacher's shape, where the recipe leaves it to the teacher's file."""
        return replace(config, teacher=complete_teacher(config.teacher, (earlier or {}).get("teacher")))

    @classmethod
    def collator(cls, config: DistilHubertConfig) -> DistilHubertCollator:
        """The collator of this configuration."""
        return DistilHubertCollator(config.encoder.conv_feature_layers)

    def begin(self, found: dict[str, TargetInfo]) -> None:
        """Load the teacher, and start the student from it; weights that `init_from` has brought stay."""
        if not self.teacher.is_loaded:
            load_teacher(self.teacher, self.config.teacher)
        if not self.encoder.is_loaded:
            copy_parts(self.encoder, self.teacher.network, (*self._conv_parts, *self._context_parts))

    def forward(self, batch: Batch) -> StepOutput:
        """`loss_of_mean` is what a prediction of the mean of these very targets, layer by layer, would cost."""
        targets = self.targets_of(batch.waveforms, batch.lengths_if_padded)
        return self.distil(batch, targets)

    def targets_of(self, waveforms: Tensor, lengths: Tensor | None) -> list[Tensor]:
        """The teacher's chosen hidden states (B, F, W) at the student's frames."""
        hidden_states, _ = self.teacher(waveforms, lengths)
        return [hidden_states[layer][:, :: self.step] for layer in self.config.pred_layer_id]

    def distil(self, batch: Batch, targets: list[Tensor]) -> StepOutput:
        """The loss against given targets (B, F, W), one a head.

        Teacher and student may differ by a frame at the end; what both have is compared.
        """
        config, units = self.config, batch.sample_size
        predictions = self.predictions(batch)
        count = min(predictions[0].shape[1], targets[0].shape[1])
        metrics: dict[str, Metric] = {}
        losses, of_mean = [], []
        for layer, prediction, target in zip(config.pred_layer_id, predictions, targets, strict=True):
            prediction, target = prediction[:, :count].float(), target[:, :count].float()
            loss = head_loss(prediction, target)
            losses.append(loss)
            with torch.no_grad():
                of_mean.append(head_loss(target.mean((0, 1), keepdim=True).expand_as(target), target))
                size = target.abs().mean()
            named = {f"rec_l{layer}": loss.rec, f"sim_l{layer}": loss.sim, f"tar_norm_l{layer}": size}
            metrics |= {name: Ratio.of_mean(mean, units) for name, mean in named.items()}
        rec, sim = (torch.stack(terms).mean() for terms in zip(*losses, strict=True))
        constant_rec, constant_sim = (torch.stack(terms).mean() for terms in zip(*of_mean, strict=True))
        means = {
            "rec_loss": rec,
            "sim_loss": sim,
            "loss_of_mean": constant_rec + config.cosine_loss * constant_sim,
        }
        metrics |= {name: Ratio.of_mean(mean, units) for name, mean in means.items()}
        return StepOutput((rec + config.cosine_loss * sim) * units, metrics)

    def predictions(self, batch: Batch) -> list[Tensor]:
        """What the heads say of the batch, N x (B, F, W)."""
        features = self.encoder.features(batch.waveforms, batch.lengths_if_padded)
        return self.heads(self.encoder.context(features.projected, features.frame_lengths)[-1])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Biases do not decay; the weights of norms do, as in s3prl, whose rule names a layer norm that is not here."""
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        return [
            {"params": [p for name, p in named if "bias" not in name]},
            {"params": [p for name, p in named if "bias" in name], "weight_decay": 0.0},
        ]

    def training_flops(self, samples: int) -> float:
        """Student, heads, and the forward of the teacher.

        Of a teacher that is no `SpeechEncoder` two operations are counted for each weight and frame.
        """
        teacher, dim = cast(Encoder, self.teacher.network), self.config.encoder.encoder_embed_dim
        heads, _, width = self.heads.weight.shape
        if isinstance(teacher, SpeechEncoder):
            taught = teacher.forward_flops(samples)
        else:
            weights = sum(p.numel() for p in teacher.parameters())
            taught = 2.0 * weights * samples / teacher.downsample_rates[self.config.pred_layer_id[0]]
        predicted = 3 * 2.0 * self.encoder.frames(samples) * heads * dim * (dim + width)
        return self.encoder.training_flops(samples) + taught + predicted

    def figures(self, batch: Batch) -> dict[str, Any]:
        """The first utterance's targets of the last chosen layer over what its head predicts, 64 channels of each."""
        targets = self.targets_of(batch.waveforms, batch.lengths_if_padded)
        panels = {"targets": targets[-1][0, :, :64], "predictions": self.predictions(batch)[-1][0, :, :64]}
        return {"targets": spectrogram_figure(panels, self.encoder.stride_samples / 16_000)}


def head_loss(predictions: Tensor, targets: Tensor) -> HeadLoss:
    """Of float32 (B, F, W): the mean absolute error, and the mean of -log sigmoid of the cosine similarity."""
    with torch.autocast(predictions.device.type, enabled=False):
        cosine = F.cosine_similarity(predictions, targets, dim=-1)
        return HeadLoss(F.l1_loss(predictions, targets), -F.logsigmoid(cosine).mean())


def _checked_step(layers: list[int], teacher: Encoder, student: StudentEncoder) -> int:
    """How many frames the teacher makes in the time of one of the student.

    Raises ConfigError for hidden states that the teacher lacks, and for widths or rates that do not go together.
    """
    states = len(teacher.hidden_sizes)
    if unknown := [layer for layer in layers if not 0 <= layer < states]:
        raise ConfigError(
            f"method.pred_layer_id: {unknown[0]} is no hidden state of the teacher; give numbers from 0 to {states - 1}"
        )
    widths = [teacher.hidden_sizes[layer] for layer in layers]
    if len(set(widths)) > 1:
        raise ConfigError(f"method.pred_layer_id: {layers} are {widths} wide; choose hidden states of one width")
    rates = {teacher.downsample_rates[layer] for layer in layers}
    own = student.stride_samples
    if len(rates) > 1 or own % min(rates):
        listed = " and ".join(f"{16_000 / rate:g}" for rate in sorted(rates))
        raise ConfigError(
            f"method.teacher: makes {listed} frames a second, the student {16_000 / own:g}; the teacher's rate must be "
            "a multiple of the student's: set the strides of method.encoder.conv_feature_layers accordingly, or choose "
            "another teacher"
        )
    return own // min(rates)
