"""The nouns that every method shares: what a batch holds, what a step returns, what a method must offer.

Shapes: B batch, T samples, F frames, D width, L layers. Times are samples at 16 kHz unless the name says otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.config import encoder_config
from pretrain.errors import UserError


@dataclass
class Example:
    """One cropped utterance, on its way from the reader to the collator.

    `waveform` is (T,) float32 at 16 kHz; `start` is the crop's first sample, a multiple of the frame stride; `targets`
    holds what the recipe asked for in `Method.targets`, by name, as `TargetSpec` describes it; `rng` is seeded by
    (seed, epoch, row). `clean_waveform` is (T,) `waveform` before augmentation (the same where there was none), where
    the collator asks for it. `altered_by` names the stages of `augment` that have altered the waveform.
    """

    waveform: Tensor
    row: int
    start: int
    targets: dict[str, np.ndarray | None]
    rng: np.random.Generator
    clean_waveform: Tensor | None = None
    altered_by: tuple[str, ...] = ()


@dataclass
class Batch:
    """One micro-batch, on its way from the collator to the method.

    `waveforms` is (B, T) float32, zero after each length; `lengths` (B,) int64 samples; `sample_size` the number of
    units that the loss sums over; `rows` (B,) int64 manifest rows; `padded` is False where every row fills T, known on
    the host so that attention can run without a mask; `extras` the method's own tensors, listed in its docstring;
    `problems` one line per file that could not be read and was replaced; `other_sizes` the units of further terms of
    the loss by name, for a method whose terms are summed over different things (`StepOutput.other_losses`).
    """

    waveforms: Tensor
    lengths: Tensor
    sample_size: int
    rows: Tensor
    padded: bool = True
    extras: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    other_sizes: dict[str, int] = field(default_factory=dict)

    @property
    def lengths_if_padded(self) -> Tensor | None:
        """`lengths`, or None where no row is padded: what encoders take, so that attention needs no mask then."""
        return self.lengths if self.padded else None

    def pin_memory(self) -> Batch:
        """Called by the data loader's pinning thread."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """Copy to `device` without waiting for the copy."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Any) -> Batch:
        tensors = {f.name: function(getattr(self, f.name)) for f in fields(self) if f.name in ("waveforms", "lengths")}
        return replace(self, **tensors, extras={name: function(value) for name, value in self.extras.items()})


class Collator(Protocol):
    """A picklable dataclass of plain numbers that turns examples into a batch, inside a loader worker.

    `stride_samples` and `receptive_field_samples` describe the frame grid on which crops are placed. A collator whose
    `reads_audio` is False works on labels alone: no file is opened, and `Example.waveform` has the crop's length but
    holds only zeros, in the memory of one number (`objectives.collate.silent_waveforms`). One whose `reads_clean_audio`
    is True finds `Example.clean_waveform` set, for targets that are made of the waveform before augmentation. It gets
    `crops_per_example` examples of every row, one after the other: the same row and length, but each with a start, a
    generator and an augmentation of its own, and the first one what it would be alone. The budget of a micro-batch
    counts rows, so n crops are n times as much audio. `CollatorDefaults` has the usual values of these three.
    """

    # Properties, since a frozen dataclass may have them as fields that are never written.
    @property
    def stride_samples(self) -> int: ...

    @property
    def receptive_field_samples(self) -> int: ...

    @property
    def reads_audio(self) -> bool: ...

    @property
    def reads_clean_audio(self) -> bool: ...

    @property
    def crops_per_example(self) -> int: ...

    def __call__(self, examples: list[Example]) -> Batch: ...


class CollatorDefaults:
    """What collators say of the examples that they take, unless they need something else; see `Collator`."""

    # Without annotations, so that they are no fields of the dataclasses that inherit them.
    reads_audio = True
    reads_clean_audio = False
    crops_per_example = 1


# What the health monitor must know of a metric: the variance of a teacher's targets, of the network's own features, or
# of what it predicts; the codes that a quantizer which is not trained gives as targets.
Role = Literal["target_variance", "feature_variance", "prediction_variance", "target_codes"]


