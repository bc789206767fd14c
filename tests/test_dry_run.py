"""The dry run: its estimate beside what is really held, and every recipe on a machine that could not train it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_python
from held_by_ranks import STAGES, WIDTH, Layers, zero_block
from recipe_checks import build
from small_method import SmallMethod, micro_batch
from small_run import SMALL, environment, metrics, write_data
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from pretrain.bench.memory import MemoryOptions, measure_memory
from pretrain.bench.step import StepOptions, Subject, make_batch
from pretrain.config import CONF_DIR, ConfigError, compose_recipe, recipe_names, run_config
from pretrain.method import Batch, Method
from pretrain.planning.dry_run import report
from pretrain.planning.footprint import LiveBytes, measure
from pretrain.training.memory import state_bytes
from pretrain.training.setup import build_trainer
from pretrain.world import World

TINY = [name for name in recipe_names() if name.endswith("_tiny")]
LARGE = [name for name in ("hubert_xlarge_ll60k", "xls_r_2b") if name in recipe_names()]
# Dropouts, and the front end whose norms CUDA's autocast keeps in float32.
REGULARISED = ["method.encoder.dropout=0.1", "method.encoder.attention_dropout=0.1", "method.encoder.dropout_input=0.1"]


def step_of(recipe: str, *overrides: str) -> tuple[Callable[[], Method], Batch]:
    """How a recipe's method is built, and a batch of 2 x 2 s for it."""
    batch = make_batch(StepOptions("step", recipe=recipe, batch=2, seconds=2.0), Subject.of_recipe(recipe))
    return lambda: build(recipe, *overrides), batch


def counted(method: Method, batch: Batch, dtype: torch.dtype | None) -> int:
    """Bytes of the tensors that a real step makes, beside weights, gradients and the batch."""
    for parameter in method.train().parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [*method.parameters(), *(p.grad for p in method.parameters()), *method.buffers()]
    with LiveBytes([*known, batch.waveforms, *batch.extras.values()]) as live:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = method(batch).loss
        loss.backward()
    return live.peak


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_the_estimate_is_what_a_real_step_holds(checkpoint_activations: bool, dtype: torch.dtype | None) -> None:
    make, batch = step_of("hubert_tiny", *REGULARISED)
    estimate = measure(make, batch, dtype=dtype, on_gpu=False, checkpoint_activations=checkpoint_activations)
    method = make()
    if checkpoint_activations:
        method.encoder.checkpoint_activations()
    assert estimate.peak == pytest.approx(counted(method, batch, dtype), rel=0.01)
    assert estimate.saved < estimate.peak
    assert estimate.method_parameters == sum(p.numel() for p in method.parameters())


@pytest.mark.slow
def test_the_estimate_is_near_what_a_process_takes() -> None:
    kept, checkpointed = measure_memory(MemoryOptions("memory", recipe="hubert_tiny:4:4", threads=1))["rows"]
    assert kept["estimate"] == pytest.approx(kept["counted"], rel=0.01)
    assert 0.8 < kept["estimate_by_resident"] < 1.1
    assert checkpointed["resident"] < kept["resident"]


def test_activation_checkpointing_keeps_less_in_bf16() -> None:
    make, batch = step_of("hubert_tiny", *REGULARISED)
    kept, checkpointed = (
        measure(make, batch, dtype=torch.bfloat16, on_gpu=True, checkpoint_activations=checkpoint_activations)
        for checkpoint_activations in (False, True)
    )
    assert checkpointed.saved < kept.saved / 5
    assert checkpointed.peak < kept.peak


