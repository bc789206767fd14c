"""Purities and mutual information against joints worked out by hand, scikit-learn, and the time rule of alignments."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from pretrain.data.alignments import UNKNOWN, AlignmentError, frame_centres, read_phones
from pretrain.labelling.kmeans.quality import QualityCounter, unit_quality

HEADER = "utt\tstart_s\tend_s\tphone\n"


def write_alignments(path: Path, rows: list[tuple[str, float, float, str]]) -> Path:
    path.write_text(HEADER + "".join(f"{u}\t{start}\t{end}\t{phone}\n" for u, start, end, phone in rows))
    return path


def test_a_joint_worked_out_by_hand() -> None:
    """Phones (a, b) by units (0, 1): p = [[.4, .1], [.1, .4]]."""
    quality = unit_quality(np.array([[4, 1], [1, 4]]))
    information = 0.8 * math.log(0.4 / 0.25) + 0.2 * math.log(0.1 / 0.25)
    assert quality.frames == 10
    assert quality.phone_purity == pytest.approx(0.8)
    assert quality.cluster_purity == pytest.approx(0.8)
    assert quality.phone_entropy == pytest.approx(math.log(2), abs=1e-6)
    assert quality.mutual_information == pytest.approx(information, abs=1e-6)
    assert quality.pnmi == pytest.approx(information / math.log(2), abs=1e-6)


def test_purities_differ_where_units_are_finer_than_phones() -> None:
    """Two phones, each split evenly over two units of its own."""
    quality = unit_quality(np.array([[5, 5, 0, 0], [0, 0, 5, 5]]))
    assert quality.phone_purity == pytest.approx(1.0)
    assert quality.cluster_purity == pytest.approx(0.5)
    assert quality.pnmi == pytest.approx(1.0, abs=1e-6)
    assert quality.unit_entropy == pytest.approx(math.log(4), abs=1e-6)


def test_independent_units_tell_nothing() -> None:
    assert unit_quality(np.array([[1, 2, 3], [2, 4, 6]])).pnmi == pytest.approx(0, abs=1e-6)


def test_mutual_information_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    phones = rng.integers(0, 30, 5000)
    units = (phones * 3 + rng.integers(0, 40, 5000)) % 100
    joint = np.zeros((30, 100), dtype=int)
    np.add.at(joint, (phones, units), 1)
    quality = unit_quality(joint)
    assert quality.mutual_information == pytest.approx(mutual_info_score(phones, units), abs=1e-5)
    assert quality.phone_entropy == pytest.approx(mutual_info_score(phones, phones), abs=1e-5)


def test_no_common_frame_is_an_error() -> None:
    with pytest.raises(AlignmentError, match="alignments: no frame"):
        unit_quality(np.zeros((2, 3), dtype=int))


def test_gaps_and_unknown_phones_are_left_out(tmp_path: Path) -> None:
    rows = [("u", 0.0, 0.02, "a"), ("u", 0.05, 0.07, "UNK"), ("u", 0.07, 0.1, "SIL")]
    phones = read_phones(str(write_alignments(tmp_path / "p.tsv", rows)))
    inventory = phones.names
    counter = QualityCounter(inventory, num_units=4)
    labels = phones.at("u", frame_centres(9, 160, 200), phones.ids(UNKNOWN))
    counter.add(labels, np.array([0, 0, 0, 0, 1, 1, 2, 2, 2]))
    assert counter.joint.sum() == 4
    assert counter.joint[inventory.index("a")].tolist() == [1, 0, 0, 0]
    assert counter.joint[inventory.index("SIL")].tolist() == [0, 0, 3, 0]
    report = counter.report()
    assert report["utterances"] == 1
    assert report["run_length_frames"] == pytest.approx(9 / 3)
    assert report["all_frames"]["frames"] == 4
    assert report["speech_frames"]["frames"] == 1


def test_ranks_counts_add_up(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(f"u{i}", t / 10, (t + 1) / 10, str(rng.integers(5))) for i in range(6) for t in range(10)]
    phones = read_phones(str(write_alignments(tmp_path / "p.tsv", rows)))
    units = {f"u{i}": rng.integers(0, 7, 98) for i in range(6)}
    together, first, second = (QualityCounter(phones.names, 7) for _ in range(3))
    for i, (utterance, sequence) in enumerate(units.items()):
        labels = phones.at(utterance, frame_centres(98, 160, 200), frozenset())
        together.add(labels, sequence)
        (first if i < 3 else second).add(labels, sequence)
    first.merge(second)
    assert first.report() == together.report()
