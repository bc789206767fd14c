"""Purities and mutual information against joints worked out by hand, scikit-learn, and the time rule of alignments."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from pretrain.labelling.kmeans.quality import AlignmentError, Alignments, QualityCounter, unit_quality

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


def test_a_frame_takes_the_phone_that_covers_its_centre(tmp_path: Path) -> None:
    """The centre of frame t lies at t / rate + 12.5 ms."""
    path = write_alignments(tmp_path / "p.tsv", [("u", 0.0, 0.0325, "a"), ("u", 0.0325, 0.06, "b")])
    alignments = Alignments.read(path)
    named = [alignments.inventory[i] if i >= 0 else None for i in alignments.frame_phones("u", 6, 100)]
    assert named == ["a", "a", "b", "b", "b", None]
    named = [alignments.inventory[i] if i >= 0 else None for i in alignments.frame_phones("u", 3, 50)]
    assert named == ["a", "b", "b"]


def test_gaps_unknown_phones_and_unaligned_utterances_are_left_out(tmp_path: Path) -> None:
    rows = [("u", 0.0, 0.02, "a"), ("u", 0.05, 0.07, "UNK"), ("u", 0.07, 0.1, "SIL")]
    alignments = Alignments.read(write_alignments(tmp_path / "p.tsv", rows))
    inventory = alignments.inventory
    assert alignments.find("elsewhere") is None
    assert alignments.frame_phones("elsewhere", 3, 100).tolist() == [-1, -1, -1]
    counter = QualityCounter(inventory, num_units=4)
    counter.add(alignments.frame_phones("folder/u", 9, 100), np.array([0, 0, 0, 0, 1, 1, 2, 2, 2]))
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
    alignments = Alignments.read(write_alignments(tmp_path / "p.tsv", rows))
    units = {f"u{i}": rng.integers(0, 7, 98) for i in range(6)}
    together, first, second = (QualityCounter(alignments.inventory, 7) for _ in range(3))
    for i, (utterance, sequence) in enumerate(units.items()):
        phones = alignments.frame_phones(utterance, 98, 100)
        together.add(phones, sequence)
        (first if i < 3 else second).add(phones, sequence)
    first.merge(second)
    assert first.report() == together.report()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("utt\tstart\tend\tphone\n", "line 1: has no column start_s; did you mean start"),
        (HEADER + "u\t0.0\ta\n", "line 2"),
        (HEADER + "u\tx\t1\ta\n", "line 2"),
    ],
)
def test_bad_tables_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.tsv").write_text(text)
    with pytest.raises(AlignmentError, match=message):
        Alignments.read(tmp_path / "p.tsv")
