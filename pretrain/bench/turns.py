"""Training processes that take turns: each runs some updates when asked, and is stopped while another has its turn.

The asked side is a plain script as well as a module, without imports of this project: s3prl's code runs in a process
where the name `pretrain` means s3prl's own package.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import psutil

END_SECONDS = 20.0


class TurnError(Exception):
    """A training process ended before its time; the message holds the end of what it said."""


@dataclass(frozen=True)
class Turn:
    """What some updates of a network of `parameters` took: time, CPU time with the loader's workers, audio read."""

    wall_seconds: float
    cpu_seconds: float
    audio_seconds: float
    parameters: int


class Training(NamedTuple):
    """`update` makes one update and returns the seconds of audio that it read."""

    update: Callable[[], float]
    parameters: int


class TurnTaker:
    """A script that calls `serve`, in a process group of its own; `job` reaches it as JSON in its first argument."""

    def __init__(self, command: list[str], job: dict[str, Any], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, *command, json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                start_new_session=True,
                env={**os.environ, **environment},
            )

    def __enter__(self) -> TurnTaker:
        return self

    def __exit__(self, *error: object) -> None:
        """End the process with its workers, stopped or not."""
        self._signal(signal.SIGKILL)
        self._process.wait(END_SECONDS)

    def take(self, updates: int) -> Turn:
        """Let it run `updates` updates, and stop it again. Raises TurnError where it ends instead."""
        asking, answers = self._process.stdin, self._process.stdout
        assert asking is not None
        assert answers is not None
        self._signal(signal.SIGCONT)
        with suppress(BrokenPipeError):  # it has ended: that there is no answer says so too
            asking.write(f"{updates}\n")
            asking.flush()
        reply = answers.readline()
        if not reply:
            raise TurnError(f"{self.log}: " + " | ".join(self.log.read_text().strip().splitlines()[-3:]))
        self._signal(signal.SIGSTOP)
        return Turn(**json.loads(reply))

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(self._process.pid, number)


def serve(start: Callable[[dict[str, Any]], Training]) -> None:
    """Answer turns until the asking side goes away; `start` takes the job. What they print goes to the log."""
    replies: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    training = start(json.loads(sys.argv[1]))
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), _cpu_seconds()
        audio = sum(training.update() for _ in range(int(line)))
        turn = Turn(time.perf_counter() - wall, _cpu_seconds() - cpu, audio, training.parameters)
        replies.write(json.dumps(asdict(turn)) + "\n")
        replies.flush()


def _cpu_seconds() -> float:
    """User and system time of this process, its children and those that have ended."""
    own = psutil.Process()
    times = own.cpu_times()
    total = times.user + times.system + times.children_user + times.children_system
    for child in own.children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total
