"""The precision of a run: which one `auto` means, and a check that the network computes in it what it does in float32.

One kernel of a library that is wrong on one processor turns training into noise without a word: oneDNN's bfloat16
convolution for AMX did so for some shapes (see `pretrain.models.kernels.grouped_conv1d`). The check finds such a kernel
before the first update, on any device and in any method.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.config import ConfigError
from pretrain.method import Batch, Method, StepOutput
from pretrain.world import World

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Rounding alone makes a layer's output differ by less than 1 %; a wrong kernel by 50 % and more.
BOUND = 0.1
LOSS = "the loss"


@dataclass(frozen=True)
class Difference:
    """How far a method's layers are from float32 on equal inputs, as shares of the norm of their output.

    `layer` has the largest difference, `largest`; `wrong_layer` is the first one, in the order in which they run, whose
    difference `wrong` is above `BOUND`, None where there is none. `loss` is the difference of the loss.
    """

    largest: float
    layer: str
    loss: float
    wrong: float = 0.0
    wrong_layer: str | None = None


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 where the hardware multiplies it fast: GPUs, and CPUs with AMX. Raises ConfigError."""
    on_gpu = device.type == "cuda"
    if precision == "auto":
        return "bf16" if on_gpu or torch.cpu._is_amx_tile_supported() else "fp32"
    if precision == "fp16" and not on_gpu:
        raise ConfigError("precision: fp16 is for GPUs; use bf16 or fp32 on a CPU")
    return precision


def autocast(device: torch.device, precision: str) -> Any:
    """The context in which a forward runs in `precision`; it does nothing for fp32."""
    return torch.autocast(device.type, DTYPES[precision]) if precision in DTYPES else contextlib.nullcontext()


def checked_precision(method: Method, batch: Batch, asked: str, precision: str, world: World) -> tuple[str, str]:
    """The precision to train in, and a sentence about the check; a collective call on all ranks.

    `asked` is the run's `precision` and `precision` what it resolves to; `batch` should be small. Where a layer differs
    from float32 by more than `BOUND` on any rank, `auto` falls back to fp32, and a precision that was asked for by name
    raises ConfigError.
    """
    mine = compare(method, batch.to(world.device), precision, world.device)
    found: list[Any] = [mine] * world.size
    if world.size > 1:
        dist.all_gather_object(found, mine)
    worst = max(found, key=lambda difference: (difference.wrong_layer is not None, difference.largest))
    if worst.wrong_layer is None:
        return precision, (
            f"precision: {precision}; on equal inputs no layer differs from fp32 by more than {worst.largest:.2%} "
            f"({worst.layer}), the loss by {worst.loss:.2%}"
        )
    sentence = (
        f"{precision} is wrong on this {world.device.type}: {worst.wrong_layer} is the first layer whose output "
        f"differs from fp32, by {worst.wrong:.0%} of its norm on equal inputs, where rounding explains 1 %"
    )
    if asked == "auto":
        return "fp32", f"WARNING: precision=auto falls back to fp32, since {sentence}"
    raise ConfigError(
        f"precision: {sentence}; take precision=fp32, or trainer.precision_check=false to train all the same"
    )


@torch.no_grad()
def compare(method: Method, batch: Batch, precision: str, device: torch.device) -> Difference:
    """Run `method` on `batch` in float32 and in `precision`, and compare the outputs of all of its modules.

    Every output is rounded to the lower precision before the next module sees it, in both runs, and the second run goes
    on with the outputs of the first. So all modules get equal inputs, an error is found where it arises, and a code
    that is chosen by a maximum does not flip at a near tie. The method is in eval mode, and is left as it was.
    """
    names = {module: name for name, module in method.named_modules()}
    recorded: dict[nn.Module, list[Any]] = {module: [] for module in names}
    differences: list[tuple[str, float]] = []

    def record(module: nn.Module, inputs: Any, output: Any) -> Any:
        rounded = _map(output, lambda tensor: tensor.to(DTYPES[precision]).to(tensor.dtype))
        recorded[module].append((output, rounded))
        # A copy, since the caller may work in place.
        return _map(rounded, torch.clone)

    def replay(module: nn.Module, inputs: Any, output: Any) -> Any:
        exact, rounded = recorded[module].pop(0)
        name = LOSS if module is method else names[module]
        differences.append((name, _distance(exact, output)))
        return output if module is method else _like(rounded, output)

    with left_untouched(method), contextlib.ExitStack() as stack:
        method.eval()
        for hook, context in ((record, contextlib.nullcontext()), (replay, autocast(device, precision))):
            handles = [module.register_forward_hook(hook) for module in names]
            for handle in handles:
                stack.callback(handle.remove)
            torch.manual_seed(0)
            with context:
                method(batch)
            for handle in handles:
                handle.remove()
    layers = [difference for difference in differences if difference[0] != LOSS] or differences
    layer, largest = max(layers, key=lambda pair: pair[1])
    wrong_layer, wrong = next((pair for pair in differences if not pair[1] <= BOUND), (None, 0.0))
    return Difference(largest, layer, dict(differences)[LOSS], wrong, wrong_layer)


@contextlib.contextmanager
def left_untouched(method: nn.Module) -> Iterator[None]:
    """A trial inside leaves no trace: buffers, gradients, modes of the modules and random state come back."""
    buffers = {name: value.clone() for name, value in method.named_buffers()}
    modes = {module: module.training for module in method.modules()}
    # Of the devices in use alone: asking the others for their state would take memory on all cards of the machine.
    devices = {p.device for p in method.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            method.zero_grad(set_to_none=True)
            with torch.no_grad():
                for name, value in method.named_buffers():
                    value.copy_(buffers[name])
            for module, training in modes.items():
                module.training = training


def _distance(exact: Any, other: Any) -> float:
    """The largest relative difference of the float tensors in two outputs of one module; of a step, that of its loss.

    Places where the exact output is infinite, as hidden scores are, count where the other one is finite.
    """
    if isinstance(exact, StepOutput):
        exact, other = ((step.loss, step.mean, step.other_losses) for step in (exact, other))
    worst = 0.0
    for a, b in zip(_floats(exact), _floats(other), strict=True):
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())
        difference = torch.where(same, 0.0, a - b).norm()
        norm = torch.where(a.isfinite(), a, 0.0).norm()
        share = float(difference / norm) if difference > 0 or difference.isnan() else 0.0
        worst = max(worst, float("inf") if share != share else share)
    return worst


def _floats(output: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map(output, keep)
    return found


def _like(rounded: Any, output: Any) -> Any:
    """The float tensors of `rounded` in the data types of `output`, in new memory."""
    dtypes = iter([tensor.dtype for tensor in _floats(output)])
    return _map(rounded, lambda tensor: tensor.to(next(dtypes), copy=True))


def _map(output: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`output` with `function` applied to every float tensor in it, in lists, tuples, mappings and dataclasses too."""
    if isinstance(output, Tensor):
        return function(output) if output.is_floating_point() and output.numel() else output
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(_map(part, function) for part in output))
    if isinstance(output, list | tuple):
        return type(output)(_map(part, function) for part in output)
    if isinstance(output, dict):
        return {key: _map(value, function) for key, value in output.items()}
    if is_dataclass(output) and not isinstance(output, type):
        return replace(output, **{f.name: _map(getattr(output, f.name), function) for f in fields(output) if f.init})
    return output
