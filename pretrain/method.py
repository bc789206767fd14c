"""The nouns that every method shares: what a batch holds, what a step returns, what a method must offer.

Shapes: B batch, T samples, F frames, D width, L layers. Times are samples at 16 kHz unless the name says otherwise.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.config import encoder_config
from pretrain.errors import UserError

RECIPES_DIR = Path(__file__).resolve().parent.parent / "recipes"
ENTRY_POINTS = "headwater.methods"


@dataclass
class Example:
    """One cropped utterance, on its way from the reader to the collator.

    `waveform` is (T,) float32 at 16 kHz; `start` is the crop's first sample, a multiple of the frame stride; `labels`
    holds one (F_total,) integer array per label set, for the whole utterance; `rng` is seeded by (seed, epoch, row).
    `transcript` is (S,) int64 symbol ids of `data.dictionary`, None where the row is unlabelled or cropped.
    """

    waveform: Tensor
    row: int
    start: int
    labels: list[np.ndarray]
    rng: np.random.Generator
    transcript: np.ndarray | None = None


@dataclass
class Batch:
    """One micro-batch, on its way from the collator to the method.

    `waveforms` is (B, T) float32, zero after each length; `lengths` (B,) int64 samples; `sample_size` the number of
    units that the loss sums over; `rows` (B,) int64 manifest rows; `padded` is False where every row fills T, known on
    the host so that attention can run without a mask; `extras` the method's own tensors, listed in its docstring;
    `problems` one line per file that could not be read and was replaced.
    """

    waveforms: Tensor
    lengths: Tensor
    sample_size: int
    rows: Tensor
    padded: bool = True
    extras: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

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

    `stride_samples` and `receptive_field_samples` describe the frame grid on which crops are placed. A collator
    with an attribute `reads_audio` that is False works on labels alone: no file is opened, and `Example.waveform` has
    the crop's length but holds only zeros, in the memory of one number (`objectives.collate.silent_waveforms`).
    """

    stride_samples: int
    receptive_field_samples: int

    def __call__(self, examples: list[Example]) -> Batch: ...


# What the health monitor must know of a metric: the variance of a teacher's targets, or of the network's own features.
Role = Literal["target_variance", "feature_variance"]


class Ratio(NamedTuple):
    """A metric that is reduced as sum(total) / sum(weight): a mean, an accuracy, a sum per something.

    `role` says what it means to the health monitor, where it has a meaning beyond its name.
    """

    total: Tensor
    weight: Tensor | float
    role: Role | None = None

    def nothing(self) -> Ratio:
        """The same metric of no units at all, for a rank that has no batch of its own."""
        return Ratio(torch.zeros_like(self.total), 0.0, self.role)


class Counts(NamedTuple):
    """A (V,) histogram that is reduced by summing; reported as perplexity and share of entries used."""

    counts: Tensor

    def nothing(self) -> Counts:
        """The same metric of no units at all, for a rank that has no batch of its own."""
        return Counts(torch.zeros_like(self.counts))


class StepOutput(NamedTuple):
    """`loss` is the () float32 SUM over the batch's `sample_size` units; `metrics` are detached device tensors.

    A tuple, because ZeRO 3 looks for the tensors of a module's output in tuples, to gather weights before backward.
    """

    loss: Tensor
    metrics: dict[str, Ratio | Counts]


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
class LabelInfo:
    """What a label set tells a method: labels per second, number of classes, and the directory that it lies in."""

    rate_hz: int
    num_classes: int
    directory: Path | None = None


@dataclass(frozen=True)
class LabelSource:
    """Where a method's label directories come from: `kind` says what they hold, `command` (with `{dir}` for the data)
    makes one, and `make(data_dir, output_dir)` makes that of the embedded sample under `output_dir`, on all ranks.
    """

    kind: str
    command: str
    make: Callable[[Path, Path], Path]


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

    def checkpoint_activations(self) -> None:
        """Switch activation checkpointing on: training keeps the inputs of layers, and backward runs them again.

        Raises UserError where that is not built.
        """
        raise UserError(
            f"trainer.checkpoint_activations: {type(self).__name__} has no activation checkpointing; leave it "
            "off, or take a smaller batch.seconds_per_micro_batch"
        )


