"""Which speaker each row of a manifest is of, from its path or from a table."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pretrain.config import ConfigError
from pretrain.data.manifest import Manifest
from pretrain.tables import Table

SPEAKER_COLUMNS = ("speaker", "voice", "client_id")  # client_id: Common Voice
LISTED_ROWS = 10


def speaker_groups(speakers: int | str, manifest: Manifest) -> np.ndarray:
    """(N,) int32 group of each row of `manifest`, from 0 in the order in which the speakers first come.

    `speakers` is a component of the relative path, counted from 0 at its head or from -1 at the file's name:
    `84/121123/84-121123-0000.flac` has its speaker at 0 and at -3. Or it is a tab-separated table whose header names
    `utt` (the relative path without suffix) or `path`, and `speaker`, `voice` or `client_id`. Raises ConfigError,
    with the first rows, where rows have no speaker.
    """
    if isinstance(speakers, int):
        found = [_component(utterance, speakers) for utterance in manifest.utterance_ids()]
        problem, fix = f"a folder at place {speakers} of the path", "count again, or give a table of speakers"
    else:
        table = _read_table(Path(speakers))
        found = [table.get(utterance) for utterance in manifest.utterance_ids()]
        problem, fix = f"a speaker in {speakers}", "add them to the table, or take them out of the manifest"
    without = [row for row, speaker in enumerate(found) if not speaker]
    if without:
        listed = "\n  ".join(f"line {row + 2}: {manifest.relative_path(row)}" for row in without[:LISTED_ROWS])
        raise ConfigError(
            f"data.speakers: {manifest.path_of_manifest}: {len(without)} of {len(manifest)} rows do not have {problem}"
            f"; {fix}. The first ones:\n  {listed}"
        )
    ids: dict[str | None, int] = {}
    return np.fromiter((ids.setdefault(speaker, len(ids)) for speaker in found), np.int32, len(found))


def _component(utterance: str, place: int) -> str | None:
    parts = utterance.split("/")
    last = len(parts) - 1
    # The file's own name is nobody's speaker.
    return parts[place] if -len(parts) <= place < last and place != -1 else None


def _read_table(path: Path) -> dict[str, str]:
    """{utterance: speaker} of a tab-separated table."""
    table = Table(path, (("utt", "path"), SPEAKER_COLUMNS), ConfigError, "data.speakers")
    whole = table.names[0] == "utt"
    return {name if whole else name.rpartition(".")[0] or name: speaker for _, (name, speaker) in table}
