"""How well units agree with phones: purities, mutual information, run length, from a joint count of frames.

Source of the formulas: facebookresearch/fairseq examples/hubert/measure_teacher_quality.py; HuBERT, arXiv 2106.07447,
section IV-E. Entropies are in nats.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pretrain.data.alignments import SILENCES, AlignmentError

LOG_FLOOR = 1e-8  # fairseq adds it inside its logarithms


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
