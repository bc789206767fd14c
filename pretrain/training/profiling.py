"""A torch.profiler trace of a few updates: `trainer.profile=true`."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

WARM_UPDATES, TRACED_UPDATES = 2, 3


class UpdateProfiler:
    """Traces updates into `<run>/profile`: a Chrome trace per rank, and a table of the costliest operations."""

    def __init__(self, run_dir: Path, rank: int, device: torch.device) -> None:
        self.folder = run_dir / "profile"
        self.rank = rank
        self.sort_by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self._profile = profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=0, warmup=WARM_UPDATES, active=TRACED_UPDATES, repeat=1),
            on_trace_ready=self._write,
        )
        self._updates = 0

    def __enter__(self) -> UpdateProfiler:
        self._profile.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._profile.stop()

    def update_done(self) -> bool:
        """Call after each update; True once the trace is complete."""
        self._updates += 1
        self._profile.step()
        return self._updates >= WARM_UPDATES + TRACED_UPDATES

    def _write(self, trace: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(self.folder / f"rank{self.rank}.json"))
        table = trace.key_averages().table(sort_by=self.sort_by, row_limit=25)
        (self.folder / f"rank{self.rank}.txt").write_text(table)
