"""What one training step of a method holds in memory, found by running it on tensors that have shapes and no numbers.

Nothing here knows a method: every storage that forward and backward make is counted when it is made and when it is
freed, so activation checkpointing, autocast's copies of the weights and working space are in it as they occur.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.autograd import Variable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.config import ConfigError
from pretrain.method import Batch, Method

# Functions that CUDA's autocast computes in float32 and the CPU's does not; those that methods use.
FP32_ON_GPUS = {
    *("layer_norm", "group_norm", "softmax", "log_softmax", "cross_entropy", "nll_loss", "l1_loss", "smooth_l1_loss"),
    *("cosine_similarity", "norm", "pow", "exp", "log", "rsqrt", "softplus", "cumsum", "cumprod", "sum", "prod"),
}


@dataclass(frozen=True)
class Footprint:
    """Numbers of parameters, and bytes of one forward and backward beside weights, gradients and the batch.

    `saved` is what forward keeps for backward; `peak` the most that is held at one moment, `saved` included; `largest`
    the largest single tensor made.
    """

    encoder_parameters: int
    method_parameters: int
    trained_parameters: int
    buffer_bytes: int
    saved: int
    peak: int
    largest: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that operations make, until it is freed; `known` tensors do not count.

    Works on real and on fake tensors. What a kernel takes and returns within one operation is not seen.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._seen: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen[key] = weakref.ref(storage, lambda _: self._free(key, size))
            self.live += size
            self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)

    def _free(self, key: int, size: int) -> None:
        del self._seen[key]
        self.live -= size


class PlannedKernels(TorchFunctionMode):
    """Lets fake tensors go where real ones would: through CTC, and `on_gpu` the ways of a GPU, where none is at hand.

    Fake CUDA tensors would be simpler, but torch's autograd refuses them without a driver. What differs is what a GPU
    keeps for backward: kernels chosen by `is_cpu`, fused attention and dropout, and autocast's list of functions in
    float32. Recurrent layers are planned as on CPUs.
    """

    def __init__(self, on_gpu: bool) -> None:
        super().__init__()
        self.on_gpu = on_gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.ctc_loss:
            return PlannedCtc.apply(*args[:2])
        if not self.on_gpu:
            return func(*args, **kwargs)
        if func == Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return False
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        if func is F.dropout:
            return _fused_dropout(*args, **kwargs)
        if torch.is_autocast_enabled("cpu") and getattr(func, "__name__", "") in FP32_ON_GPUS:
            args = tuple(_as_float32(value) for value in args)
        return func(*args, **kwargs)


class PlannedCtc(torch.autograd.Function):
    """What CTC of (T, B, C) `log_probs` keeps, whose table of paths has a size that depends on the targets' lengths.

    Targets in one row are taken to be of equal lengths.
    """

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, targets: Tensor) -> Tensor:
        time, batch, _ = log_probs.shape
        symbols = targets.shape[1] if targets.dim() == 2 else -(-len(targets) // batch)
        ctx.save_for_backward(log_probs, log_probs.new_empty(batch, time, 2 * symbols + 1))
        return log_probs.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        log_probs, paths = ctx.saved_tensors
        torch.empty_like(paths)
        return torch.empty_like(log_probs), None


def measure(
    build: Callable[[], Method], batch: Batch, *, dtype: torch.dtype | None, on_gpu: bool, checkpoint_activations: bool
) -> Footprint:
    """The footprint of one training step of `build()` on `batch`; neither takes memory.

    `dtype` is autocast's, None for float32; `checkpoint_activations` switches activation checkpointing on. Raises
    ConfigError, naming the operation, where the step needs numbers that only a real run has.
    """
    with ExitStack() as stack:
        with torch.device("meta"):
            method = build().train()
        fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(PlannedKernels(on_gpu))
        stack.enter_context(_named_operation())
        _to_fake(method)
        if checkpoint_activations:
            method.encoder.checkpoint_activations()
        extras: dict[str, Tensor] = {name: fake.from_tensor(value) for name, value in batch.extras.items()}
        waveforms, lengths = fake.from_tensor(batch.waveforms), fake.from_tensor(batch.lengths)
        batch = replace(batch, waveforms=waveforms, lengths=lengths, extras=extras)
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        saved, live = _step(method, batch, dtype)
    parameters = list(method.parameters())
    return Footprint(
        encoder_parameters=sum(p.numel() for p in method.encoder.parameters()),
        method_parameters=sum(p.numel() for p in parameters),
        trained_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        buffer_bytes=sum(buffer.nbytes for buffer in method.buffers()),
        saved=saved,
        peak=live.peak,
        largest=live.largest,
    )


def _to_fake(method: Method) -> None:
    """Put fake tensors on the CPU in the place of all parameters and buffers; what is shared stays shared."""
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in list(method.modules()):
        for name, old in [*module._parameters.items(), *module._buffers.items()]:
            if old is None:
                continue
            if id(old) not in made:
                new = torch.empty_like(old, device="cpu")
                if isinstance(old, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=old.requires_grad)
                made[id(old)] = (old, new)
            setattr(module, name, made[id(old)][1])


def _step(method: Method, batch: Batch, dtype: torch.dtype | None) -> tuple[int, LiveBytes]:
    """Forward and backward: bytes kept between them, and the count over both."""
    known = [*method.parameters(), *(p.grad for p in method.parameters() if p.grad is not None), *method.buffers()]
    known += [batch.waveforms, batch.lengths, *batch.extras.values()]
    counted = {tensor.untyped_storage()._cdata for tensor in known}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in counted:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with LiveBytes(known) as live:
        with (
            torch.autocast("cpu", dtype, enabled=dtype is not None),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            loss = method(batch).total(batch)
        kept = sum(saved.values())
        # What `loss.backward()` ends in; that itself would set PlannedKernels aside, which recomputation needs.
        one = torch.ones_like(loss)
        Variable._execution_engine.run_backward((loss,), (one,), False, False, (), accumulate_grad=True)
    return kept, live


@contextmanager
def _named_operation() -> Iterator[None]:
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        operation = str(error.func)
    except UnsupportedFakeTensorException as error:
        operation = error.reason
    else:
        return
    raise ConfigError(
        f"trainer.dry_run: the method's step cannot be planned, because {operation} needs numbers, not only shapes; "
        "compute it in the collator, or try the run itself: its memory probe says in the first minute what it takes"
    )


def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **options: Any
) -> Tensor:
    """What `F.scaled_dot_product_attention` runs on a GPU: flash attention in half precision without a mask, and the
    memory-efficient kernel otherwise. Neither keeps the scores.
    """
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (q, k, v))
    causal, scale = options.get("is_causal", False), options.get("scale")
    if attn_mask is None and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, causal, False, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, True, dropout_p, causal, scale=scale
    )[0]


def _fused_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """A GPU keeps one byte per element."""
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def _as_float32(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value
