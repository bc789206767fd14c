"""The engine: the same numbers as plain torch at every ZeRO stage and world size, and across a change of both."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_method import (
    EMPTY_STEP,
    NAN_STEP,
    OPTIMIZER,
    PARTLY_NAN_STEP,
    SAVED_AT,
    UPDATES,
    SmallConfig,
    SmallMethod,
    StepsOnly,
    engine_of,
    micro_batch,
    plain,
    plain_torch,
    train,
)
from two_ranks import CHANGES, STAGES, conformer_run, continued, load, save

from pretrain.config import ConfigError, OptimizerConfig
from pretrain.method import Batch, Progress, StepOutput
from pretrain.training.adam import SkippableAdam
from pretrain.training.engine import Engine
from pretrain.world import World

FIXTURES = Path(__file__).parent / "fixtures"
# With `--dist loadgroup` one worker launches the two ranks for this file and test_checkpoint.py.
pytestmark = pytest.mark.xdist_group("two_ranks")


def assert_same_run(ours: dict[str, Any], history: list[dict[str, Any]], weights: dict[str, torch.Tensor]) -> None:
    """Losses, norms and final weights to 1e-6, and the same steps applied."""
    assert [h["applied"] for h in ours["history"]] == [h["applied"] for h in history]
    for mine, theirs in zip(ours["history"], history, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6, nan_ok=True)
        if theirs["applied"]:
            assert mine["norm"] == pytest.approx(theirs["norm"], rel=1e-5)
    for name, value in weights.items():
        assert ours["weights"][name] == pytest.approx(value.flatten().tolist(), rel=1e-5, abs=1e-6), name


@pytest.fixture(scope="module")
def reference() -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    return plain_torch()


def test_the_reference_covers_what_it_should(reference: Any) -> None:
    history, _ = reference
    assert [step for step, h in enumerate(history) if not h["applied"]] == [NAN_STEP, PARTLY_NAN_STEP, EMPTY_STEP]
    assert any(h["norm"] > OPTIMIZER.clip_norm for h in history)


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_equals_plain_torch(two_ranks: dict[str, Any], reference: Any, stage: int) -> None:
    assert two_ranks["alone"][stage]["problem"] is None
    assert_same_run(two_ranks["alone"][stage], *reference)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_equal_plain_torch(two_ranks: dict[str, Any], reference: Any, stage: int) -> None:
    """A NaN on the second rank alone, and nothing to score, leave weights and moments of both as they were."""
    assert two_ranks["ranks_agree"]
    assert two_ranks["unbroken"][str(stage)]["problem"] is None
    assert_same_run(two_ranks["unbroken"][str(stage)], *reference)


@pytest.mark.parametrize("direction", ["same_world", "from_one_rank"])
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_two_ranks_continue_any_checkpoint(
    two_ranks: dict[str, Any], reference: Any, direction: str, change: tuple[int, int]
) -> None:
    history, weights = reference
    assert_same_run(two_ranks[direction][CHANGES.index(change)], history[SAVED_AT:], weights)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_one_rank_continues_what_two_wrote(
    two_ranks: dict[str, Any], reference: Any, world: World, change: tuple[int, int]
) -> None:
    history, weights = reference
    assert_same_run(continued(two_ranks["folder"], *change, world, written_by=2), history[SAVED_AT:], weights)


def test_loading_to_the_bit_at_the_same_world_size(two_ranks: dict[str, Any], world: World) -> None:
    for stage in STAGES:
        run = two_ranks["folder"] / f"world1_stage{stage}"
        engine = load(run, stage, "fp32", world)
        stored = load_file(run / "checkpoints" / f"step_{SAVED_AT:08d}" / "optimizer-00000-of-00001.safetensors")
        assert plain(engine.optimizer_state()) == plain(stored)
        # SAVED_AT steps were made, of which the one with a NaN does not count.
        assert engine.scalars()["adam_steps"] == [SAVED_AT - 1] * 2
        again = train(engine, world, SAVED_AT, UPDATES)
        unbroken = two_ranks["alone"][stage]
        # Text, because NaN differs from itself.
        assert str(again) == str(unbroken["history"][SAVED_AT:])
        assert plain(engine.weights(keep=True)) == unbroken["weights"]


def test_a_hubert_whose_weights_are_shared_out(two_ranks: dict[str, Any]) -> None:
    """ZeRO 3 gathers weights where they are used: outside `forward` of their module, and for layers now skipped."""
    losses = two_ranks["hubert"]
    assert losses["3"] == pytest.approx(losses["1"], rel=1e-5)


def test_a_conformer_on_any_number_of_ranks(two_ranks: dict[str, Any], world: World) -> None:
    """ZeRO 3 on two ranks with activation checkpointing, and ZeRO 1 on one rank, batch norm included."""
    alone = conformer_run(world, {"stage": 1}, checkpoint_activations=False)
    for name in ("losses", "variance"):
        assert two_ranks["conformer"][name] == pytest.approx(alone[name], rel=1e-5)


def test_collectives(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["from_main"] == {"rank": 0}
    assert two_ranks["gathered"] == [0, 1]
    assert "No space left" in two_ranks["failed_on_main"]


def test_weights_hold_buffers_and_are_empty_where_not_wanted(world: World) -> None:
    engine = engine_of(1, "fp32", world)
    assert engine.weights(keep=True).keys() == SmallMethod().state_dict().keys()
    assert engine.weights(keep=False) == {}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_bf16_keeps_fp32_weights(world: World, reference: Any, stage: int) -> None:
    engine = engine_of(stage, "bf16", world)
    history = train(engine, world, 0, UPDATES)
    # bf16 has 8 bits of mantissa: near the fp32 run, and not equal to it.
    for mine, theirs in zip(history, reference[0], strict=True):
        assert mine["applied"] == theirs["applied"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=3e-2, nan_ok=True)
    assert history[0]["loss"] != reference[0][0]["loss"]
    assert all(value.dtype == torch.float32 for value in engine.weights(keep=True).values())
    assert all(value.dtype == torch.float32 for _, value in engine.optimizer_state())


def test_fp16_halves_its_scale_and_resumes_with_it(world: World, tmp_path: Path) -> None:
    engine = engine_of(1, "fp16", world)
    assert engine.loss_scale == 2.0**16
    history = train(engine, world, 0, SAVED_AT)
    assert not history[NAN_STEP]["applied"]
    refused = sum(not h["applied"] for h in history)
    assert engine.loss_scale == 2.0 ** (16 - refused)
    assert save(tmp_path / "run", engine, world, SAVED_AT) is None
    again = load(tmp_path / "run", 1, "fp16", world)
    assert again.loss_scale == engine.loss_scale
    expected, got = (train(e, world, SAVED_AT, UPDATES) for e in (engine, again))
    assert [h["loss"] for h in got[:1]] == [h["loss"] for h in expected[:1]]
    assert plain(again.weights(keep=True)) == plain(engine.weights(keep=True))


def test_fp16_needs_a_stage_that_scales_the_loss(world: World) -> None:
    with pytest.raises(ConfigError, match="fp16 needs deepspeed=zero1"):
        engine_of(0, "fp16", world)


@pytest.mark.parametrize("field", ["gradient_clipping", "train_batch_size", "bf16", "optimizer"])
def test_what_the_recipe_decides_is_refused_in_deepspeeds_block(world: World, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"deepspeed\.{field}: set by the recipe"):
        Engine(SmallMethod(), OPTIMIZER, {"zero_optimization": {"stage": 1}, field: 1}, "fp32", world.device)


class Wrong(SmallMethod):
    """A method whose forward forgets the sum, or the `StepOutput` around it."""

    def forward(self, batch: Batch) -> StepOutput:
        loss = super().forward(batch).loss
        return StepOutput(loss.expand(2), {}) if batch.padded else loss


@pytest.mark.parametrize("padded", [False, True])
def test_what_a_forward_must_return_is_said(world: World, padded: bool) -> None:
    engine = engine_of(0, "fp32", world, Wrong())
    with pytest.raises(TypeError, match=r"Wrong\.forward: returned .*; return a StepOutput whose loss is one number"):
        engine.forward(replace(micro_batch(0, 0), padded=padded))


def test_units_of_a_further_loss_that_are_missing_are_named() -> None:
    output = StepOutput(torch.tensor(1.0), {}, other_losses={"speakers": torch.tensor(2.0)})
    with pytest.raises(TypeError, match=r"the units of \['speakers'\] are missing in the collator's other_sizes"):
        output.total(micro_batch(0, 0))


class TwoGroups(SmallMethod):
    """The small method, whose groups are active at every update: nothing should change."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{**group, "active": lambda progress: True} for group in super().parameter_groups()]


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_groups_that_are_always_active_train_as_in_plain_torch(world: World, name: str, stage: int) -> None:
    """Decay included, which in Adam is a part of the gradient, and must not reach the moments before the first."""
    config = OptimizerConfig(name, 1e-2, [0.9, 0.98], 1e-6, 0.1, 0.0)
    engine = Engine(TwoGroups(), config, {"zero_optimization": {"stage": stage}}, "fp32", world.device)
    assert all(not moment.any() for _, moment in engine.optimizer_state())
    plain_method = SmallMethod()
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    theirs = kind(plain_method.parameter_groups(), lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    for step in (1, 3):
        engine.begin_update(Progress(step, UPDATES, 1))
        for parameter in plain_method.parameters():
            parameter.grad = torch.zeros_like(parameter)  # an idle parameter decays all the same
        for index in range(4):
            engine.backward(engine.forward(micro_batch(step, index)).loss / 20, last=index == 3)
            (plain_method(micro_batch(step, index)).loss / 20).backward()
        engine.step(1e-2, torch.zeros(()))
        theirs.step()
    for key, value in engine.weights(keep=True).items():
        torch.testing.assert_close(value, plain_method.state_dict()[key], rtol=1e-5, atol=1e-6)


class Given(StepsOnly):
    """Parameters whose gradients are handed in through the batch."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        super().__init__(SmallConfig())
        # Not a ParameterList: ZeRO 3 gathers the parameters of modules whose forward is called.
        for i, parameter in enumerate(parameters):
            self.register_parameter(f"given_{i}", torch.nn.Parameter(parameter))

    def forward(self, batch: Batch) -> StepOutput:
        """A loss whose gradient with respect to parameter i is `extras[str(i)]`."""
        return StepOutput(sum((p * batch.extras[str(i)]).sum() for i, p in enumerate(self.parameters())), {})


@pytest.mark.parametrize("stage", STAGES)
def test_adamw_and_clipping_against_fairseq(world: World, stage: int) -> None:
    facts = json.loads((FIXTURES / "optim_fairseq.json").read_text())
    tensors = load_file(FIXTURES / "optim_fairseq.safetensors")
    adam = facts["config"]["adam"]
    config = OptimizerConfig("adamw", 0, adam["betas"], adam["eps"], adam["weight_decay"], facts["config"]["clip_norm"])
    method = Given([tensors["in.param_0"].clone(), tensors["in.param_1"].clone()])
    engine = Engine(method, config, {"zero_optimization": {"stage": stage}}, "fp32", world.device)
    for step, lr in enumerate(adam["lr_per_step"]):
        gradients = {str(i): tensors[f"in.grad_{step}_{i}"] for i in range(2)}
        batch = Batch(torch.zeros(1, 1), torch.ones(1), 1, torch.zeros(1), extras=gradients)
        engine.backward(engine.forward(batch).loss, last=True)
        assert engine.step(lr, torch.zeros(()))
        assert engine.grad_norm == pytest.approx(facts["scalars"]["grad_norm_before_clip"][step], rel=1e-5)
        weights = engine.weights(keep=True)
        for i in range(2):
            torch.testing.assert_close(weights[f"given_{i}"], tensors[f"out.param_{step}_{i}"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_weight_decay_is_that_of_torchs_optimizer_of_that_name(world: World, name: str) -> None:
    """An L2 term of the gradient for adam, apart from the gradient for adamw."""
    config = OptimizerConfig(name, 0.0, [0.9, 0.98], 1e-6, 0.3, 0.0)
    torch.manual_seed(0)
    mine = torch.nn.Parameter(torch.randn(5))
    theirs = torch.nn.Parameter(mine.detach().clone())
    ours = SkippableAdam([{"params": [mine]}], world.device, config)
    options = {"lr": 0.05, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.3}
    peer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]([theirs], **options)
    for _ in range(4):
        mine.grad = torch.randn(5)
        theirs.grad = mine.grad.clone()
        ours.param_groups[0]["lr"] = 0.05
        ours.begin(torch.zeros(()))
        ours.step()
        peer.step()
    torch.testing.assert_close(mine, theirs)


def test_what_one_step_of_an_update_finds_holds_for_those_after_it(world: World) -> None:
    """ZeRO 3 steps its groups one by one; without clipping only the first one's gradient is not finite here."""
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = SkippableAdam([{"params": [p], "lr": 0.1} for p in parameters], world.device, OPTIMIZER)
    optimizer.begin(torch.zeros(()))
    for gradient, parameter in zip((math.nan, 1.0), parameters, strict=True):
        parameters[0].grad = parameters[1].grad = None
        parameter.grad = torch.full((3,), gradient)
        optimizer.step()
    assert bool(optimizer.found_inf)
    assert all(torch.equal(parameter, torch.ones(3)) for parameter in parameters)


def test_a_refused_update_leaves_weights_and_moments(world: World) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = SkippableAdam([{"params": [parameter], "lr": 0.1}], world.device, OPTIMIZER)
    for gradient, skip, moved in ((1.0, 0.0, True), (1.0, 1.0, False), (math.inf, 0.0, False), (math.nan, 0.0, False)):
        before = {"weight": parameter.detach().clone(), **{k: v.clone() for k, v in optimizer.state[parameter].items()}}
        parameter.grad = torch.full((3,), gradient)
        optimizer.begin(torch.tensor(skip))
        optimizer.step()
        after = {"weight": parameter.detach(), **optimizer.state[parameter]}
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert bool(changed) == moved, (gradient, skip, changed)
        assert bool(optimizer.found_inf) != moved
