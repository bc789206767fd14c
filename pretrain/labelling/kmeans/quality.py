"""How well units agree with phones: purities, mutual information, run length, from a joint count of frames.

Source of the formulas: facebookresearch/fairseq examples/hubert/measure_teacher_quality.py; HuBERT, arXiv 2106.07447,
section IV-E. Entropies are in nats.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.errors import UserError
from pretrain.tables import Table

SAMPLE_RATE = 16000
WINDOW_SAMPLES = 400
UNKNOWN = "UNK"
SILENCES = frozenset({"SIL", "sil", "sp", "pau"})
HEADER = ("utt", "start_s", "end_s", "phone")
LOG_FLOOR = 1e-8  # fairseq adds it inside its logarithms


class AlignmentError(UserError):
    """A phone alignment that cannot be read: "<file>: <line>: <what is wrong>; <what to do>"."""


@dataclass(frozen=True)
class Alignments:
    """Phone intervals per utterance: `starts` and `ends` in seconds, `phones` as indices into `inventory`."""

    inventory: list[str]
    starts: dict[str, np.ndarray]
    ends: dict[str, np.ndarray]
    phones: dict[str, np.ndarray]

    @classmethod
    def read(cls, path: Path) -> Alignments:
        """Read a tab-separated table with the columns utt, start_s, end_s, phone. Raises AlignmentError."""
        table = Table(path, HEADER, AlignmentError)
        rows: dict[str, list[tuple[float, float, str]]] = {}
        for number, (utterance, start, end, phone) in table:
            try:
                interval = float(start), float(end), phone
            except ValueError:
                raise table.error(
                    number, f"start_s '{start}' and end_s '{end}' must be seconds", "correct the line"
                ) from None
            rows.setdefault(utterance, []).append(interval)
        inventory = sorted({phone for intervals in rows.values() for *_, phone in intervals})
        index = {phone: i for i, phone in enumerate(inventory)}
        ordered = {utterance: sorted(intervals) for utterance, intervals in rows.items()}
        return cls(
            inventory,
            {u: np.array([start for start, _, _ in r]) for u, r in ordered.items()},
            {u: np.array([end for _, end, _ in r]) for u, r in ordered.items()},
            {u: np.array([index[phone] for *_, phone in r]) for u, r in ordered.items()},
        )

    def find(self, utterance: str) -> str | None:
        """The name under which `utterance` (a relative path without suffix) is listed: in full, or its last part."""
        for name in (utterance, utterance.rsplit("/", 1)[-1]):
            if name in self.starts:
                return name
        return None

    def frame_phones(self, utterance: str, frames: int, rate_hz: int) -> np.ndarray:
        """(frames,) int64 phone indices, -1 where no phone (or UNK) covers the frame's centre.

        Frame t at `rate_hz` frames a second is a window of 25 ms from t / rate_hz on: its centre is 12.5 ms later.
        """
        name = self.find(utterance)
        if name is None or frames == 0:
            return np.full(frames, -1, dtype=np.int64)
        centres = np.arange(frames) / rate_hz + WINDOW_SAMPLES / 2 / SAMPLE_RATE
        interval = np.searchsorted(self.starts[name], centres, side="right") - 1
        covered = (interval >= 0) & (centres < self.ends[name][interval])
        phones = np.where(covered, self.phones[name][interval], -1)
        if UNKNOWN in self.inventory:
            phones[phones == self.inventory.index(UNKNOWN)] = -1
        return phones


@dataclass(frozen=True)
class UnitQuality:
    """`phone_purity` = sum over units of max over phones of p(phone, unit); `cluster_purity` the other way round;
    `pnmi` = mutual information / phone entropy. Entropies in nats.
    """

    frames: int
    phone_purity: float
    cluster_purity: float
    pnmi: float
    phone_entropy: float
    unit_entropy: float
    mutual_information: float


def unit_quality(joint: np.ndarray) -> UnitQuality:
    """Quality of units from the (phones, units) count of frames. Raises AlignmentError where nothing was counted."""
    total = int(joint.sum())
    if total == 0:
        raise AlignmentError("alignments: no frame has both a unit and a phone; name these utterances in the table")
    p = joint / total
    p_phone, p_unit = p.sum(axis=1), p.sum(axis=0)
    independent = np.outer(p_phone, p_unit)
    ratio = np.divide(p, independent, out=np.zeros_like(p), where=independent > 0)
    information = float((p * np.log(ratio + LOG_FLOOR)).sum())
    phone_entropy = _entropy(p_phone)
    return UnitQuality(
        frames=total,
        phone_purity=float(p.max(axis=0).sum()),
        cluster_purity=float(p.max(axis=1).sum()),
        pnmi=information / phone_entropy if phone_entropy > LOG_FLOOR else 0.0,
        phone_entropy=phone_entropy,
        unit_entropy=_entropy(p_unit),
        mutual_information=information,
    )


def _entropy(p: np.ndarray) -> float:
    return float(-(p * np.log(p + LOG_FLOOR)).sum())


class QualityCounter:
    """Accumulates, utterance by utterance, what `unit_quality` and the run length need."""

    def __init__(self, inventory: list[str], num_units: int) -> None:
        self.inventory = inventory
        self.joint = np.zeros((len(inventory), num_units), dtype=np.int64)
        self.utterances = 0
        self.frames = 0
        self.runs = 0

    def add(self, phones: np.ndarray, units: np.ndarray) -> None:
        """Count one utterance: (F,) phone indices (-1: not scored) and (F,) units."""
        if len(units) == 0:
            return
        known = phones >= 0
        np.add.at(self.joint, (phones[known], units[known]), 1)
        self.utterances += 1
        self.frames += len(units)
        self.runs += 1 + int(np.count_nonzero(units[1:] != units[:-1]))

    def merge(self, other: QualityCounter) -> None:
        """Add the counts of another rank."""
        self.joint += other.joint
        self.utterances += other.utterances
        self.frames += other.frames
        self.runs += other.runs

    def report(self) -> dict[str, Any]:
        """Quality over all frames and over speech frames (phones that are not silence), and mean run length."""
        speech = [i for i, phone in enumerate(self.inventory) if phone not in SILENCES]
        report: dict[str, Any] = {"utterances": self.utterances}
        for name, joint in (("all_frames", self.joint), ("speech_frames", self.joint[speech])):
            if joint.sum():
                report[name] = asdict(unit_quality(joint))
        if self.runs:
            report["run_length_frames"] = self.frames / self.runs
        return report
