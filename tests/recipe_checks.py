"""What the tests of every method need: fixtures, a built method, a checkpoint of it, clients to compare with, a run."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import yaml
from conftest import LAUNCH_VARIABLES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pretrain.config import compose_recipe, run_config, typed
from pretrain.method import Batch, Example, Method, Ratio, StepOutput
from pretrain.registry import load_method
from pretrain.weights.export import ExportConfig, export

# With these a `*_tiny` recipe of masked prediction learns in a minute: spans, batch and rate of `hubert_demo`.
QUICK_MASKED_PREDICTION = (
    "method={mask_prob:0.65,mask_length:5,pred_nomask_weight:1.0}",
    "batch={seconds_per_micro_batch:8,micro_batches_per_step:1}",
    "crop.max_seconds=2.0",
    "optimizer.lr=3e-3",
    "schedule={warmup_updates:50,total_updates:400}",
    "trainer={validate_every:400,save_every:400}",
)


def load_fixture(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The facts (.json) and tensors (.safetensors) of one parity fixture."""
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


def group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix.`, without it."""
    return {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}


def build(recipe: str, *overrides: str, seed: int = 0) -> Method:
    """The method of a recipe, from a seed."""
    values = compose_recipe(recipe, list(overrides))["method"]
    method_class: type[Method] = load_method(values["name"]).Method
    torch.manual_seed(seed)
    return method_class(typed(method_class.Config, values, "method"))


def on_meta(recipe: str) -> Method:
    """The method of a recipe without memory, for counting."""
    with torch.device("meta"):
        return build(recipe)


def count(module: nn.Module) -> int:
    """Parameters, each counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def perturb(module: nn.Module, vector_scale: float = 0.2, matrix_scale: float = 0.05) -> None:
    """Move every parameter off its initial value, so that biases and norms matter."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * (vector_scale if parameter.dim() == 1 else matrix_scale))


def value(output: StepOutput, name: str) -> float:
    """A ratio among the metrics of a step."""
    ratio = output.metrics[name]
    assert isinstance(ratio, Ratio)
    return float(ratio.total) / float(ratio.weight)


def loss_per_unit(output: StepOutput, batch: Batch) -> float:
    """What is trained, per unit of the batch."""
    return output.total(batch).item() / batch.sample_size


def write_checkpoint(run: Path, method: Method, update: int = 100) -> Path:
    """The files of a finished checkpoint that reading weights needs; returns the step's folder."""
    step = run / "checkpoints" / f"step_{update:08d}"
    step.mkdir(parents=True)
    save_file({key: tensor.contiguous() for key, tensor in method.state_dict().items()}, step / "model.safetensors")
    (step / "config.yaml").write_text(yaml.safe_dump({"method": asdict(method.config)}))
    finish(step)
    return step


def finish(step: Path) -> None:
    """Write complete.json over the files that are there."""
    files = {}
    for path in step.iterdir():
        content = path.read_bytes()
        files[path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (step / "complete.json").write_text(json.dumps({"files": files}))


def two_waveforms(samples: int = 27_200, shorter: int = 16_079) -> tuple[Tensor, Tensor]:
    """Waveforms (2, samples), the second zero after `shorter` samples, and their lengths (2,)."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([samples, shorter])
    waveforms = 0.1 * torch.randn(2, samples, generator=generator) + 0.02
    return waveforms * (torch.arange(samples) < lengths[:, None]), lengths


def collate(method: Method, waveforms: Tensor, lengths: Tensor, seed: int = 0) -> Batch:
    """The method's batch of (B, T) waveforms with (B,) lengths in samples, without targets."""
    examples = [
        Example(waveform[:length], row, 0, {}, np.random.default_rng([seed, row]))
        for row, (waveform, length) in enumerate(zip(waveforms, lengths.tolist(), strict=True))
    ]
    return method.collator(method.config)(examples)


def same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether both have the same names and, to the bit, the same tensors."""
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def write_exports(folder: Path, method: Method) -> dict[str, Path]:
    """A checkpoint of `method` ("checkpoint") and its exports by format: "native", "s3prl", "huggingface"."""
    paths = {"checkpoint": write_checkpoint(folder / "run", method)}
    for form, output in (("native", "export"), ("s3prl", "s3prl.pt"), ("huggingface", "hf")):
        export(ExportConfig(str(paths["checkpoint"]), str(folder / output), form))
        paths[form] = folder / output
    return paths


def method_state(imported: Any) -> dict[str, Tensor]:
    """The state of a whole method from what an importer gave: encoder and heads."""
    return {f"encoder.{key}": tensor for key, tensor in imported.encoder_state.items()} | imported.head_state


def hidden_states(model: nn.Module, *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """`model(*inputs)` in eval mode, without gradients."""
    with torch.no_grad():
        return model.eval()(*inputs)


def assert_same_states(ours: nn.Module, theirs: nn.Module, *inputs: Tensor, rtol: float = 1e-4) -> None:
    """All hidden states within `rtol` of the state's largest value, and equal lengths: the two upstreams agree."""
    our_states, our_lengths = hidden_states(ours, *inputs)
    their_states, their_lengths = hidden_states(theirs, *inputs)
    assert len(our_states) == len(their_states)
    for our_length, their_length in zip(our_lengths, their_lengths, strict=True):
        assert torch.equal(our_length, their_length)
    for our_state, their_state in zip(our_states, their_states, strict=True):
        assert our_state.shape == their_state.shape
        assert (our_state - their_state).abs().max() <= rtol * their_state.abs().max()


def train_recipe(recipe: str, folder: Path, seed: int, *options: str) -> dict[str, float]:
    """Train on the embedded sample in this process, in fp32; the metrics of the last validation."""
    from pretrain.training.setup import build_trainer

    settings = [f"output_dir={folder}", f"seed={seed}", "precision=fp32", "data.workers=0"]
    settings += ["trainer.threads=1", "trainer.memory_probe=false"]
    config = run_config(compose_recipe(recipe, [*settings, *options]))
    with patch.dict(os.environ), ExitStack() as resources:
        for name in LAUNCH_VARIABLES:
            os.environ.pop(name, None)
        assert build_trainer(config, resources).fit() == 0
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if any(name.startswith("validation/") for name in line)][-1]


@atexit.register
def leave_world() -> None:
    """Leave the process group that training has joined, as pretrain/train.py does at its end."""
    if dist.is_initialized():
        dist.destroy_process_group()
