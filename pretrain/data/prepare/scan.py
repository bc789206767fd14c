"""Turning a folder of audio into manifests: finding files, probing them, splitting, reporting."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pretrain.config import check_seed
from pretrain.data.audio import (
    AV_SUFFIXES,
    SAMPLE_RATE,
    SOUNDFILE_SUFFIXES,
    AudioError,
    AudioInfo,
    audio_info,
    verify_audio,
)
from pretrain.data.manifest import write_manifest
from pretrain.errors import UserError

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
PROBES_PER_TASK = 64
CHECKS = ("header", "full")
DEFAULT_VALID_PERCENT = 1.0


class ScanError(UserError):
    """A folder or option with which no manifest can be made: "<folder or option>: <what>; <what to do>"."""


@dataclass
class PrepareOptions:
    """Where the audio lies, what counts as usable, and how the validation split is made.

    `valid_dir` becomes valid.tsv whole; without it `valid_percent` (1 if not given) of the utterances do. Usable is
    `min_seconds` <= duration <= `max_seconds`; check=full decodes every file to its end.
    """

    audio_dir: Path
    output: Path
    valid_dir: Path | None = None
    valid_percent: float | None = None
    seed: int = 42
    check: str = "header"
    min_seconds: float = 0.1
    max_seconds: float | None = None
    workers: int = 8


def _check_options(options: PrepareOptions) -> None:
    if options.valid_dir is not None and options.valid_percent:
        raise ScanError("valid_percent: given together with valid_dir; give one of them")
    if options.check not in CHECKS:
        raise ScanError(f"check: '{options.check}' is unknown; take one of {', '.join(CHECKS)}")
    check_seed(options.seed)
    if options.workers < 1:
        raise ScanError(f"workers: {options.workers} is not positive; take 1 or more")
    if options.max_seconds is not None and options.max_seconds < options.min_seconds:
        raise ScanError(f"max_seconds: {options.max_seconds} is below min_seconds ({options.min_seconds}); raise it")


@dataclass(frozen=True, slots=True)
class Probe:
    """One file: its relative path, and either what it holds or why it is left out (category and whole reason)."""

    relative: str
    info: AudioInfo | None = None
    category: str = ""
    reason: str = ""


def find_audio(folder: Path) -> list[str]:
    """Relative paths of all files with an audio suffix, sorted; links are followed, each folder is visited once.

    Raises ScanError for a folder that is missing or without audio.
    """
    if not folder.is_dir():
        raise ScanError(f"{folder}: no such folder; give the folder that holds the audio")
    suffixes = SOUNDFILE_SUFFIXES + AV_SUFFIXES
    found: list[str] = []
    visited: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:  # a link back to a folder above would never end
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        # macOS leaves "._name.wav" beside each file, which is no audio.
        names = [name for name in files if name.lower().endswith(suffixes) and not name.startswith("._")]
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in names]
    if not found:
        raise ScanError(f"{folder}: no audio in it or below; files are known by their suffix: {' '.join(suffixes)}")
    return sorted(found)


def probe(relative: str, folder: Path, options: PrepareOptions) -> Probe:
    """Look at one file's header, or decode it with check=full."""
    if set("\t\r\n") & set(relative):
        return _skip(relative, "tab or line break in the name")
    path = os.path.join(folder, relative)
    try:
        info = audio_info(path)
        if options.check == "full":
            verify_audio(path)
    except AudioError as error:
        return _skip(relative, error.problem)
    seconds = info.samples / SAMPLE_RATE
    if seconds < options.min_seconds:
        return _skip(relative, f"shorter than min_seconds ({seconds:.3f} s)")
    if options.max_seconds is not None and seconds > options.max_seconds:
        return _skip(relative, f"longer than max_seconds ({seconds:.3f} s)")
    return Probe(relative, info)


def _skip(relative: str, reason: str) -> Probe:
    return Probe(relative, category=reason.partition(" (")[0], reason=reason)


def scan(folder: Path, options: PrepareOptions) -> list[Probe]:
    """Probe every audio file below `folder`, in sorted order, on `options.workers` threads."""
    found = find_audio(folder)
    with ThreadPool(options.workers) as pool:
        probes = pool.imap(partial(probe, folder=folder, options=options), found, PROBES_PER_TASK)
        return list(tqdm(probes, total=len(found), desc=f"probing {folder}", unit="file", disable=None))


