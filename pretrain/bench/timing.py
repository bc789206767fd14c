"""What a piece of work costs in wall time, CPU time and memory, and how such rows are compared and printed."""

from __future__ import annotations

import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from tqdm import tqdm

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
Row = dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """Wall time, and CPU time of this process with those of its children that have ended, in seconds."""

    wall_seconds: float
    cpu_seconds: float


def cpu_seconds() -> float:
    """User and system time of this process and its ended children so far."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def cost_of(work: Callable[[], T], device: torch.device | None = None) -> tuple[Cost, T]:
    """Run `work` once, waiting for a GPU before and after it; its cost and its result."""
    _wait_for(device)
    wall, cpu = time.perf_counter(), cpu_seconds()
    result = work()
    _wait_for(device)
    return Cost(time.perf_counter() - wall, cpu_seconds() - cpu), result


def interleaved(
    variants: Mapping[K, Callable[[], object]], rounds: int, warmups: int, device: torch.device | None = None
) -> dict[K, Cost]:
    """Medians over `rounds` of each variant's cost, after `warmups` rounds that do not count.

    Every round runs all variants once, so that what else happens on the machine meets them alike.
    """
    costs: dict[K, list[Cost]] = {name: [] for name in variants}
    for index in tqdm(range(warmups + rounds), "rounds"):
        for name, work in variants.items():
            cost, _ = cost_of(work, device)
            if index >= warmups:
                costs[name].append(cost)
    return {
        name: Cost(median(cost.wall_seconds for cost in runs), median(cost.cpu_seconds for cost in runs))
        for name, runs in costs.items()
    }


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """The result of `function`, which runs in an interpreter of its own, so that its memory can be told apart."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_resident_gb() -> float:
    """The most memory that this process has held, in units of 10^9 bytes.

    Linux' VmHWM rather than getrusage, whose figure a process inherits from the one that started it.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS counts bytes


def environment(device: torch.device) -> dict[str, str | int | float]:
    """What the figures depend on; `load` is the machine's average number of running processes in the last minute."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def add_ratios(rows: list[Row], ours: str, group: str | None = None) -> None:
    """Add to every row `ours_by_this_wall` and `ours_by_this_cpu`: our median over that row's.

    `rows` are compared within equal values of the column `group`; `ours` is the `variant` that is divided.
    """
    for row in rows:
        base = next(r for r in rows if r["variant"] == ours and (group is None or r[group] == row[group]))
        for kind in ("wall", "cpu"):
            row[f"ours_by_this_{kind}"] = base[f"{kind}_seconds"] / row[f"{kind}_seconds"]


def markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table; columns in the order in which they first appear, empty where a row has none."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(name.replace("_", " ") for name in columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def _wait_for(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
