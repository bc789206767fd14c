"""Files that augmentation takes pieces of: noise, impulse responses, the training utterances themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pretrain.data.audio import SAMPLE_RATE, AudioError, read_audio
from pretrain.data.augment.options import AugmentError
from pretrain.data.joined import JoinedManifest
from pretrain.data.manifest import Manifest

MAX_ATTEMPTS = 8
MAX_RESPONSE_SECONDS = 30


class Clips:
    """The files of a manifest, drawn with equal probabilities; `field` names the option that they come from."""

    def __init__(self, manifest: Manifest | JoinedManifest, field: str) -> None:
        self.manifest = manifest
        self.field = field

    def draw(
        self, rng: np.random.Generator, samples: int | None, problems: list[str], except_row: int | None = None
    ) -> np.ndarray:
        """A random piece of `samples` of a random file, or all of it where it is shorter or `samples` is None.

        Returns float32 at 16 kHz; only the piece is read. The file is never that of `except_row`. A file that cannot be
        read is reported in `problems` and another one is drawn; raises AudioError where that fails again and again.
        """
        for _ in range(MAX_ATTEMPTS):
            row = self._row(rng, except_row)
            length = int(self.manifest.lengths[row])
            taken = length if samples is None else min(samples, length)
            start = int(rng.integers(length - taken + 1))
            try:
                return read_audio(self.manifest.path(row), start, taken)
            except AudioError as error:
                problems.append(str(error))
        raise AudioError(
            f"{self.field}: {MAX_ATTEMPTS} files drawn one after the other could not be read; check that the root of "
            "the manifest is mounted. " + " | ".join(problems[-MAX_ATTEMPTS:])
        )

    def _row(self, rng: np.random.Generator, except_row: int | None) -> int:
        if except_row is None:
            return int(rng.integers(len(self.manifest)))
        row = int(rng.integers(len(self.manifest) - 1))
        return row + (row >= except_row)


def open_clips(path: str | None, field: str, stage: str) -> Clips:
    """The files of `path`, a manifest or a folder with train.tsv, which `field` gives for the stage `stage`.

    Raises AugmentError, naming `field`, where it is missing, is no manifest, or lists files that are gone.
    """
    folder = field.replace(".", "/")
    short = " min_seconds=0.01" if field == "data.rirs" else ""
    hint = f"python tools/prepare_manifest.py audio_dir=<folder of audio> output={folder} valid_percent=0{short}"
    if path is None:
        raise AugmentError(
            f"{field}: missing, and this recipe's {stage} takes audio from it; make a manifest with `{hint}` and give "
            f"{field}={folder}, or switch the stage off with {stage}=null"
        )
    file = Path(path) / "train.tsv" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise AugmentError(f"{field}: {file} does not exist; give a manifest (.tsv) or its folder, made with `{hint}`")
    manifest = Manifest.read(file)
    gone = manifest.missing(3)
    if gone:
        raise AugmentError(f"{field}: {file} lists files that do not exist ({', '.join(gone)}); make it anew: `{hint}`")
    return Clips(manifest, field)


def open_responses(path: str | None, stage: str) -> Clips:
    """As `open_clips` for `data.rirs`; raises AugmentError too where a file is too long for an impulse response."""
    clips = open_clips(path, "data.rirs", stage)
    longest = int(clips.manifest.lengths.argmax())
    seconds = clips.manifest.lengths[longest] / SAMPLE_RATE
    if seconds > MAX_RESPONSE_SECONDS:
        raise AugmentError(
            f"data.rirs: {clips.manifest.path(longest)} has {seconds:.0f} s, and impulse responses a few at most; take "
            "files of other kinds out of the manifest"
        )
    return clips
