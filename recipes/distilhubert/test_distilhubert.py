"""DistilHuBERT against s3prl's numbers and its model: states, predictions, loss, gradients; teachers; what it learns."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3prl_compat  # noqa: F401  (must come before s3prl)
import torch
import torch.nn.functional as F
from learning import assert_learned
from recipe_checks import (
    assert_same_states,
    build,
    count,
    group,
    hidden_states,
    load_fixture,
    method_state,
    on_meta,
    perturb,
    train_recipe,
    two_waveforms,
    value,
    write_exports,
)
from torch import Tensor

from pretrain import Upstream
from pretrain.config import ConfigError, typed
from pretrain.method import Batch, Encoder, Example
from pretrain.models.teacher import TeacherConfig
from pretrain.weights.interop.types import InteropError, TrainedMethod
from pretrain.weights.read import initialise
from recipes.distilhubert import interop
from recipes.distilhubert.method import DistilHubertConfig, DistilHubertMethod
from recipes.distilhubert.reference_steps import S3prlDistiller

FIXTURES = Path(__file__).parent / "fixtures"


class Official:
    """s3prl's numbers of one training pass, and our method with s3prl's weights on s3prl's batch."""

    def __init__(self) -> None:
        self.facts, self.tensors = load_fixture(FIXTURES, "distilhubert_tiny")
        self.scalars = self.facts["scalars"]
        imported = interop.from_pt({"Config": {"distiller": self.facts["config"]}, "Distiller": self.state()})
        teacher = imported.encoder_config | {"encoder_layers": 4}
        values = {
            "name": "distilhubert",
            "encoder": imported.encoder_config,
            "teacher": {"method": "hubert", "encoder": teacher, "weights": None},
            "pred_layer_id": self.facts["config"]["pred_layer_id"],
            "cosine_loss": self.facts["config"]["cosine_loss"],
            "init_teacher_conv_layers": False,
            "init_teacher_encoder_layers": False,
        }
        self.method = DistilHubertMethod(typed(DistilHubertConfig, values)).train()
        missing, unexpected = self.method.load_state_dict(method_state(imported), strict=False)
        assert not unexpected
        assert all(name.startswith("teacher.") for name in missing)
        lengths = (~self.tensors["in.padding_mask"]).sum(1)
        self.batch = collate_rows(self.method, self.tensors["in.wav"], lengths)
        self.valid = self.tensors["out.keep_mask"].bool()
        self.targets = [self.tensors[f"in.teacher_hidden_{layer}"] for layer in values["pred_layer_id"]]

    def state(self) -> dict[str, Tensor]:
        return group(self.tensors, "state")


def collate_rows(method: DistilHubertMethod, waveforms: Tensor, lengths: Tensor) -> Batch:
    """The method's batch of (B, T) waveforms with (B,) lengths in samples."""
    examples = [
        Example(waveform[:length], row, 0, {}, np.random.default_rng(row))
        for row, (waveform, length) in enumerate(zip(waveforms, lengths.tolist(), strict=True))
    ]
    return method.collator(method.config)(examples)


@pytest.fixture(scope="module")
def official() -> Official:
    return Official()


def test_hidden_states_and_predictions(official: Official) -> None:
    method, tensors = official.method, official.tensors
    assert official.batch.padded
    features = method.encoder.features(official.batch.waveforms, official.batch.lengths)
    assert torch.equal(features.frame_lengths, official.valid.sum(1))
    torch.testing.assert_close(features.conv, tensors["out.feat"], rtol=0, atol=2e-5)
    states = method.encoder.context(features.projected, features.frame_lengths)
    # Of the padding too, which the loss counts.
    for index, state in enumerate(states):
        torch.testing.assert_close(state, tensors[f"out.hidden_{index}"], rtol=0, atol=5e-5)
    predictions = torch.stack(method.predictions(official.batch), 1)
    torch.testing.assert_close(predictions, tensors["out.pred"], rtol=0, atol=5e-5)


def test_loss_and_its_terms(official: Official) -> None:
    output, scalars = official.method.distil(official.batch, official.targets), official.scalars
    assert official.batch.sample_size == 2 * 49
    per_frame = output.total(official.batch).item() / official.batch.sample_size
    assert per_frame == pytest.approx(scalars["loss"], rel=1e-5)
    names = [name for name in scalars if name.startswith(("rec_", "sim_", "tar_norm_"))]
    assert len(names) == 8
    for name in names:
        assert value(output, name) == pytest.approx(scalars[name], rel=1e-5), name


def test_gradients_in_full_and_by_norm(official: Official) -> None:
    method = official.method
    method.zero_grad()
    output = method.distil(official.batch, official.targets)
    (output.total(official.batch) / official.batch.sample_size).backward()
    state = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    ours = interop.to_s3prl(trained(method, state))["Distiller"]
    for name, expected in group(official.tensors, "grad").items():
        assert (ours[name] - expected).norm() <= 1e-3 * expected.norm(), name
    norms, total = official.facts["grad_norms"], official.scalars["grad_total_norm"]
    assert ours.keys() == norms.keys()
    for name, norm in norms.items():
        # Below this the exact gradient is zero (key biases) and what is stored is rounding.
        if norm > 1e-5 * total:
            assert ours[name].norm().item() == pytest.approx(norm, rel=1e-3), name
    assert torch.nn.utils.get_total_norm(list(ours.values())).item() == pytest.approx(total, rel=1e-4)


def trained(method: DistilHubertMethod, state: dict[str, Tensor] | None = None) -> TrainedMethod:
    return TrainedMethod("distilhubert", asdict(method.config), method.state_dict() if state is None else state)
