"""A method that trains on two augmented crops of every row and on their clean waveforms.

In this process, or under torchrun: augmented_run.py <corpus> <output> [option=value ...]
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from small_run import SMALL
from torch import nn

from pretrain.config import compose_recipe, run_config
from pretrain.method import Batch, Example, Ratio, StepOutput
from pretrain.objectives.masked_units import MaskedUnitsCollator
from pretrain.training.setup import build_trainer
from pretrain.training.trainer import Trainer
from recipes.hubert.method import HubertMethod

OPTIONS = [
    "augment.reverberation={prob:0.3}",
    "augment.mixing={prob:0.5,snr_db:[-5,5]}",
    "augment.babble={prob:0.3,snr_db:[5,15],talkers:[1,3]}",
    "augment.noise={prob:0.5,snr_db:[0,10]}",
    "batch={seconds_per_micro_batch:2.5,micro_batches_per_step:2}",
    "trainer={log_every:1,validate_every:2,save_every:1,audio_examples:2}",
    "trainer.memory_probe=false",
    "name=run",
]


@dataclass(frozen=True)
class PairCollator(MaskedUnitsCollator):
    """Two crops of each row, `extras` "clean" (B, T) as they were recorded."""

    reads_clean_audio: bool = True
    crops_per_example: int = 2

    def __call__(self, examples: list[Example]) -> Batch:
        batch = super().__call__(examples)
        batch.extras["clean"] = torch.stack([example.clean_waveform for example in examples])
        return batch


class PairMethod(HubertMethod):
    """HuBERT's loss on noisy crops, and beside it a filter of one number that takes the noise away."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gain = nn.Parameter(torch.ones(1))

    @classmethod
    def collator(cls, config: Any) -> PairCollator:
        return PairCollator(**vars(HubertMethod.collator(config)))

    def forward(self, batch: Batch) -> StepOutput:
        output = super().forward(batch)
        clean, rows = batch.extras["clean"], len(batch.rows)
        error = (self.gain * batch.waveforms - clean).square().mean()
        metrics = {
            "altered": Ratio((batch.waveforms != clean).any(1).sum(), rows),
            "pairs": Ratio((batch.rows[::2] == batch.rows[1::2]).sum(), rows // 2),
            "distance": Ratio(error.detach() * rows, rows),
        }
        return output._replace(mean=output.mean + error, metrics=output.metrics | metrics)


def build(data: Path, output: Path, resources: ExitStack, *options: str) -> Trainer:
    """The trainer of `PairMethod` on `write_data`'s corpus under `data`, its validation files as noise."""
    places = [f"data.dir={data / 'data'}", f"data.labels={data / 'labels'}", f"output_dir={output}"]
    files = [f"data.noise={data / 'data' / 'valid.tsv'}", f"data.rirs={data / 'rirs'}"]
    values = compose_recipe("hubert_tiny", [*SMALL[1:], *OPTIONS, *places, *files, *options])
    with patch("pretrain.training.setup.load_method", lambda name: SimpleNamespace(Method=PairMethod)):
        return build_trainer(run_config(values), resources)


if __name__ == "__main__":
    with ExitStack() as stack:
        status = build(Path(sys.argv[1]), Path(sys.argv[2]), stack, *sys.argv[3:]).fit()
    torch.distributed.destroy_process_group()
    sys.exit(status)