class CudaKernels(TorchFunctionMode):
    """Attention as a GPU has it, for fake CUDA tensors on a machine without one; torch asks the driver otherwise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k, v = (tensor.to(torch.bfloat16) for tensor in args)
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, kwargs["dropout_p"], False, False)[0]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["default", "layer_norm"])
def test_what_a_gpu_keeps_in_bf16_is_what_torch_keeps_of_fake_cuda_tensors(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward only: torch's autograd refuses fake CUDA tensors without a driver, its autocast does not."""
    make, batch = step_of("hubert_tiny", *REGULARISED, f"method.encoder.extractor_mode={mode}")
    estimate = measure(make, batch, dtype=torch.bfloat16, on_gpu=True, checkpoint_activations=False)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True) as fake, CudaKernels():
        with torch.device("cuda"):
            method = make().train()
        on_card = batch._map(lambda tensor: fake.from_tensor(tensor).to("cuda"))
        with torch.autocast("cuda", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = method(on_card).loss
        assert loss.device.type == "cuda"
        own = [*method.parameters(), *method.buffers(), on_card.waveforms, *on_card.extras.values()]
        for tensor in own:
            saved.pop(tensor.untyped_storage()._cdata, None)
        assert estimate.saved == pytest.approx(sum(saved.values()), rel=0.01)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_what_deepspeed_holds_at_every_stage(ranks: int, tmp_path: Path) -> None:
    output = tmp_path / "held.json"
    done = run_python([str(ROOT / "tests" / "held_by_ranks.py"), str(output)], ranks=ranks, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    trained = sum(parameter.numel() for parameter in Layers().parameters())
    layer = 4 * WIDTH * (WIDTH + 1)
    for stage, held in json.loads(output.read_text()).items():
        state = state_bytes(trained, 0, 0, zero_block(int(stage)), ranks)
        estimate = state.weights + state.gradients + state.optimizer + max(state.buffers, state.step_buffers)
        # One gradient more is on its way in backward; ZeRO 1 frees its bucket before the last copies are made.
        assert abs(held - estimate) < 1.2 * layer, (stage, held / layer, estimate / layer)
    assert len(json.loads(output.read_text())) == len(STAGES)


def test_ranks_share_what_the_stage_says() -> None:
    alone, shared = ([state_bytes(10**9, 0, 0, {"stage": s}, ranks) for s in STAGES] for ranks in (1, 8))
    assert [one.weights / eight.weights for one, eight in zip(alone, shared, strict=True)] == [1, 1, 1, 8]
    assert [one.gradients / eight.gradients for one, eight in zip(alone, shared, strict=True)] == [1, 1, 8, 8]
    assert [one.optimizer / eight.optimizer for one, eight in zip(alone, shared, strict=True)] == [1, 8, 8, 8]
    # ZeRO keeps a copy of the weights beside the two moments.
    assert [state.optimizer for state in alone] == [8 * 10**9, 12 * 10**9, 12 * 10**9, 12 * 10**9]


class Asking(SmallMethod):
    """A step that depends on a number that was computed in it."""

    def forward(self, batch: Any) -> Any:
        return super().forward(batch) if float(self.net[0].weight.detach().sum()) > 0 else None


def test_a_step_that_needs_numbers_names_the_operation() -> None:
    with pytest.raises(
        ConfigError, match=r"trainer\.dry_run: .*because aten\._local_scalar_dense\.default needs numbers"
    ):
        measure(Asking, micro_batch(0, 0), dtype=None, on_gpu=True, checkpoint_activations=False)


@pytest.mark.parametrize("recipe", TINY + LARGE)
def test_every_recipe_is_planned(recipe: str, tmp_path: Path) -> None:
    overrides = [f"output_dir={tmp_path / 'out'}", "trainer.dry_run=true", "batch.micro_batches_per_step=2"]
    # Recurrent layers are planned frame by frame, so the shortest crops that the recipe allows will do.
    overrides.append(f"crop.max_seconds={compose_recipe(recipe)['crop']['min_seconds']}")
    lines = report(run_config(compose_recipe(recipe, [*overrides, "trainer.dry_run_ranks=2"])))
    numbers = {line.rsplit(maxsplit=1)[0].strip(): line.rsplit(maxsplit=1)[1] for line in lines if line}
    assert float(numbers["activations kept for backward"]) > 0
    assert float(numbers["peak"]) > float(numbers["weights"])
    assert float(numbers["trained"]) <= float(numbers["method, encoder included"])
    assert any("2 rank(s), GPUs" in line and "bf16 (precision=auto)" in line for line in lines)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_and_leaves_nothing(tmp_path: Path) -> None:
    options = ["recipe=hubert_tiny", "trainer.dry_run=true", "trainer.dry_run_device=cpu", "precision=fp32"]
    command = [sys.executable, str(ROOT / "pretrain" / "train.py"), *options, "deepspeed=zero3"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "dry run of hubert_tiny: nothing is trained or written" in done.stdout
    assert "1 rank(s), CPUs, ZeRO 3, fp32 (precision=fp32), activations kept" in done.stdout
    assert "from the plan of the data" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("trainer.dry_run_ranks=3", "cannot be shared by 3 ranks"),
        ("trainer.dry_run_ranks=0", r"trainer\.dry_run_ranks: 0 is not a positive number"),
        ("trainer.dry_run_device=gpu", r"trainer\.dry_run_device: 'gpu' is not one of cuda, cpu"),
        (
            "+deepspeed.zero_optimization.offload_optimizer.device=cpu",
            r"deepspeed\.zero_optimization\.offload_optimizer: the dry run cannot plan offloading",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        report(run_config(compose_recipe("hubert_tiny", ["trainer.dry_run=true", option])))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def losses(data: Path, tmp_path: Path, world: World) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """The curves of three updates of a small HuBERT with dropout and LayerDrop, trained in this process."""
    with ExitStack() as resources:

        def train(name: str, *options: str) -> list[dict[str, Any]]:
            out = tmp_path / name
            places = [f"data.dir={data / 'data'}", f"data.labels={data / 'labels'}", f"output_dir={out}", "name=run"]
            settings = ["data.workers=0", "trainer.stop_after_updates=3", "trainer.memory_probe=false"]
            recipe, *small = SMALL
            values = compose_recipe(recipe.removeprefix("recipe="), [*small, *places, *settings, *options])
            assert build_trainer(run_config(values), resources).fit() == 0
            return metrics(out)

        yield train


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (3, "fp32")])
def test_losses_are_the_same_with_activation_checkpointing(
    losses: Callable[..., list[dict[str, Any]]], stage: int, precision: str
) -> None:
    options = [f"deepspeed=zero{stage}", f"precision={precision}", "method.encoder.attention_dropout=0.1"]
    kept, checkpointed = (
        losses(f"checkpointing_{value}", *options, f"trainer.checkpoint_activations={value}") for value in (False, True)
    )
    assert len(kept) == 3
    assert checkpointed == kept


def test_a_recipe_chooses_its_zero_stage_and_the_command_line_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = shutil.copytree(CONF_DIR, tmp_path / "conf")
    recipe = "defaults: [hubert_large_ll60k, override /deepspeed: zero2]\ntrainer: {checkpoint_activations: true}\n"
    (conf / "recipe" / "fitted.yaml").write_text(f"# @package _global_\n{recipe}")
    monkeypatch.setattr("pretrain.config.compose.CONF_DIR", conf)
    fitted = run_config(compose_recipe("fitted"))
    assert fitted.deepspeed == {"zero_optimization": {"stage": 2}}
    assert fitted.trainer.checkpoint_activations
    other = run_config(compose_recipe("fitted", ["deepspeed=zero3", "trainer.checkpoint_activations=false"]))
    assert other.deepspeed == {"zero_optimization": {"stage": 3}}
    assert not other.trainer.checkpoint_activations
