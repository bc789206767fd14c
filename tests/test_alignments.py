"""Phones at the middles of frames, labels of utterances, and tables that cannot be used."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pretrain.data.alignments import (
    UNLABELLED,
    AlignmentError,
    first_centre_samples,
    frame_centres,
    match_utterance,
    read_phones,
    read_utterance_labels,
)

HEADER = "utt\tstart_s\tend_s\tphone\n"


def test_frames_take_the_phone_at_their_middle(tmp_path: Path) -> None:
    path = tmp_path / "phones.tsv"
    path.write_text(HEADER + "u\t0.00\t0.02\tSIL\nu\t0.02\t0.10\ta\nu\t0.12\t0.20\tb\n")
    phones = read_phones(str(path))
    # 20 ms hop, 25 ms window: middles at 12.5, 32.5, ... ms; 0.10 to 0.12 s is covered by nothing.
    centres = frame_centres(11, 320, 200)
    assert centres[:2].tolist() == [200, 520]
    names = [None if i == UNLABELLED else phones.names[i] for i in phones.utterances["u"].at(centres)]
    assert names == ["SIL", "a", "a", "a", "a", None, "b", "b", "b", "b", None]
    # The border belongs to the phone that begins there: middle of the frame of 10 ms at 0.015 s + 0.005 s.
    assert phones.utterances["u"].at(np.array([319, 320])).tolist() == [phones.names.index("SIL"), 1]


@pytest.mark.parametrize(("rate", "frames"), [(160, 20), (16000, 1)])
def test_frames_of_other_rates_are_labelled_by_their_own_middle(tmp_path: Path, rate: int, frames: int) -> None:
    path = tmp_path / "phones.tsv"
    path.write_text(HEADER + "u\t0\t0.105\ta\nu\t0.105\t1\tb\n")
    phones = read_phones(str(path))
    labels = phones.utterances["u"].at(frame_centres(frames, rate, rate // 2))
    assert labels.tolist() == [0 if (i + 0.5) * rate / 16000 < 0.105 else 1 for i in range(frames)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + "u\t0\t0.5\ta\nu\t0.4\t1\tb\n", "overlap"),
        (HEADER + "u\t0\tlong\ta\n", "line 2"),
        (HEADER + "u\t0\t1\ta\nu\t1\tinf\tb\n", "line 3: start_s '1' and end_s 'inf' must be seconds"),
        (HEADER + "u\tnan\t1\ta\n", "line 2"),
        ("u\t0\t1\ta\n", "line 1"),
    ],
)
def test_bad_alignments_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "phones.tsv"
    path.write_text(text)
    with pytest.raises(AlignmentError, match=message):
        read_phones(str(path))
    with pytest.raises(AlignmentError, match=r"absent\.tsv: cannot be read \(No such file"):
        read_phones(str(tmp_path / "absent.tsv"))


def test_phones_that_are_ignored_are_no_labels(tmp_path: Path) -> None:
    """The same frames for units of 10 ms (first middle at 12.5 ms) and of 20 ms."""
    path = tmp_path / "phones.tsv"
    path.write_text(HEADER + "u\t0.0\t0.0325\ta\nu\t0.0325\t0.06\tUNK\n")
    phones = read_phones(str(path))
    assert phones.at("u", frame_centres(6, 160, 200), frozenset()).tolist() == [1, 1, 0, 0, 0, UNLABELLED]
    assert phones.at("u", frame_centres(3, 320, 200), phones.ids("UNK", "absent")).tolist() == [1, -1, -1]


def test_the_middle_of_the_first_frame_is_where_the_encoder_says() -> None:
    field = SimpleNamespace(receptive_field_samples=400)
    centred = SimpleNamespace(receptive_field_samples=400, first_centre_samples=0)
    assert [first_centre_samples(encoder, 160) for encoder in (SimpleNamespace(), field, centred)] == [80, 200, 0]


def test_utterance_labels_and_matching(tmp_path: Path) -> None:
    path = tmp_path / "utterances.tsv"
    path.write_text("utt\tspeaker\na/u1\tx\nu2\ty\n")
    labels = read_utterance_labels(str(path), "speaker")
    assert [match_utterance(name, labels) for name in ("a/u1", "deep/down/u2", "u1")] == ["a/u1", "u2", None]
    with pytest.raises(AlignmentError, match=r"line 1: has no column language; .*: utt, language"):
        read_utterance_labels(str(path), "language")
