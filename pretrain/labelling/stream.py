"""Waveforms of manifest rows, read ahead by threads; files that cannot be read are counted, up to a share."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from pretrain.data.audio import AudioError, read_audio
from pretrain.data.manifest import Manifest
from pretrain.errors import UserError

READ_AHEAD = 8  # files per worker
LISTED_PROBLEMS = 10


class StreamError(UserError):
    """Too many files could not be read."""


class WaveformStream:
    """Reads rows of a manifest in the order given.

    `problems` maps the rows that could not be read to the reason. Reading is by threads: libsndfile and the resampler
    release the interpreter lock.
    """

    def __init__(self, manifest: Manifest, max_bad_share: float, workers: int = 2) -> None:
        self.manifest = manifest
        self.max_bad_share = max_bad_share
        self.workers = max(1, workers)
        self.problems: dict[int, str] = {}

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, Tensor | None]]:
        """Yield every row with its (T,) float32 waveform, or None where the file could not be read.

        Raises StreamError once the unreadable files exceed `max_bad_share` of the manifest.
        """
        remaining = iter(rows)
        pending: deque[tuple[int, Future[Tensor]]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                while True:
                    while len(pending) < READ_AHEAD * self.workers and (row := next(remaining, None)) is not None:
                        pending.append((int(row), pool.submit(self._waveform, int(row))))
                    if not pending:
                        return
                    row, future = pending.popleft()
                    yield row, self._result(row, future)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _waveform(self, row: int) -> Tensor:
        return torch.from_numpy(read_audio(self.manifest.path(row), 0, int(self.manifest.lengths[row])))

    def _result(self, row: int, future: Future[Tensor]) -> Tensor | None:
        try:
            return future.result()
        except AudioError as error:
            self.problems[row] = str(error)
            check_problems(self.problems, len(self.manifest), self.max_bad_share)
            return None


def check_problems(problems: dict[int, str], rows: int, max_bad_share: float) -> None:
    """Raise StreamError where more than `max_bad_share` of `rows` files could not be read."""
    if len(problems) > max_bad_share * rows:
        listed = "\n  ".join(list(problems.values())[:LISTED_PROBLEMS])
        raise StreamError(
            f"{len(problems)} of {rows} files could not be read, more than {max_bad_share:.1%}; repair them or make "
            f"the manifest again with tools/prepare_manifest.py. The first ones:\n  {listed}"
        )
