"""Frozen features of a data split with their labels, one utterance at a time, as float16 arrays in memory.

One utterance at a time and without padding, so that no feature depends on what else would be in its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from pretrain.data.alignments import UNLABELLED, Phones, first_centre_samples, frame_centres, match_utterance
from pretrain.data.audio import SAMPLE_RATE, read_audio
from pretrain.data.manifest import Manifest
from pretrain.errors import UserError
from pretrain.features.mel import INT16_SCALE, WINDOW_SAMPLES, log_mel, stack_context
from pretrain.features.mfcc import mfcc39
from pretrain.upstream import MIN_SAMPLES, Upstream

HOP_SAMPLES = 320
BASELINES = ("MFCC-39", "log-mel 80", "log-mel 80, ±5 frames")


@dataclass(frozen=True)
class Source:
    """Layers to probe. `strides` and `first_centres`, the middle of the first frame, are samples, one entry per layer;
    `extract` maps a waveform (T,) float32 to one (F_l, D_l) tensor per layer.
    """

    names: list[str]
    strides: list[int]
    first_centres: list[int]
    extract: Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Layer:
    """One layer of one split: `features` (N, D) float16, `labels` (N,) int64, `groups` (N,) manifest rows."""

    features: np.ndarray
    labels: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True)
class Split:
    """Manifest rows that have labels; `keys` are their names in the label file, `without_label` how many have none."""

    manifest: Manifest
    rows: list[int]
    keys: list[str]
    without_label: int

    @property
    def hours(self) -> float:
        return float(self.manifest.lengths[self.rows].sum()) / SAMPLE_RATE / 3600

    def waveforms(self, description: str) -> Iterator[tuple[int, str, Tensor]]:
        """(row, key, waveform (T,)) of every utterance, with a progress bar on a terminal."""
        for row, key in zip(tqdm(self.rows, description, disable=None, leave=False), self.keys, strict=True):
            yield row, key, torch.from_numpy(read_audio(self.manifest.path(row)))


class Task(Protocol):
    """Turns one utterance's layer into labelled rows."""

    def label(self, row: int, key: str, features: Tensor, centres: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """(F, D) features and the (F,) middle samples of their frames to (N, D) rows and (N,) class ids."""


@dataclass(frozen=True)
class PhoneTask:
    """Each frame is labelled by the phone at its middle; frames of `ignored` phones and unlabelled ones go.

    `share` of the frames is kept, drawn from (seed, manifest row) alone: the same frames for every source of one rate.
    """

    phones: Phones
    ignored: frozenset[int]
    share: float
    seed: int

    def label(self, row: int, key: str, features: Tensor, centres: np.ndarray) -> tuple[Tensor, np.ndarray]:
        labels = self.phones.at(key, centres, self.ignored)
        keep = labels != UNLABELLED
        if self.share < 1:
            keep &= np.random.default_rng([self.seed, row]).random(len(keep)) < self.share
        return features[torch.from_numpy(keep)], labels[keep]


@dataclass(frozen=True)
class UtteranceTask:
    """One row per utterance: the mean over its frames."""

    labels: dict[str, int]

    def label(self, row: int, key: str, features: Tensor, centres: np.ndarray) -> tuple[Tensor, np.ndarray]:
        return features.mean(0, keepdim=True), np.array([self.labels[key]])


def open_split(path: Path, known: dict, max_hours: float = 0.0, seed: int = 0) -> Split:
    """The rows of manifest `path` whose utterances are keys of `known`; at most `max_hours` of them (0: all), drawn
    by `seed`.

    Raises UserError where no utterance has a label, or two rows would take the same one.
    """
    manifest = Manifest.read(path)
    matched = [(row, match_utterance(manifest.utterance_id(row), known)) for row in range(len(manifest))]
    found = [(row, key) for row, key in matched if key is not None]
    if not found:
        raise UserError(
            f"{path}: no utterance has a label; the column utt must hold the manifest's relative path without suffix, "
            f"or its last part (here: {manifest.utterance_id(0)}; labels: {next(iter(known), 'none')})"
        )
    if len({key for _, key in found}) < len(found):
        raise UserError(f"{path}: two files have one name; put relative paths without suffix in the column utt")
    if max_hours > 0:
        order = np.random.default_rng(seed).permutation(len(found))
        hours = np.cumsum([manifest.lengths[found[i][0]] for i in order]) / SAMPLE_RATE / 3600
        found = [found[i] for i in sorted(order[: max(1, int((hours <= max_hours).sum()))])]
    rows, keys = zip(*found, strict=True)
    return Split(manifest, list(rows), list(keys), sum(key is None for _, key in matched))


def baseline_features(waveform: Tensor) -> list[Tensor]:
    """MFCC, log-mel, and log-mel with five frames of 10 ms on each side; every second frame, so one per 20 ms."""
    mel = log_mel(waveform)
    features = [mfcc39(waveform, scale=INT16_SCALE), mel, stack_context(mel)]
    return [feature[::2] for feature in features]


def baseline_source(count: int) -> Source:
    """The first `count` of BASELINES: what a learned representation has to beat."""
    return Source(
        list(BASELINES[:count]),
        [HOP_SAMPLES] * count,
        [WINDOW_SAMPLES // 2] * count,
        lambda waveform: baseline_features(waveform)[:count],
    )


def upstream_source(upstream: Upstream, device: torch.device, layers: list[int]) -> Source:
    """Chosen hidden states of a frozen upstream.

    Taken from its encoder, because `Upstream.forward` repeats the last frame to reach s3prl's frame counts.
    """
    encoder = upstream.eval().to(device).encoder
    strides = [encoder.downsample_rates[layer] for layer in layers]
    first_centres = [first_centre_samples(encoder, stride) for stride in strides]

    @torch.inference_mode()
    def extract(waveform: Tensor) -> list[Tensor]:
        padded = pad(waveform, (0, max(0, MIN_SAMPLES - len(waveform))))
        states, frame_lengths = encoder(padded.unsqueeze(0).to(device), torch.tensor([len(padded)], device=device))
        return [states[layer][0, : int(frame_lengths[layer][0])].float().cpu() for layer in layers]

    return Source([f"layer {layer}" for layer in layers], strides, first_centres, extract)


def collect(source: Source, split: Split, task: Task, description: str) -> list[Layer]:
    """Extract and label a split. Returns one Layer per layer of `source`; memory: 2 bytes per feature value.

    Raises UserError where a layer holds values that are not finite in float16, or no row is labelled.
    """
    chunks: list[list[np.ndarray]] = [[] for _ in source.names]
    labels: list[list[np.ndarray]] = [[] for _ in source.names]
    groups: list[list[np.ndarray]] = [[] for _ in source.names]
    for row, key, waveform in split.waveforms(description):
        for i, features in enumerate(source.extract(waveform)):
            if len(features) == 0:
                continue
            centres = frame_centres(len(features), source.strides[i], source.first_centres[i])
            kept, ids = task.label(row, key, features, centres)
            values = kept.numpy().astype(np.float16)
            if not np.isfinite(values).all():
                raise UserError(f"layers: {source.names[i]}: {key}: values outside float16 or not finite; probe others")
            chunks[i].append(values)
            labels[i].append(ids)
            groups[i].append(np.full(len(ids), row))
    layers = []
    for i, name in enumerate(source.names):
        if not sum(map(len, labels[i])):
            raise UserError(f"alignments: {name}: no frame has a label; check the times in the table")
        layers.append(Layer(np.concatenate(chunks[i]), np.concatenate(labels[i]), np.concatenate(groups[i])))
        chunks[i] = []
    return layers