def split_rows(count: int, valid_percent: float, seed: int) -> np.ndarray:
    """(count,) bool, True for validation: `valid_percent` of the rows drawn by `seed`, at least one when positive.

    Raises ScanError where nothing would be left for one of the two.
    """
    valid = np.zeros(count, bool)
    if not 0 <= valid_percent < 100:
        raise ScanError(f"valid_percent: {valid_percent} is not in 0 to 100; 1 is usual")
    if valid_percent > 0:
        number = max(1, round(count * valid_percent / 100))
        if number >= count:
            raise ScanError(f"valid_percent: {count} utterance(s) leave nothing to train on; give valid_percent=0")
        valid[np.random.default_rng(seed).permutation(count)[:number]] = True
    return valid


def write_skipped(path: Path, skipped: list[tuple[Path, Probe]]) -> None:
    """Write `path<TAB>reason` of every file that was left out; tabs and line breaks in names become spaces."""
    lines = [f"{' '.join(str(folder / p.relative).split())}\t{p.reason}\n" for folder, p in skipped]
    path.write_bytes(os.fsencode("".join(lines)))


def summarize(infos: list[AudioInfo]) -> dict[str, Any]:
    """Hours, counts, histograms and duration percentiles of the usable files, plain enough for JSON."""
    seconds = np.array([info.samples for info in infos]) / SAMPLE_RATE
    return {
        "utterances": len(infos),
        "hours": round(float(seconds.sum()) / 3600, 4),
        "seconds_percentiles": {str(q): round(float(np.percentile(seconds, q)), 3) for q in PERCENTILES},
        "rates_hz": _histogram(info.native_rate_hz for info in infos),
        "channels": _histogram(info.channels for info in infos),
        "formats": _histogram(info.format for info in infos),
    }


def _histogram(values: Iterable[object]) -> dict[str, int]:
    return {str(value): count for value, count in Counter(values).most_common()}


def prepare(options: PrepareOptions) -> dict[str, Any]:
    """Scan, split, write train.tsv, valid.tsv, skipped.tsv and report.json; returns the report.

    Raises ScanError where no usable audio is found or options contradict each other.
    """
    _check_options(options)
    folders = {"train": options.audio_dir} | ({"valid": options.valid_dir} if options.valid_dir else {})
    probes = {split: scan(folder, options) for split, folder in folders.items()}
    skipped = [(folders[split], p) for split in probes for p in probes[split] if p.info is None]
    options.output.mkdir(parents=True, exist_ok=True)
    write_skipped(options.output / "skipped.tsv", skipped)
    reasons = _histogram(p.category for _, p in skipped)
    usable = {split: [p for p in probes[split] if p.info is not None] for split in probes}
    for split, folder in folders.items():
        if not usable[split]:
            raise ScanError(f"{folder}: no usable audio ({reasons}); see {options.output / 'skipped.tsv'}")
    splits = usable if options.valid_dir else _split(usable["train"], options)
    # A validation split of an earlier run would belong to another corpus.
    (options.output / "valid.tsv").unlink(missing_ok=True)
    for split, members in splits.items():
        root = folders.get(split, options.audio_dir).resolve()
        write_manifest(options.output / f"{split}.tsv", root, ((p.relative, p.info.samples) for p in members if p.info))
    report = {
        "splits": {split: summarize([p.info for p in members if p.info]) for split, members in splits.items()},
        "skipped": {"files": len(skipped), "reasons": reasons},
    }
    (options.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _split(probes: list[Probe], options: PrepareOptions) -> dict[str, list[Probe]]:
    percent = DEFAULT_VALID_PERCENT if options.valid_percent is None else options.valid_percent
    in_valid = split_rows(len(probes), percent, options.seed)
    splits = {
        "train": [p for p, chosen in zip(probes, in_valid, strict=True) if not chosen],
        "valid": [p for p, chosen in zip(probes, in_valid, strict=True) if chosen],
    }
    return {split: members for split, members in splits.items() if members}


def describe(report: dict[str, Any]) -> str:
    """The report as text, a few lines a split."""
    lines = []
    for split, figures in report["splits"].items():
        lines.append(f"{split}: {figures['utterances']} utterances, {figures['hours']:.2f} hours")
        percentiles = ", ".join(f"{q} %: {value:.2f}" for q, value in figures["seconds_percentiles"].items())
        lines.append(f"  seconds: {percentiles}")
        for name in ("rates_hz", "channels", "formats"):
            lines.append(f"  {name}: " + ", ".join(f"{value} ({count})" for value, count in figures[name].items()))
    skipped = report["skipped"]
    lines.append(f"skipped: {skipped['files']} files")
    lines += [f"  {reason}: {count}" for reason, count in skipped["reasons"].items()]
    return "\n".join(lines)
