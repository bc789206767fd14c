"""The embedded sample: its size, its tables against its files, and its phone alignments against the sound."""

# ruff: noqa: RUF001 (phonetic symbols look like other letters)
from __future__ import annotations

import csv
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pretrain.data.folders import SAMPLE_DIR

MAX_BYTES = 8_000_000
VOWELS = set("aeiouyøœɑæəɐʌɪʊɛɔɚ")
FRICATIVES = set("sʃzçf")


def read_table(name: str) -> list[dict[str, str]]:
    with (SAMPLE_DIR / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.fixture(scope="module")
def utterances() -> list[dict[str, str]]:
    return read_table("utterances.tsv")


@pytest.fixture(scope="module")
def alignments() -> dict[str, list[tuple[float, float, str]]]:
    phones = defaultdict(list)
    for row in read_table("phones.tsv"):
        phones[row["utt"]].append((float(row["start_s"]), float(row["end_s"]), row["phone"]))
    return phones


@pytest.fixture(scope="module")
def waveforms(utterances: list[dict[str, str]]) -> dict[str, np.ndarray]:
    return {row["utt"]: soundfile.read(SAMPLE_DIR / row["path"], dtype="float32")[0] for row in utterances}


def test_the_promised_size(utterances: list[dict[str, str]]) -> None:
    seconds = np.array([int(row["samples"]) / 16000 for row in utterances])
    assert seconds.sum() >= 600
    assert seconds.min() >= 0.7
    assert seconds.max() <= 20.0
    assert np.quantile(seconds, 0.25) < 1.5  # a spread: words as well as passages
    assert np.quantile(seconds, 0.95) > 10.0
    assert len({row["voice"] for row in utterances}) >= 8
    assert len({row["language"] for row in utterances}) >= 2
    assert sum(path.stat().st_size for path in SAMPLE_DIR.rglob("*") if path.is_file()) <= MAX_BYTES


@pytest.mark.parametrize("split", ["train", "valid"])
def test_manifests_agree_with_the_files(split: str, utterances: list[dict[str, str]]) -> None:
    root, *lines = (SAMPLE_DIR / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
    assert not Path(root).is_absolute()
    rows = dict(line.split("\t") for line in lines)
    assert rows == {row["path"]: row["samples"] for row in utterances if row["split"] == split}
    for path, samples in rows.items():
        info = soundfile.info(SAMPLE_DIR / root / path)
        assert (info.frames, info.samplerate, info.channels) == (int(samples), 16000, 1), path


def test_every_voice_and_language_is_in_both_splits_but_no_text_is(utterances: list[dict[str, str]]) -> None:
    for field in ("voice", "language"):
        train, valid = ({row[field] for row in utterances if row["split"] == split} for split in ("train", "valid"))
        assert train == valid
    train, valid = ({row["text"] for row in utterances if row["split"] == split} for split in ("train", "valid"))
    assert not train & valid
    assert 0.05 <= sum(row["split"] == "valid" for row in utterances) / len(utterances) <= 0.15


def test_nothing_is_left_over_or_listed_twice(utterances: list[dict[str, str]]) -> None:
    listed = [row["path"] for row in utterances]
    files = [path.relative_to(SAMPLE_DIR).as_posix() for path in (SAMPLE_DIR / "audio").iterdir()]
    assert sorted(listed) == sorted(files)


def test_sound_is_finite_unclipped_and_never_digital_silence(waveforms: dict[str, np.ndarray]) -> None:
    for utterance, waveform in waveforms.items():
        assert np.isfinite(waveform).all(), utterance
        assert 0.05 < np.abs(waveform).max() < 1.0, utterance
        frames = waveform[: len(waveform) // 400 * 400].reshape(-1, 400)
        assert frames.std(axis=1).min() > 1e-5, utterance


def test_alignments_are_gapless_to_the_end(
    alignments: dict[str, list[tuple[float, float, str]]], utterances: list[dict[str, str]]
) -> None:
    assert list(alignments) == [row["utt"] for row in utterances]
    for row in utterances:
        phones = alignments[row["utt"]]
        assert phones[0][0] == 0.0
        assert phones[-1][1] == pytest.approx(int(row["samples"]) / 16000, abs=1e-3)
        assert all(start < end for start, end, _ in phones)
        assert all(before[1] == after[0] for before, after in pairwise(phones))
        assert not any(before[2] == after[2] == "SIL" for before, after in pairwise(phones))


def test_phone_set_and_share_of_silence(alignments: dict[str, list[tuple[float, float, str]]]) -> None:
    seconds = defaultdict(float)
    for phones in alignments.values():
        for start, end, phone in phones:
            seconds[phone] += end - start
    assert 0.05 < seconds["SIL"] / sum(seconds.values()) < 0.4
    assert 30 <= len(seconds) <= 80
    assert not any(mark in phone for phone in seconds for mark in ":ˈˌ_ ")


def frame_statistics(
    waveform: np.ndarray, phones: list[tuple[float, float, str]], shift_seconds: float = 0.0
) -> list[tuple[str, float, float]]:
    """(phone, log10 energy, zero crossings per sample) of 10 ms frames under labels shifted by shift_seconds."""
    frames = waveform[: len(waveform) // 160 * 160].reshape(-1, 160)
    energy = np.log10((frames**2).mean(axis=1))
    crossings = (np.diff(np.signbit(frames), axis=1) != 0).mean(axis=1)
    centres = (np.arange(len(frames)) + 0.5) * 0.01 - shift_seconds
    rows = np.searchsorted([end for _, end, _ in phones[:-1]], centres, side="right")
    return [(phones[row][2], energy[i], crossings[i]) for i, row in enumerate(rows)]


def speech_detection(
    waveforms: dict[str, np.ndarray], alignments: dict[str, list[tuple[float, float, str]]], shift_seconds: float
) -> float:
    """Mean share of SIL frames below and of vowel frames above -45 dB."""
    frames = [f for utt, wave in waveforms.items() for f in frame_statistics(wave, alignments[utt], shift_seconds)]
    quiet = [energy < -4.5 for phone, energy, _ in frames if phone == "SIL"]
    loud = [energy >= -4.5 for phone, energy, _ in frames if phone in VOWELS]
    return (np.mean(quiet) + np.mean(loud)) / 2


def test_labels_fit_the_sound(
    waveforms: dict[str, np.ndarray], alignments: dict[str, list[tuple[float, float, str]]]
) -> None:
    energy, crossings = defaultdict(list), defaultdict(list)
    for utterance, waveform in waveforms.items():
        for phone, frame_energy, frame_crossings in frame_statistics(waveform, alignments[utterance]):
            kind = "vowel" if phone in VOWELS else "fricative" if phone in FRICATIVES else phone
            energy[kind].append(frame_energy)
            crossings[kind].append(frame_crossings)
    assert np.mean(energy["SIL"]) + 2.0 < np.mean(energy["vowel"])  # 20 dB
    assert np.mean(crossings["fricative"]) > 2 * np.mean(crossings["vowel"])
    aligned = speech_detection(waveforms, alignments, 0.0)
    assert aligned > 0.93
    for shift_seconds in (-0.04, 0.04):  # labels 40 ms early or late fit worse
        assert speech_detection(waveforms, alignments, shift_seconds) < aligned - 0.01
