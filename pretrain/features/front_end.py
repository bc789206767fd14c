"""Acoustic features as the first part of a network: a batch of waveforms to frames, on the device, without gradients.

One module for training and for `Upstream`. Each kind equals what s3prl computes for the upstreams that use it:

| kind | s3prl | methods |
|---|---|---|
| log_mel, log_linear | `upstream/baseline/preprocessor.py`, OnlinePreprocessor | Mockingjay, TERA, Audio ALBERT |
| fbank, povey window | `upstream/baseline/extracter.py` | TERA on 240 dimensions |
| fbank, hamming window | `upstream/apc/audio.py` and its copies | APC, VQ-APC, NPC, DeCoAR |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from pretrain.config import MAY_BE_ZERO
from pretrain.errors import UserError
from pretrain.features.cmvn import normalize_frames, valid_mask
from pretrain.features.fbank import SHIFT_SAMPLES, Fbank, append_deltas
from pretrain.features.mel import WINDOW_SAMPLES
from pretrain.features.spectrogram import LINEAR_BINS, LogSpectrogram
from pretrain.method import CollatorDefaults

# One number, or an integer tensor of many.
Samples = TypeVar("Samples", int, Tensor)

WINDOWS = ("povey", "hamming")


@dataclass
class NormalizationConfig:
    """How frames are normalised. `kind` is "none", "utterance" or "fixed"; the first two have no fields of their own.

    "utterance" brings each dimension to zero mean and unit variance over the utterance, as s3prl does.
    """

    VARIANTS: ClassVar[dict[str, type[NormalizationConfig]]] = {}

    kind: str


@dataclass
class FixedNormalizationConfig(NormalizationConfig):
    """Subtract a given `mean` and divide by a given `deviation`: one number for all dimensions, or one for each."""

    mean: list[float]
    deviation: list[float]

    def __post_init__(self) -> None:
        if min(self.deviation, default=0.0) <= 0:
            raise UserError(f"front_end.normalization.deviation: {self.deviation} must be positive; correct the recipe")


NormalizationConfig.VARIANTS.update(
    none=NormalizationConfig, utterance=NormalizationConfig, fixed=FixedNormalizationConfig
)


@dataclass
class FrontEndConfig:
    """25 ms windows every 10 ms at 16 kHz, and what is made of them; `kind` names one of the subclasses.

    `frame_step` n keeps every n-th frame.
    """

    VARIANTS: ClassVar[dict[str, type[FrontEndConfig]]] = {}
    CENTRED: ClassVar[bool] = True

    kind: str
    frame_step: int
    normalization: NormalizationConfig

    def __post_init__(self) -> None:
        if self.VARIANTS.get(self.kind) is not type(self):
            raise UserError(f"front_end.kind: '{self.kind}' is no kind of {type(self).__name__}; correct the recipe")
        if self.dim < 1 or self.frame_step < 1:
            raise UserError("front_end: bins and frame_step must be at least 1; correct the recipe")
        if isinstance(self.normalization, FixedNormalizationConfig):
            for name in ("mean", "deviation"):
                if (count := len(getattr(self.normalization, name))) not in (1, self.dim):
                    raise UserError(
                        f"front_end.normalization.{name}: {count} numbers for {self.dim} dimensions; give one, or one "
                        "for each"
                    )

    @staticmethod
    def upgraded(values: dict[str, Any]) -> dict[str, Any]:
        """A block of before the kinds had classes of their own: flat, with `cmvn`, and null or 0 for other kinds."""
        if "cmvn" not in values:
            return values
        absent = {"fbank": ("level_db",), "log_mel": ("window", "low_hz", "deltas")}
        absent["log_linear"] = (*absent["log_mel"], "bins")
        kept = {k: v for k, v in values.items() if k not in ("cmvn", *absent.get(str(values.get("kind")), ()))}
        return kept | {"normalization": {"kind": "utterance" if values["cmvn"] else "none"}}

    @property
    def dim(self) -> int:
        """Width of a frame."""
        raise NotImplementedError

    @property
    def stride_samples(self) -> int:
        """Samples from one frame to the next."""
        return SHIFT_SAMPLES * self.frame_step

    @property
    def receptive_field_samples(self) -> int:
        """Samples in the window of one frame, before differences and normalisation."""
        return WINDOW_SAMPLES

    @property
    def first_centre_samples(self) -> int:
        """The middle of the first frame: the first sample, where the edges are padded."""
        return 0 if self.CENTRED else WINDOW_SAMPLES // 2

    def frames(self, samples: Samples) -> Samples:
        """Frames of `samples` samples; takes a number or an integer tensor."""
        return (self.full_rate_frames(samples) + self.frame_step - 1) // self.frame_step

    def full_rate_frames(self, samples: Samples) -> Samples:
        """Frames before `frame_step` leaves some out."""
        return 1 + (samples if self.CENTRED else samples - WINDOW_SAMPLES) // SHIFT_SAMPLES


@dataclass
class LogMelConfig(FrontEndConfig):
    """Logarithms of `bins` HTK mel bands from 0 Hz, of a centred STFT.

    Every waveform is first brought to an RMS level of `level_db` dBFS.
    """

    bins: int
    level_db: float

    @property
    def dim(self) -> int:
        """Width of a frame."""
        return self.bins


@dataclass
class LogLinearConfig(FrontEndConfig):
    """Logarithms of the 201 bins of the power spectrum, of a centred STFT; `level_db` as for "log_mel"."""

    level_db: float

    @property
    def dim(self) -> int:
        """Width of a frame."""
        return LINEAR_BINS


@dataclass
class FbankConfig(FrontEndConfig):
    """Logarithms of `bins` of Kaldi's mel bands, edges not padded.

    `window` is "povey" or "hamming", `low_hz` the lower edge of the lowest band; `deltas` counts the orders of
    differences that are appended.
    """

    CENTRED: ClassVar[bool] = False

    bins: int
    window: str
    low_hz: float
    deltas: int = field(metadata=MAY_BE_ZERO)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window not in WINDOWS:
            raise UserError(f"front_end.window: unknown window '{self.window}'; use {' or '.join(WINDOWS)}")
        if self.deltas < 0:
            raise UserError(f"front_end.deltas: {self.deltas} must be at least 0; correct the recipe")

    @property
    def dim(self) -> int:
        """Width of a frame, differences included."""
        return self.bins * (1 + self.deltas)


FrontEndConfig.VARIANTS.update(log_mel=LogMelConfig, log_linear=LogLinearConfig, fbank=FbankConfig)


@dataclass(frozen=True)
class FeatureFrames(CollatorDefaults):
    """The frame grid of a front end: what a collator says of its crops."""

    front_end: FrontEndConfig

    @property
    def stride_samples(self) -> int:
        """Samples from one frame to the next."""
        return self.front_end.stride_samples

    @property
    def fewest_frames(self) -> int:
        """Frames that the shortest crop must have, so that there is something to learn."""
        return 1

    @property
    def receptive_field_samples(self) -> int:
        """Samples of the shortest crop."""
        return self.front_end.receptive_field_samples + (self.fewest_frames - 1) * self.front_end.stride_samples


class FrontEnd(nn.Module):
    """Waveforms to frames (B, F, `dim`), by the configuration."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: FrontEndConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = config.dim
        self.stride_samples = config.stride_samples
        self.receptive_field_samples = config.receptive_field_samples
        self.deltas = config.deltas if isinstance(config, FbankConfig) else 0
        self.extract = _extractor(config)
        if isinstance(config.normalization, FixedNormalizationConfig):
            self.register_buffer("mean", torch.tensor(config.normalization.mean), persistent=False)
            self.register_buffer("deviation", torch.tensor(config.normalization.deviation), persistent=False)

    def frames(self, samples: Samples) -> Samples:
        """Frames of `samples` samples; takes a number or an integer tensor."""
        return self.config.frames(samples)

    @torch.no_grad()
    def forward(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, T) waveforms, zero after `lengths` (B,) samples, to (B, F, dim) float32 and (B,) frame counts.

        `lengths` None says that nothing is padded; the counts are None then. The frames of a padded row are those of
        the waveform alone, and zero after its count, which is at least one. T must hold one window (400 samples).
        """
        config = self.config
        with torch.autocast(waveforms.device.type, enabled=False):
            features = self.extract(waveforms.float(), lengths)
            counts = None if lengths is None else config.full_rate_frames(lengths).clamp(min=1)
            features = append_deltas(features, self.deltas, counts)
            if config.normalization.kind == "utterance":
                features = normalize_frames(features, counts)
            else:
                if config.normalization.kind == "fixed":
                    features = (features - self.mean) / self.deviation
                if counts is not None:
                    features = torch.where(valid_mask(counts, features.shape[1]).unsqueeze(2), features, 0.0)
        if lengths is not None:
            counts = config.frames(lengths).clamp(min=1)
        return features[:, :: config.frame_step], counts


def _extractor(config: FrontEndConfig) -> nn.Module:
    """The module that turns waveforms into the frames of `config`, before differences and normalisation."""
    if isinstance(config, FbankConfig):
        return Fbank(config.bins, config.window, config.low_hz)
    assert isinstance(config, LogMelConfig | LogLinearConfig)
    return LogSpectrogram(config.bins if isinstance(config, LogMelConfig) else None, config.level_db)
