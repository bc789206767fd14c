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

import torch
from torch import Tensor, nn

from pretrain.config import MAY_BE_ZERO
from pretrain.errors import UserError
from pretrain.features.cmvn import normalize_frames, valid_mask
from pretrain.features.fbank import SHIFT_SAMPLES, Fbank, append_deltas
from pretrain.features.mel import WINDOW_SAMPLES
from pretrain.features.spectrogram import LINEAR_BINS, LogSpectrogram
from pretrain.method import CollatorDefaults

KINDS = ("log_mel", "log_linear", "fbank")
WINDOWS = ("povey", "hamming")


@dataclass
class FrontEndConfig:
    """25 ms windows every 10 ms at 16 kHz, and what is made of them.

    `kind` is "log_mel" (centred STFT, HTK mel bands from 0 Hz), "log_linear" (its 201 power bins) or "fbank" (Kaldi's
    mel bands, edges not padded). `bins` counts bands. For fbank alone: `window` ("povey" or "hamming"), `low_hz` (lower
    edge of the lowest band) and `deltas` (how many orders of differences are appended). For the other two alone:
    `level_db`, the RMS level in dBFS that every waveform is brought to first. Fields of the other kind are null, and
    `deltas` 0. `frame_step` n keeps every n-th frame. `cmvn` normalises each dimension over the utterance.
    """

    kind: str
    bins: int
    window: str | None
    low_hz: float | None
    deltas: int = field(metadata=MAY_BE_ZERO)
    level_db: float | None
    frame_step: int
    cmvn: bool

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"front_end.kind: unknown kind '{self.kind}'; use {', '.join(KINDS)}")
        if self.bins < 1 or self.frame_step < 1 or self.deltas < 0:
            raise UserError("front_end: bins and frame_step must be at least 1, deltas at least 0; correct the recipe")
        if self.kind == "fbank":
            if self.window not in WINDOWS or self.low_hz is None or self.level_db is not None:
                raise UserError(
                    f"front_end: fbank needs window ({' or '.join(WINDOWS)}) and low_hz, and takes no level_db; "
                    "correct the recipe"
                )
        elif self.level_db is None or self.window is not None or self.low_hz is not None or self.deltas:
            raise UserError(
                f"front_end: {self.kind} needs level_db, and takes no window, low_hz or deltas; correct the recipe"
            )
        if self.kind == "log_linear" and self.bins != LINEAR_BINS:
            raise UserError(f"front_end.bins: log_linear has {LINEAR_BINS} bins, not {self.bins}; correct the recipe")

    @property
    def dim(self) -> int:
        """Width of a frame."""
        return self.bins * (1 + self.deltas)

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
        return WINDOW_SAMPLES // 2 if self.kind == "fbank" else 0

    def frames(self, samples: int | Tensor) -> int | Tensor:
        """Frames of `samples` samples; takes a number or an integer tensor."""
        return (self.full_rate_frames(samples) + self.frame_step - 1) // self.frame_step

    def full_rate_frames(self, samples: int | Tensor) -> int | Tensor:
        """Frames before `frame_step` leaves some out."""
        return 1 + (samples - WINDOW_SAMPLES if self.kind == "fbank" else samples) // SHIFT_SAMPLES


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

    def __init__(self, config: FrontEndConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = config.dim
        self.stride_samples = config.stride_samples
        self.receptive_field_samples = config.receptive_field_samples
        if config.kind == "fbank":
            self.extract: nn.Module = Fbank(config.bins, config.window, config.low_hz)
        else:
            self.extract = LogSpectrogram(config.bins if config.kind == "log_mel" else None, config.level_db)

    def frames(self, samples: int | Tensor) -> int | Tensor:
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
            features = append_deltas(features, config.deltas, counts)
            if config.cmvn:
                features = normalize_frames(features, counts)
            elif counts is not None:
                features = torch.where(valid_mask(counts, features.shape[1]).unsqueeze(2), features, 0.0)
        if lengths is not None:
            counts = config.frames(lengths).clamp(min=1)
        return features[:, :: config.frame_step], counts