class Ratio(NamedTuple):
    """A metric that is reduced as sum(total) / sum(weight): a mean, an accuracy, a sum per something.

    `role` says what it means to the health monitor, where it has a meaning beyond its name, and `minimum` below which
    value the run is ill, where a method knows it better than the monitor.
    """

    total: Tensor
    weight: Tensor | float
    role: Role | None = None
    minimum: float | None = None

    @classmethod
    def of_mean(cls, mean: Tensor, weight: float) -> Ratio:
        """A mean over one micro-batch, which counts with `weight` beside those of others."""
        return cls(mean.detach() * weight, weight)

    def nothing(self) -> Ratio:
        """The same metric of no units at all, for a rank that has no batch of its own."""
        return self._replace(total=torch.zeros_like(self.total), weight=0.0)


class Counts(NamedTuple):
    """A (V,) histogram that is reduced by summing; reported as perplexity and share of entries used.

    `role` and `minimum` are those of the perplexity, as for a `Ratio`.
    """

    counts: Tensor
    role: Role | None = None
    minimum: float | None = None

    def nothing(self) -> Counts:
        """The same metric of no units at all, for a rank that has no batch of its own."""
        return self._replace(counts=torch.zeros_like(self.counts))


class SumOfRatios(NamedTuple):
    """A metric that is a sum of ratios over different units; a ratio of no units adds nothing."""

    ratios: tuple[Ratio, ...]

    def nothing(self) -> SumOfRatios:
        """The same metric of no units at all, for a rank that has no batch of its own."""
        return SumOfRatios(tuple(ratio.nothing() for ratio in self.ratios))


class Predictions(NamedTuple):
    """A metric that is no ratio: an average precision, an equal error rate.

    `predictions` (N, ...) and `targets` (N, ...) of the micro-batch are gathered over the whole validation and over all
    ranks, and `score` is called once with both as numpy arrays. It counts at validation alone.
    """

    predictions: Tensor
    targets: Tensor
    score: Callable[[np.ndarray, np.ndarray], float]

    def nothing(self) -> Predictions:
        """The same metric of no units at all, for a rank that has no batch of its own."""
        return Predictions(self.predictions[:0], self.targets[:0], self.score)


Metric = Ratio | SumOfRatios | Counts | Predictions


class StepOutput(NamedTuple):
    """The loss of one micro-batch by its parts, and what to report of it.

    What is trained is loss / units + mean + the sum of other_losses[name] / other units. `loss` is the () float32 SUM
    over the batch's `sample_size` units, and the trainer divides it by the units of the whole update, over all
    micro-batches and ranks. `mean` is () float32, None where a method has no such term: a penalty that is a mean over
    the micro-batch already (a diversity, a norm), weighted like the micro-batch's units. `other_losses` are sums over
    the units `Batch.other_sizes` of the same names.

    `metrics` hold detached tensors on the device, under the same names in every micro-batch and on all ranks, of 0
    units where there is nothing to report. The trainer adds `loss`, what is trained per unit. The health monitor
    (`pretrain.training.health`) knows some names, such as `accuracy` and `chance`.

    A tuple, because ZeRO 3 looks for the tensors of a module's output in tuples, to gather weights before backward.
    """

    loss: Tensor
    metrics: Mapping[str, Metric]
    mean: Tensor | None = None
    other_losses: dict[str, Tensor] = {}  # noqa: RUF012  # never written to

    def reported(self, batch: Batch) -> dict[str, Metric]:
        """The metrics, and `loss`: what is trained per unit, each term over its own units."""
        if not self.other_losses:
            return {"loss": Ratio(self.total(batch).detach(), batch.sample_size), **self.metrics}
        own = Ratio(self._replace(other_losses={}).total(batch).detach(), batch.sample_size)
        others = [Ratio(loss.detach(), batch.other_sizes[name]) for name, loss in sorted(self.other_losses.items())]
        return {"loss": SumOfRatios((own, *others)), **self.metrics}

    def total(self, batch: Batch, ratios: dict[str, Tensor] | None = None) -> Tensor:
        """() float32, all terms as one sum over `batch.sample_size` units.

        `ratios` holds, by name, the units of `loss` over those of each other loss in the whole update; without it this
        micro-batch is the update.
        """
        total = self.loss
        if self.mean is not None:
            total = total + self.mean * batch.sample_size
        if unknown := self.other_losses.keys() - batch.other_sizes.keys():
            raise TypeError(f"other_losses: the units of {sorted(unknown)} are missing in the collator's other_sizes")
        for name, loss in self.other_losses.items():
            ratio = batch.sample_size / max(1, batch.other_sizes[name]) if ratios is None else ratios[name]
            total = total + loss * ratio
        return total


