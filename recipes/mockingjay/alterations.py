"""What masked reconstruction does to features: drawn on the host from an example's generator, applied on the device.

Source: s3prl `pretrain/mockingjay/task.py` (Mockingjay, arXiv 1910.12638; TERA, arXiv 2007.06028).
Letters: B rows, F frames, D bands, N scored frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.errors import UserError
from pretrain.objectives.masking import last_visible


@dataclass
class AlterationConfig:
    """Policies along time, frequency and magnitude; the names are s3prl's, a proportion of 0 switches one off.

    Time: spans of `mask_consecutive_min` to `mask_consecutive_max` frames over `mask_proportion` of an utterance. With
    `zero_share` probability the spans of an utterance become zero, with `replace_share` they take frames from
    elsewhere in it, else they stay; they are scored in each case. Without `mask_allow_overlap`, spans start on a grid
    of `mask_bucket_ratio` span lengths. Frequency: one block of up to `mask_frequency` of the bands becomes zero.
    Magnitude: with probability `noise_proportion` an utterance gets Gaussian noise of `noise_std` on every element.
    """

    mask_proportion: float
    mask_consecutive_min: int
    mask_consecutive_max: int
    mask_allow_overlap: bool
    mask_bucket_ratio: float
    zero_share: float
    replace_share: float
    mask_frequency: float
    noise_proportion: float
    noise_std: float

    def __post_init__(self) -> None:
        for name in ("mask_proportion", "mask_frequency", "noise_proportion", "zero_share", "replace_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"alteration.{name}: {getattr(self, name)} is no share; give a number from 0 to 1")
        if self.zero_share + self.replace_share > 1:
            raise UserError("alteration: zero_share and replace_share exceed 1 together; lower one of them")
        if not 1 <= self.mask_consecutive_min <= self.mask_consecutive_max:
            raise UserError("alteration: need 1 <= mask_consecutive_min <= mask_consecutive_max; correct the recipe")
        if not self.mask_proportion and not self.mask_frequency and not self.noise_proportion:
            raise UserError("alteration: every proportion is 0, so nothing is learnt; switch one policy on")


@dataclass(frozen=True)
class Alteration:
    """What happens to one row of F frames, `valid` of them real.

    `mask` (F,) marks the frames scored in every band, `zeroed` (F,) those that become zero, `source` (F,) says which
    frame each is taken from, `band` is the first band that becomes zero and the one after the last, `noisy` asks for
    noise.
    """

    mask: np.ndarray
    zeroed: np.ndarray
    source: np.ndarray
    band: tuple[int, int]
    noisy: bool
    valid: int

    @property
    def scored(self) -> np.ndarray:
        """(F,) frames with at least one scored element."""
        real = np.arange(len(self.mask)) < self.valid
        return self.mask | real if self.band[1] > self.band[0] else self.mask

    def scored_elements(self, dim: int) -> int:
        """Elements of `dim` bands that the loss sums over."""
        whole = int(self.mask.sum())
        return whole * dim + (int(self.scored.sum()) - whole) * (self.band[1] - self.band[0])


def draw_alteration(
    rng: np.random.Generator, valid: int, frames: int, dim: int, config: AlterationConfig
) -> Alteration:
    """Draw afresh what happens to a row of `frames` frames and `dim` bands of which `valid` frames are real.

    Magnitude alone scores every real frame, as s3prl does. A row too short for a span has none.
    """
    mask, zeroed, source = np.zeros(frames, dtype=bool), np.zeros(frames, dtype=bool), np.arange(frames)
    if config.mask_proportion > 0:
        chosen, elsewhere = _time_spans(rng, valid, config)
        mask[chosen] = True
        die = rng.random()
        if die < config.zero_share:
            zeroed[chosen] = True
        elif die < config.zero_share + config.replace_share:
            source[chosen] = elsewhere
    band = (0, 0)
    if config.mask_frequency > 0:
        width = int(rng.integers(int(dim * config.mask_frequency) + 1))
        first = int(rng.integers(dim - width)) if width < dim else 0
        band = (first, first + width)
    if not config.mask_proportion and not config.mask_frequency:
        mask[:valid] = True
    noisy = bool(rng.random() < config.noise_proportion)
    return Alteration(mask, zeroed, source, band, noisy, valid)


def _time_spans(rng: np.random.Generator, valid: int, config: AlterationConfig) -> tuple[np.ndarray, np.ndarray]:
    """Indices of all frames of the chosen spans, span by span, and as many from spans drawn to replace them."""
    length = min(int(rng.integers(config.mask_consecutive_min, config.mask_consecutive_max + 1)), valid)
    last_start = max(valid - length - 1, 0)
    spans = round(valid * config.mask_proportion / length)  # to even, as in s3prl
    starts = np.arange(last_start + 1)
    if not config.mask_allow_overlap:
        first = int(rng.integers(min(length, last_start) + 1))
        starts = np.arange(first, last_start + 1, round(length * config.mask_bucket_ratio))
    chosen = rng.permutation(starts)[:spans]
    elsewhere = rng.permutation(last_start + 1)[: len(chosen)]
    within = np.arange(length)
    return (chosen[:, None] + within).ravel(), (elsewhere[:, None] + within).ravel()


def stack_alterations(rows: list[Alteration]) -> dict[str, Tensor]:
    """A batch's alterations as tensors for `Batch.extras`; frames are named by flat positions b * F + f.

    `mask`, `zeroed` (B, F) bool, `source` (B, F), `band` (B, 2), `noisy` (B,) bool; `scored_positions` (N,) frames
    with a scored element and `copied_positions` (N,) the last visible frame for each of them.
    """
    frames = len(rows[0].mask)
    offsets = np.arange(len(rows))[:, None] * frames
    scored = np.flatnonzero(np.stack([row.scored for row in rows]))
    copied = np.stack([last_visible(row.mask) for row in rows]) + offsets
    arrays = {
        "mask": np.stack([row.mask for row in rows]),
        "zeroed": np.stack([row.zeroed for row in rows]),
        "source": np.stack([row.source for row in rows]) + offsets,
        "band": np.array([row.band for row in rows]),
        "noisy": np.array([row.noisy for row in rows]),
        "scored_positions": scored,
        "copied_positions": copied.ravel()[scored],
    }
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def alter(features: Tensor, extras: dict[str, Tensor], config: AlterationConfig) -> Tensor:
    """(B, F, D) features as the network sees them; noise comes from torch's generator."""
    taken = features.flatten(0, 1).index_select(0, extras["source"].flatten()).view_as(features)
    altered = torch.where(extras["zeroed"].unsqueeze(2), 0.0, taken)
    if config.mask_frequency > 0:
        altered = torch.where(band_mask(extras["band"], features.shape[2]).unsqueeze(1), 0.0, altered)
    if config.noise_proportion > 0:
        noise = torch.randn_like(altered) * config.noise_std
        altered = altered + noise * extras["noisy"].view(-1, 1, 1)
    return altered


def scored_elements(extras: dict[str, Tensor], dim: int) -> Tensor:
    """(N, D) bool: which elements of the frames at `scored_positions` are scored."""
    positions = extras["scored_positions"]
    whole = extras["mask"].flatten().index_select(0, positions).unsqueeze(1)
    rows = positions // extras["mask"].shape[1]
    return whole | band_mask(extras["band"], dim).index_select(0, rows)


def band_mask(band: Tensor, dim: int) -> Tensor:
    """(B, 2) first band and the one after the last to (B, D) bool."""
    index = torch.arange(dim, device=band.device)
    return (index >= band[:, :1]) & (index < band[:, 1:])
