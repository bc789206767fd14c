"""What is clustered: MFCC, log-mel, or one layer of an encoder, of one waveform at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pretrain.data.alignments import first_centre_samples, frame_centres
from pretrain.errors import UserError
from pretrain.features.mel import SAMPLE_RATE, WINDOW_SAMPLES, log_mel
from pretrain.features.mfcc import MFCC_DIM, mfcc39
from pretrain.method import Encoder

KINDS = ("mfcc", "logmel", "upstream")
MEL_BINS = 80
SPECTRAL_RATE_HZ = 100
MAX_CHUNK_SECONDS = 100.0  # fairseq's max_chunk of 1,600,000 samples


class FeatureError(UserError):
    """Features that were asked for in a way that cannot be met: "<option>: <what is wrong>; <what to do>"."""


@dataclass(frozen=True)
class FeatureSpec:
    """`kind` is mfcc, logmel or upstream. For an upstream: `method` is the method's name, `layer` the index of the
    hidden state (0 is the Transformer's input), `max_chunk_seconds` the longest piece that is encoded at once.
    """

    kind: str
    method: str | None = None
    layer: int | None = None
    max_chunk_seconds: float = MAX_CHUNK_SECONDS

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FeatureError(f"features: unknown kind '{self.kind}'; known: {', '.join(KINDS)}")
        if self.kind == "upstream" and (self.method is None or self.layer is None):
            raise FeatureError("layer: missing; features=upstream needs the index of a hidden state (layer=6)")
        if self.kind != "upstream" and self.layer is not None:
            raise FeatureError(f"layer: features={self.kind} has no layers; leave it out or use features=upstream")


class FeatureExtractor(Protocol):
    """Turns (T,) waveforms at 16 kHz into (F, dim) float32 features, `rate_hz` frames a second.

    `first_centre_samples` is the middle of the first frame.
    """

    spec: FeatureSpec
    rate_hz: int
    first_centre_samples: int
    dim: int

    def extract(self, waveform: Tensor) -> Tensor: ...


def feature_centres(extractor: FeatureExtractor, frames: int) -> np.ndarray:
    """(F,) int64 samples: the middle of each of the first `frames` features."""
    return frame_centres(frames, SAMPLE_RATE // extractor.rate_hz, extractor.first_centre_samples)


class SpectralFeatures:
    """39 MFCC as in fairseq, or 80 log-mel bands; on the waveform's device."""

    def __init__(self, spec: FeatureSpec) -> None:
        self.spec = spec
        self.rate_hz = SPECTRAL_RATE_HZ
        self.first_centre_samples = WINDOW_SAMPLES // 2
        self.dim = MFCC_DIM if spec.kind == "mfcc" else MEL_BINS

    def extract(self, waveform: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(waveform.device.type, enabled=False):
            return mfcc39(waveform) if self.spec.kind == "mfcc" else log_mel(waveform, MEL_BINS)


class UpstreamFeatures:
    """One hidden state of an encoder, in float32 and evaluation mode.

    Every waveform goes through alone and unpadded, so that its features do not depend on what else is labelled. Pieces
    of a waveform longer than `max_chunk_seconds` overlap by one frame, so that the number of frames is that of the
    whole; the context ends at their borders, and an encoder that normalises its input does so per piece.
    """

    def __init__(self, spec: FeatureSpec, encoder: Encoder) -> None:
        """Raises FeatureError for a layer that the encoder does not have, or a frame rate that is no integer."""
        layers = len(encoder.hidden_sizes)
        if spec.layer is None or not 0 <= spec.layer < layers:
            raise FeatureError(f"layer: {spec.layer} does not exist; this encoder has 0 to {layers - 1}")
        self.spec = spec
        self.layer = spec.layer
        self.encoder = encoder.float().eval().requires_grad_(False)
        self.dim = encoder.hidden_sizes[self.layer]
        self.stride_samples = encoder.downsample_rates[self.layer]
        if SAMPLE_RATE % self.stride_samples:
            raise FeatureError(
                f"layer: {self.layer} has a frame every {self.stride_samples} samples, which is no integer per second; "
                "choose another layer"
            )
        self.rate_hz = SAMPLE_RATE // self.stride_samples
        self.first_centre_samples = first_centre_samples(encoder, self.stride_samples)
        self.min_samples: int = getattr(encoder, "receptive_field_samples", self.stride_samples)

    def extract(self, waveform: Tensor) -> Tensor:
        """(T,) samples to (F, D) hidden states; longer waveforms than the spec's chunk go through in chunks."""
        chunk_frames = max(1, int(self.spec.max_chunk_seconds * SAMPLE_RATE) // self.stride_samples)
        chunk_samples = chunk_frames * self.stride_samples
        if len(waveform) <= chunk_samples:
            return self._encode(waveform)
        overlap = -(-max(0, self.min_samples - self.stride_samples) // self.stride_samples) * self.stride_samples
        pieces = [
            self._encode(waveform[start : start + chunk_samples + overlap])[:chunk_frames]
            for start in range(0, len(waveform), chunk_samples)
        ]
        return torch.cat(pieces)

    def _encode(self, waveform: Tensor) -> Tensor:
        if len(waveform) < self.min_samples:
            return waveform.new_zeros(0, self.dim, dtype=torch.float32)
        lengths = torch.tensor([len(waveform)], device=waveform.device)
        with torch.no_grad(), torch.autocast(waveform.device.type, enabled=False):
            hidden_states, frame_lengths = self.encoder(waveform.float().unsqueeze(0), lengths)
        return hidden_states[self.layer][0, : int(frame_lengths[self.layer])].float()