@dataclass(frozen=True)
class Progress:
    """Where the run stands: optimiser updates applied so far, of how many, and the run's seed.

    The seed is here because what a method draws per update (LayerDrop) must follow from (seed, update) alone.
    """

    update: int
    total_updates: int
    seed: int

    def rng(self) -> np.random.Generator:
        """A generator that is the same on every rank and after every restart of this update."""
        return np.random.default_rng([self.seed, self.update, 0])


@dataclass(frozen=True)
class LabelSource:
    """Where a method's label directories come from: `kind` says what they hold, `command` (with `{dir}` for the data)
    makes one, and `make(data_dir, output_dir)` makes that of the embedded sample under `output_dir`, on all ranks.
    """

    kind: str
    command: str
    make: Callable[[Path, Path], Path]


TargetKind = Literal["frames", "symbols", "class", "tags"]


@dataclass(frozen=True)
class TargetSpec:
    """One thing that a recipe trains on beside the audio; `name` is its key in `Example.targets`.

    | `kind` | where it comes from | in `Example.targets` |
    | --- | --- | --- |
    | frames | `data.labels`, one directory for each spec of this kind | (F_total,) integers, of the whole utterance |
    | symbols | `data.transcripts` and `data.dictionary` | (S,) int64; None where the row is unlabelled or cropped |
    | class | `data.classes` and `data.class_names` | () int64; None where the row is unlabelled |
    | tags | `data.classes` and `data.class_names` | (C,) float32 of zeros and ones; None where the row is unlabelled |

    `num_classes` is what the recipe states, 0 where it states nothing; the data decide (`Method.fit_to_targets`).
    `column` is that of the table. `source` says how label directories are made; None is k-means, by
    tools/kmeans_labels.py. With `several` the user may give more or fewer label directories than the recipe has specs:
    the names then end in a number from 0.
    """

    name: str
    kind: TargetKind
    num_classes: int = 0
    column: str = ""
    source: LabelSource | None = None
    several: bool = False


@dataclass(frozen=True)
class TargetInfo:
    """What a run's data hold for one target: how many classes and, by kind, more.

    `rate_hz` (labels per second) and `directory` belong to frames; `names` are the symbols, classes or tags in the
    order of their numbers.
    """

    num_classes: int
    rate_hz: int | None = None
    directory: Path | None = None
    names: tuple[str, ...] = ()


