"""A method with a class, tags, two kinds of units, groups that train in turns, and a score that is no ratio.

In this process, or under torchrun: tagging_run.py <corpus> <output> [option=value ...]
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from small_run import SMALL
from torch import nn

from pretrain.config import compose_recipe, run_config
from pretrain.method import Batch, Example, Predictions, Progress, Ratio, StepOutput, TargetInfo, TargetSpec
from pretrain.objectives.masked_units import MaskedUnitsCollator
from pretrain.training.setup import build_trainer
from pretrain.training.trainer import Trainer
from recipes.hubert.method import HubertConfig, HubertMethod

OPTIONS = [
    "batch={seconds_per_micro_batch:2.5,micro_batches_per_step:2}",
    "trainer={log_every:1,validate_every:1,save_every:10,keep_checkpoints:1}",
    "trainer.memory_probe=false",
    "optimizer.name=adam",
    "data.workers=0",
    "name=run",
]
# A finished run is exported by the name of its method, and this one has none.
WITHOUT_EXPORT = patch("pretrain.training.trainer.export")


@dataclass
class TaggingConfig(HubertConfig):
    speakers: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TaggingCollator(MaskedUnitsCollator):
    """`extras` "speaker" (B,) int64, -1 where unlabelled, and "tags" (B, C); labelled rows are a unit of their own."""

    def __call__(self, examples: list[Example]) -> Batch:
        batch = super().__call__(examples)
        speakers = [example.targets["speaker"] for example in examples]
        batch.extras["speaker"] = torch.tensor([-1 if s is None else int(s) for s in speakers])
        batch.extras["tags"] = torch.from_numpy(np.stack([example.targets["tags"] for example in examples]))
        batch.other_sizes["speakers"] = sum(s is not None for s in speakers)
        return batch


def mean_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    return float(average_precision_score(targets, scores, average="micro"))


class TaggingMethod(HubertMethod):
    """HuBERT with a head for speakers, at odd updates alone, and one for tags, at a tenth of the rate."""

    Config = TaggingConfig
    exported_heads = ("speaker_head",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.encoder.encoder_embed_dim
        self.speaker_head = nn.Linear(width, max(1, len(config.speakers)))
        self.tag_head = nn.Linear(width, max(1, len(config.tags)))

    @classmethod
    def targets(cls, config: Any) -> list[TargetSpec]:
        speaker, tags = TargetSpec("speaker", "class", column="speaker"), TargetSpec("tags", "tags", column="tags")
        return [*super().targets(config), speaker, tags]

    @classmethod
    def fit_to_targets(cls, config: Any, found: dict[str, TargetInfo]) -> Any:
        labels = {name: info for name, info in found.items() if name.startswith("labels_")}
        names = {"speakers": list(found["speaker"].names), "tags": list(found["tags"].names)}
        return replace(super().fit_to_targets(config, labels), **names)

    @classmethod
    def collator(cls, config: Any) -> TaggingCollator:
        return TaggingCollator(**vars(HubertMethod.collator(config)))

    def parameter_groups(self) -> list[dict[str, Any]]:
        heads = {*self.speaker_head.parameters(), *self.tag_head.parameters()}
        return [
            {"params": [p for p in self.parameters() if p not in heads]},
            {"params": list(self.speaker_head.parameters()), "active": self.trains_speakers, "weight_decay": 0.1},
            {"params": list(self.tag_head.parameters()), "lr_scale": 0.1, "weight_decay": 0.0},
        ]

    @staticmethod
    def trains_speakers(progress: Progress) -> bool:
        return progress.update % 2 == 1

    def forward(self, batch: Batch) -> StepOutput:
        output, extras = super().forward(batch), batch.extras
        pooled = self.encoder(batch.waveforms, batch.lengths_if_padded)[0][-1].float().mean(1)
        speakers = F.cross_entropy(self.speaker_head(pooled), extras["speaker"], ignore_index=-1, reduction="sum")
        tags = self.tag_head(pooled)
        missed = F.binary_cross_entropy_with_logits(tags, extras["tags"])
        metrics = {
            "loss_speakers": Ratio(speakers.detach(), batch.other_sizes["speakers"]),
            "precision": Predictions(tags.detach(), extras["tags"], mean_precision),
        }
        return output._replace(
            metrics=output.metrics | metrics, mean=output.mean + missed, other_losses={"speakers": speakers}
        )


def build(data: Path, output: Path, resources: ExitStack, *options: str) -> Trainer:
    """The trainer of `TaggingMethod` on `write_data`'s corpus under `data`, with the table `data`/classes.tsv."""
    places = [f"data.dir={data / 'data'}", f"data.labels={data / 'labels'}", f"output_dir={output}"]
    tables = [f"data.classes={data / 'classes.tsv'}"]
    values = compose_recipe("hubert_tiny", [*SMALL[1:], *OPTIONS, *places, *tables, *options])
    with patch("pretrain.training.setup.load_method", lambda name: SimpleNamespace(Method=TaggingMethod)):
        return build_trainer(run_config(values), resources)


if __name__ == "__main__":
    with ExitStack() as stack, WITHOUT_EXPORT:
        status = build(Path(sys.argv[1]), Path(sys.argv[2]), stack, *sys.argv[3:]).fit()
    torch.distributed.destroy_process_group()
    sys.exit(status)
