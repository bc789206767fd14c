"""Which frames of an utterance are hidden: spans that start anywhere, or blocks side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pretrain.config import ConfigError


@dataclass
class MaskConfig:
    """`prob` counts spans per frame, `length` is their length in frames; `kind` names one of the subclasses."""

    VARIANTS: ClassVar[dict[str, type[MaskConfig]]] = {}

    kind: str
    prob: float
    length: int

    def __post_init__(self) -> None:
        if not 0 < self.prob < 1 or self.length < 1:
            raise ConfigError(
                f"method.mask: needs a prob of more than 0 and less than 1 (is {self.prob}) and a length of at least 1 "
                f"(is {self.length}); correct the recipe"
            )

    @property
    def share(self) -> float:
        """Share of a long utterance that is hidden, on average."""
        raise NotImplementedError

    def draw(self, rng: np.random.Generator, frames: int) -> np.ndarray:
        """The hidden frames of one utterance, (frames,) bool."""
        raise NotImplementedError


@dataclass
class SpansConfig(MaskConfig):
    """Every frame starts a span with probability `prob`, by itself, so that spans overlap (arXiv 2202.01855).

    Frame t is hidden with probability 1 - (1 - prob) ** min(t + 1, length).
    """

    @property
    def share(self) -> float:
        return 1 - (1 - self.prob) ** self.length

    def draw(self, rng: np.random.Generator, frames: int) -> np.ndarray:
        mask = np.zeros(frames, dtype=bool)
        for start in np.flatnonzero(rng.random(frames) < self.prob):
            mask[start : start + self.length] = True
        return mask


@dataclass
class BlocksConfig(MaskConfig):
    """`prob * frames` blocks, rounded up or down at random, of those that begin at multiples of `length`.

    So a share of prob * length is hidden; a share of 1 or more would hide everything. Source: `compute_mask` of
    speechbrain's `speechbrain/lobes/models/BESTRQ.py`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prob * self.length >= 1:
            raise ConfigError(
                f"method.mask: prob {self.prob} times length {self.length} would hide every frame; lower one of them"
            )

    @property
    def share(self) -> float:
        return self.prob * self.length

    def draw(self, rng: np.random.Generator, frames: int) -> np.ndarray:
        mask = np.zeros(frames, dtype=bool)
        blocks = frames // self.length
        count = min(blocks, int(self.prob * frames + rng.random()))
        for block in rng.choice(blocks, size=count, replace=False) if count else ():
            mask[block * self.length : (block + 1) * self.length] = True
        return mask


MaskConfig.VARIANTS.update(spans=SpansConfig, blocks=BlocksConfig)


def hidden_frames(rng: np.random.Generator, config: MaskConfig, frames: int, frames_per_position: int) -> np.ndarray:
    """(frames,) bool; where no position is hidden whole, one more span is hidden, so that there is something to learn.

    `frames` is a multiple of `frames_per_position`. That span begins with a position, hides the whole of it, and leaves
    another one where there is one.
    """
    mask = config.draw(rng, frames)
    if not whole(mask, frames_per_position).any():
        length = max(frames_per_position, min(config.length, frames - frames_per_position))
        start = rng.integers((frames - length) // frames_per_position + 1) * frames_per_position
        mask[start : start + length] = True
    return mask


def whole(mask: np.ndarray, frames_per_position: int) -> np.ndarray:
    """(P,) bool: positions of which `mask` (P * frames_per_position,) hides every frame."""
    return np.asarray(mask.reshape(-1, frames_per_position).all(axis=1))
