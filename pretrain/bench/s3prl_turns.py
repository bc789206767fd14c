"""s3prl's side of tools/benchmark.py task=pipeline: its pre-training expert with its data loader, in its loop.

A script, not a module: s3prl's pre-training imports `pretrain`, `upstream` and `utility` from s3prl's own folder.
Source: `s3prl/pretrain/runner.py`.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import soundfile
import torch
import torchaudio
from turns import Training, serve

SAMPLES_PER_FRAME, SAMPLE_RATE = 160, 16_000


def start(job: dict[str, Any]) -> Training:
    """`job`: `folder` of s3prl, `upstream`, `upstream_config`, `datarc`, `optimizer`, `gradient_clipping`,
    `lengths_item` (where a batch holds its frame counts or a mask of its frames), `device`.
    """
    sys.path[0] = job["folder"]
    torchaudio.load = load_with_soundfile
    # It draws pictures at every logging step, which this loop never reaches; its module needs librosa.
    sys.modules["utility.audio"] = types.ModuleType("utility.audio")
    sys.modules["utility.audio"].plot_spectrogram_to_numpy = None  # type: ignore[attr-defined]
    module = importlib.import_module(f"pretrain.{job['upstream']}.pretrain_expert")
    expert = module.UpstreamPretrainExpert(job["datarc"], job["upstream_config"], job["device"]).to(job["device"])
    expert.loss_to_device()
    expert.train()
    optimizer = importlib.import_module("optimizers").get_optimizer([expert.model], 1_000_000, job["optimizer"])
    stream = forever(expert.get_train_dataloader())

    def update() -> float:
        """As the runner: it reads the loss of every step, and clips before it updates."""
        data = next(stream)
        loss, _ = expert(data, records={}, global_step=1, log_step=2)
        loss.backward()
        loss.item()
        torch.nn.utils.clip_grad_norm_(expert.model.parameters(), job["gradient_clipping"])
        optimizer.step()
        optimizer.zero_grad()
        frames = float(torch.as_tensor(data[job["lengths_item"]]).sum())
        return frames * SAMPLES_PER_FRAME / SAMPLE_RATE

    return Training(update, sum(p.numel() for p in expert.model.parameters()))


def forever(loader: Any) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from loader


def load_with_soundfile(path: str) -> tuple[torch.Tensor, int]:
    """What torchaudio.load did when s3prl was written; today's wants torchcodec."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(samples.T), rate


if __name__ == "__main__":
    serve(start)