class Encoder(nn.Module):
    """What is exported: waveforms to hidden states.

    `Config` is the dataclass that the constructor takes and keeps as `config`. `hidden_sizes` and `downsample_rates`
    (samples per frame) have one entry per hidden state.
    """

    Config: ClassVar[type]
    config: Any
    hidden_sizes: list[int]
    downsample_rates: list[int]
    # Options, by dotted name, that may differ between weights and the encoder they start: no tensor depends on them.
    weight_independent_fields: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build from the plain mapping that an export's config.json holds.

        Raises ConfigError, naming the field, for a mapping that `Config` does not take.
        """
        return cls(encoder_config(cls.Config, config))

    def to_config(self) -> dict[str, Any]:
        """The plain mapping that `from_config` takes."""
        return asdict(self.config)

    def forward(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """(B, T) float32 and (B,) samples to [(B, F_l, D_l)] hidden states and [(B,)] frame counts.

        Without `lengths` nothing is padded.
        """
        raise NotImplementedError

    def compile_layers(self) -> None:
        """Compile the layers of the network that repeat; encoders that gain nothing leave this as it is."""

    def draw_layerdrop(self, rng: np.random.Generator) -> None:
        """Draw which layers the next forwards in training skip; encoders that skip none leave this as it is."""

    def checkpoint_activations(self) -> None:
        """Switch activation checkpointing on: training keeps the inputs of layers, and backward runs them again.

        Raises UserError where that is not built.
        """
        raise UserError(
            f"trainer.checkpoint_activations: {type(self).__name__} has no activation checkpointing; leave it "
            "off, or take a smaller batch.seconds_per_micro_batch"
        )


class Method(nn.Module, ABC):
    """A pre-training objective around an encoder.

    A method defines `Config` (a dataclass whose first field is `name`), makes `encoder` in its constructor, and defines
    `collator`, `forward` and `training_flops`; the rest has a meaning only for those that need it.

    What it keeps between steps (teacher, codebook, running statistics) is a parameter or a buffer, so that saving and
    resuming need no code of the method's own.
    """

    Config: ClassVar[type]
    # Sub-modules that have a use after training and go into native exports beside the encoder: a CTC head, a decoder.
    exported_heads: ClassVar[tuple[str, ...]] = ()
    # Sub-modules that `begin` loads from a file of their own: weights for `init_from` may lack them.
    separate_parts: ClassVar[tuple[str, ...]] = ()
    encoder: Encoder

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def targets(cls, config: Any) -> list[TargetSpec]:
        """What the recipe trains on beside the audio; empty for methods that need nothing else."""
        return []

    @classmethod
    def complete(cls, config: Any, earlier: dict[str, Any] | None) -> Any:
        """The recipe's configuration with what other files decide, such as the shape of a teacher's network.

        Called before anything is built. `earlier` is the method's block in the run that is resumed, if any, so that it
        needs those files no more.
        """
        return config

    @classmethod
    def fit_to_targets(cls, config: Any, found: dict[str, TargetInfo]) -> Any:
        """The recipe's configuration fitted to the targets of this run, which are all there; called before anything
        is built. What is kept in the configuration, such as the names of symbols, stays with checkpoints and exports.
        """
        return config

    def begin(self, found: dict[str, TargetInfo]) -> None:
        """Start what follows from the targets and the encoder: load the network that made the labels, put a teacher
        where its student is.

        Called where a run starts, after `init_from`; a teacher that `init_head=keep` has loaded stays as it is
        (`Teacher.start_at`). A run that resumes has all of it in its checkpoint.
        """

    @classmethod
    @abstractmethod
    def collator(cls, config: Any) -> Collator:
        """What turns examples into batches for this configuration."""

    @abstractmethod
    def forward(self, batch: Batch) -> StepOutput:
        """The loss of one micro-batch."""

    def before_step(self, progress: Progress) -> None:
        """Layers to drop, temperature, freezing: once per update, before the first micro-batch; update = n.

        A method that has more to do calls this one too.
        """
        self.encoder.draw_layerdrop(progress.rng())

    def after_step(self, progress: Progress) -> None:
        """Teachers, codebooks: once per applied update; update = n + 1."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters for the optimiser; one group unless a method says otherwise.

        A group has `params` and, where it differs from the recipe, `weight_decay`, `lr_scale` (a factor on the learning
        rate) and `active`, a function of `Progress` that says whether the group is trained at this update. An inactive
        group is left as it is, its moments and its weight decay included, and counts nothing in the gradient norm.
        """
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    @abstractmethod
    def training_flops(self, samples: int) -> float:
        """Floating-point operations of one training step on one waveform of `samples`, those of teachers included."""

    def figures(self, batch: Batch) -> dict[str, Any]:
        """Matplotlib figures for TensorBoard at validation, by tag; none unless a method draws some."""
        return {}
