"""APC's configuration, loss and prediction head, with VQ-APC's quantizer and multi-target APC's second objective.

Source: arXiv 1904.03240 and 1910.12607; `s3prl/pretrain/apc/pretrain_expert.py`. The second objective: arXiv
2004.05274, of which no code was published; conf/recipe/apc_multi_target.yaml says what is not established.
Letters: N anchors, H width of the GRUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.config import ConfigError
from pretrain.features.cmvn import valid_mask
from pretrain.features.front_end import FeatureFrames
from pretrain.losses.reconstruction import l1_sum
from pretrain.method import Batch, Counts, Example, Method, Metric, Ratio, StepOutput
from pretrain.models.kernels import Linear
from pretrain.objectives.collate import stack_waveforms
from pretrain.objectives.figures import band_error_figure, band_errors, spectrogram_figure
from pretrain.objectives.masking import frames_at
from recipes.apc.encoder import ApcEncoder, ApcEncoderConfig


@dataclass
class PastConfig:
    """The auxiliary objective of multi-target APC: from sampled anchors, predict once more what is past.

    A share `anchor_share` of the frames are anchors. From the hidden state of each, a second GRU reads the `length`
    frames that begin `offset` frames before the anchor, and predicts as far ahead as the first GRU does; its loss
    counts `weight` times.
    """

    weight: float
    anchor_share: float
    offset: int
    length: int

    def __post_init__(self) -> None:
        if not 0 < self.anchor_share <= 1:
            raise ConfigError(f"method.past.anchor_share: {self.anchor_share} is no share; give more than 0, at most 1")
        if not 1 <= self.length <= self.offset:
            raise ConfigError(
                f"method.past: length {self.length} must be at least 1 and at most offset {self.offset}: the segment "
                "lies before its anchor"
            )


@dataclass
class ApcConfig:
    """`time_shift` is how many frames ahead the target lies; `past` null is APC with its one objective."""

    name: str
    encoder: ApcEncoderConfig
    time_shift: int
    past: PastConfig | None

    def __post_init__(self) -> None:
        if self.time_shift < 1:
            raise ConfigError(f"method.time_shift: {self.time_shift} must be at least 1")


@dataclass(frozen=True)
class ApcCollator(FeatureFrames):
    """Counts the frames that have a target, and draws the anchors; see `ApcMethod` for what it puts into `extras`."""

    time_shift: int
    past: PastConfig | None

    @property
    def fewest_frames(self) -> int:
        """One frame with a target, and with a past where that is asked for."""
        return 1 + self.time_shift + (self.past.offset if self.past else 0)

    def __call__(self, examples: list[Example]) -> Batch:
        stacked = stack_waveforms(examples)
        scored = (self.front_end.frames(stacked.lengths) - self.time_shift).clamp(min=0)
        return stacked.batch(int(scored.sum()), self._anchors(examples, scored.tolist()) if self.past else {})

    def _anchors(self, examples: list[Example], scored: list[int]) -> dict[str, np.ndarray]:
        """Frames, without repetition, that have `offset` frames before them."""
        assert self.past is not None  # else there are no anchors
        rows, frames = [], []
        for row, (example, count) in enumerate(zip(examples, scored, strict=True)):
            candidates = np.arange(self.past.offset, count)
            if len(candidates):
                number = max(1, round(self.past.anchor_share * len(candidates)))
                frames.append(np.sort(example.rng.choice(candidates, number, replace=False)))
                rows.append(np.full(number, row))
        none = np.zeros(0, dtype=np.int64)
        return {
            "anchor_rows": np.concatenate([none, *rows]),
            "anchor_frames": np.concatenate([none, *frames]),
        }


class Prediction(NamedTuple):
    """`hidden` (B, F, H) of the last layer; `frames` (B, F, dim) predicted; `codes` (B, F, G), or None."""

    hidden: Tensor
    frames: Tensor
    codes: Tensor | None


class PastPredictor(nn.Module):
    """Multi-target APC's second GRU with a head of its own; it is not part of the encoder."""

    def __init__(self, dim: int, hidden_size: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(dim, hidden_size, batch_first=True)
        self.postnet = Linear(hidden_size, dim)

    def forward(self, segments: Tensor, anchors: Tensor) -> Tensor:
        """(N, length, dim) frames and the (N, H) hidden states to start from, to (N, length, dim) predictions."""
        return self.postnet(self.rnn(segments, anchors.float().unsqueeze(0))[0])


class ApcMethod(Method):
    """Encoder and linear head; the loss is the absolute error of the frame `time_shift` ahead, mean over bands.

    A unit is a frame that has a target. Reads `batch.extras`, only with `past`: `anchor_rows` (N,) and `anchor_frames`
    (N,) int64, which frames of which rows are anchors.
    """

    Config = ApcConfig
    config: ApcConfig
    encoder: ApcEncoder

    def __init__(self, config: ApcConfig) -> None:
        super().__init__(config)
        self.encoder = ApcEncoder(config.encoder)
        dim, width = self.encoder.front_end.dim, config.encoder.hidden_size
        self.postnet = Linear(width, dim)
        self.past = PastPredictor(dim, width) if config.past else None

    @classmethod
    def collator(cls, config: ApcConfig) -> ApcCollator:
        """The collator of this configuration."""
        return ApcCollator(config.encoder.front_end, config.time_shift, config.past)

    def predict(self, features: Tensor, frame_lengths: Tensor | None, noise: list[Tensor] | None = None) -> Prediction:
        """(B, F, dim) features, (B,) frame counts or None, to what is expected `time_shift` frames after each.

        `noise` takes the place of the quantizer's, see `LinearGumbelQuantizer`.
        """
        hidden = self.encoder.context(features, frame_lengths)[-1]
        if self.encoder.quantizer is None:
            return Prediction(hidden, self.postnet(hidden), None)
        chosen = self.encoder.quantize(hidden, noise)
        return Prediction(hidden, self.postnet(chosen.vectors), chosen.codes)

    def forward(self, batch: Batch) -> StepOutput:
        """`error` is that of the frame ahead; `error_of_copy` and `error_of_mean` are what the present frame, and the
        utterance's mean, would give.
        """
        shift, units = self.config.time_shift, batch.sample_size
        features, frame_lengths = self.encoder.front_end(batch.waveforms, batch.lengths_if_padded)
        present, target = features[:, :-shift], features[:, shift:]
        scored = None if frame_lengths is None else (frame_lengths - shift).clamp(min=0)
        valid = None if scored is None else valid_mask(scored, present.shape[1]).unsqueeze(2)
        prediction = self.predict(present, scored)
        dim = target.shape[2]
        loss = l1_sum(prediction.frames, target, valid) / dim
        metrics: dict[str, Metric] = {
            "error": Ratio(loss.detach(), units),
            "error_of_copy": Ratio(l1_sum(present, target, valid) / dim, units),
            # Features have zero mean per utterance, so the mean predictor says zero.
            "error_of_mean": Ratio(l1_sum(target.new_zeros(()), target, valid) / dim, units),
        }
        if prediction.codes is not None:
            assert self.encoder.quantizer is not None  # it made the codes
            counts = self.encoder.quantizer.counts(prediction.codes, None if valid is None else valid.squeeze(2))
            metrics |= {f"codes_{group}": Counts(total) for group, total in enumerate(counts)}
        output = StepOutput(loss, metrics)
        if self.config.past is not None:
            past = self._past_error(features, prediction.hidden, batch.extras)
            metrics |= {"loss_future": Ratio(loss.detach(), units), "loss_past": Ratio(past.detach(), 1.0)}
            output = output._replace(mean=self.config.past.weight * past)
        return output

    def _past_error(self, features: Tensor, hidden: Tensor, extras: dict[str, Tensor]) -> Tensor:
        """() mean absolute error of the segments before the anchors; zero without anchors."""
        past, predictor, shift = self.config.past, self.past, self.config.time_shift
        assert past is not None
        assert predictor is not None  # else there are no anchors
        rows, frames = extras["anchor_rows"], extras["anchor_frames"]
        if not len(rows):
            return hidden.sum() * 0.0
        reach = torch.arange(past.length + shift, device=features.device) - past.offset
        segments = features[rows.unsqueeze(1), frames.unsqueeze(1) + reach]
        anchors = frames_at(hidden, rows * hidden.shape[1] + frames)
        targets = segments[:, shift:]
        return l1_sum(predictor(segments[:, : past.length], anchors), targets) / targets.numel()

    def training_flops(self, samples: int) -> float:
        """Encoder, head and, per anchor, the second GRU."""
        frames = max(0, self.encoder.front_end.frames(samples) - self.config.time_shift)
        width, dim = self.config.encoder.hidden_size, self.encoder.front_end.dim
        head = 2.0 * frames * width * dim
        past = 0.0
        if self.config.past:
            steps = self.config.past.anchor_share * frames * self.config.past.length
            past = 2.0 * steps * (3 * width * (dim + width) + width * dim)
        return self.encoder.training_flops(samples) + 3 * (head + past)

    def figures(self, batch: Batch) -> dict[str, Any]:
        """The first utterance's frames, what was predicted of them, and the error in every mel band."""
        shift = self.config.time_shift
        features, _ = self.encoder.front_end(batch.waveforms[:1, : int(batch.lengths[0])], None)
        present, target = features[0, :-shift], features[0, shift:]
        predicted = self.predict(features[:, :-shift], None).frames[0]
        panels = {"input": present, f"target: input {shift} frames later": target, "prediction": predicted}
        guesses = {"prediction": predicted, "present frame": present, "mean": torch.zeros_like(target)}
        return {
            "prediction": spectrogram_figure(panels),
            "band_error": band_error_figure({name: band_errors(guess, target) for name, guess in guesses.items()}),
        }