class Method(nn.Module):
    """A pre-training objective around an encoder.

    What it keeps between steps (teacher, codebook, running statistics) is a parameter or a buffer, so that saving and
    resuming need no code of the method's own.
    """

    Config: ClassVar[type]
    encoder: Encoder

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def label_classes(cls, config: Any) -> list[int]:
        """Classes of each label set that the recipe trains on; empty for methods that need no labels."""
        return []

    @classmethod
    def adapt(cls, config: Any, labels: list[LabelInfo]) -> Any:
        """Fit the recipe's configuration to the label sets of this run; called before anything is built."""
        return config

    @classmethod
    def label_source(cls, config: Any) -> LabelSource | None:
        """How the labels are made that the recipe trains on; None is k-means, by tools/kmeans_labels.py."""
        return None

    def begin(self, labels: list[LabelInfo]) -> None:
        """Take what else travels in the label directories, such as the weights of the network that made the labels.

        Called where a run starts, after `init_from`; a run that resumes has it in its checkpoint.
        """

    @classmethod
    def needs_transcripts(cls, config: Any) -> bool:
        """Whether the recipe trains on `data.transcripts`."""
        return False

    @classmethod
    def adapt_transcripts(cls, config: Any, symbols: list[str]) -> Any:
        """Fit the configuration to the dictionary of this run's transcripts: symbol i of an `Example.transcript`.

        Called before anything is built, where `needs_transcripts`; kept in the configuration, the symbols stay with
        checkpoints and exports.
        """
        return config

    @classmethod
    def collator(cls, config: Any) -> Collator:
        raise NotImplementedError

    def forward(self, batch: Batch) -> StepOutput:
        raise NotImplementedError

    def before_step(self, progress: Progress) -> None:
        """Temperature, freezing, layers to drop: once per update, before the first micro-batch; update = n."""

    def after_step(self, progress: Progress) -> None:
        """Teachers, codebooks: once per applied update; update = n + 1."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters for the optimiser; one group unless a method says otherwise."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def training_flops(self, samples: int) -> float:
        """Floating-point operations of one training step on one waveform of `samples`."""
        raise NotImplementedError

    def figures(self, batch: Batch) -> dict[str, Any]:
        """Matplotlib figures for TensorBoard at validation, by tag; none unless a method draws some."""
        return {}


def method_names() -> list[str]:
    """Every method that can be named in `method.name`: folders under recipes/ and installed entry points."""
    folders = [p.name for p in RECIPES_DIR.iterdir() if (p / "__init__.py").is_file()] if RECIPES_DIR.is_dir() else []
    return sorted({*folders, *(e.name for e in importlib.metadata.entry_points(group=ENTRY_POINTS))})


def load_method(name: str) -> ModuleType:
    """Import the package of one method; it has the attributes `Method` and `Encoder`.

    Raises UserError, with the nearest names, for a name that is neither a folder under recipes/ nor an installed
    entry point of the group `headwater.methods`.
    """
    if re.fullmatch(r"[a-z][a-z0-9_]*", name) and (RECIPES_DIR / name / "__init__.py").is_file():
        return importlib.import_module(f"recipes.{name}")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
        return entry.load()
    near = get_close_matches(name, method_names(), n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(method_names())}"
    raise UserError(f"method.name: unknown method '{name}'; {hint}")


def load_interop(name: str) -> ModuleType | None:
    """The method's `interop` module (key tables of other projects), or None where the method has none."""
    return _part(name, "interop")


def load_reference_steps(name: str) -> ModuleType | None:
    """The method's `reference_steps` module, or None where it has none: other projects' training, for the benchmark."""
    return _part(name, "reference_steps")


def _part(name: str, part: str) -> ModuleType | None:
    module = f"{load_method(name).__name__}.{part}"
    return importlib.import_module(module) if importlib.util.find_spec(module) else None
