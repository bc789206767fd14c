"""Collating for methods that hide spans of a convolutional encoder's frames, such as HuBERT and wav2vec 2.0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from pretrain.method import Example
from pretrain.models.conv_features import ConvFrames, valid_frames
from pretrain.models.conv_features import frames as count_frames
from pretrain.models.speech_config import SpeechEncoderConfig
from pretrain.objectives.collate import Stacked, stack_waveforms
from pretrain.objectives.masking import equal_span_masks


class Masked(NamedTuple):
    """Stacked waveforms, `valid` frames of each row, and `mask` (B, F) with K True in every row."""

    stacked: Stacked
    valid: list[int]
    mask: np.ndarray


@dataclass(frozen=True)
class SpanMaskCollator(ConvFrames):
    """Draws the masks of a batch; `draw` is what a method's collator begins with."""

    frame_length_rule: str
    mask_prob: float
    mask_length: int
    mask_min_spans: int

    def frames(self, examples: list[Example]) -> int:
        """Frames of the longest example."""
        return int(count_frames(max(len(example.waveform) for example in examples), self.conv_feature_layers))

    def draw(self, examples: list[Example], frames: int | None = None) -> Masked:
        """Stack the waveforms, and hide spans in each row by its own generator.

        `frames` is F, where targets end before the frames of the waveforms do; without it all frames count.
        """
        stacked = stack_waveforms(examples)
        frames = self.frames(examples) if frames is None else frames
        samples, lengths = stacked.waveforms.shape[1], stacked.lengths
        valid = valid_frames(lengths, samples, frames, self.conv_feature_layers, self.frame_length_rule).tolist()
        rngs = [example.rng for example in examples]
        mask = equal_span_masks(rngs, valid, frames, self.mask_prob, self.mask_length, self.mask_min_spans)
        return Masked(stacked, valid, mask)


class SpanMaskConfig(Protocol):
    """What `span_mask_options` reads of a method's configuration."""

    encoder: SpeechEncoderConfig
    mask_prob: float
    mask_length: int
    mask_min_spans: int


def span_mask_options(config: SpanMaskConfig) -> dict[str, Any]:
    """The fields of `SpanMaskCollator` that `config` gives."""
    return {
        "conv_feature_layers": config.encoder.conv_feature_layers,
        "frame_length_rule": config.encoder.frame_length_rule,
        "mask_prob": config.mask_prob,
        "mask_length": config.mask_length,
        "mask_min_spans": config.mask_min_spans,
    }
