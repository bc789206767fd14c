"""Collating for methods that hide spans of a convolutional encoder's frames (wav2vec 2.0, UniSpeech, data2vec)."""

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

    def draw(self, examples: list[Example]) -> Masked:
        """Stack the waveforms, and hide spans in each row by its own generator."""
        stacked = stack_waveforms(examples)
        samples, lengths = stacked.waveforms.shape[1], stacked.lengths
        frames = int(count_frames(samples, self.conv_feature_layers))
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
