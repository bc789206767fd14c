"""Small synthetic speech-like audio for tests: no files of the repository are needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE = 16000


def babble(samples: int, seed: int) -> np.ndarray:
    """(samples,) float32 in [-1, 1]: tones of changing pitch with noise and pauses, different for every seed."""
    rng = np.random.default_rng(seed)
    pieces = [np.empty(0)]
    while sum(map(len, pieces)) < samples:
        length = int(rng.integers(800, 4000))
        time = np.arange(length) / SAMPLE_RATE
        tone = sum(np.sin(2 * np.pi * f * time + rng.uniform(0, 6)) for f in rng.uniform(100, 4000, size=3))
        pieces.append(rng.choice([0.0, 0.05, 0.2]) * tone + 0.005 * rng.standard_normal(length))
    return np.clip(np.concatenate(pieces)[:samples], -1, 1).astype(np.float32)


def write_corpus(root: Path, lengths: dict[str, int]) -> None:
    """Write one 16 kHz 16-bit wav per item of `lengths` (relative path: samples) under `root`."""
    for seed, (name, samples) in enumerate(lengths.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, babble(samples, seed), SAMPLE_RATE, subtype="PCM_16")
