"""DeepSpeed around one method: build, backward, step, and the optimiser's state by parameter name."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from pretrain.config import ConfigError, OptimizerConfig
from pretrain.method import Batch, Method, Progress, StepOutput
from pretrain.training import deepspeed_quirks
from pretrain.training.adam import SkippableAdam
from pretrain.training.deepspeed_quirks import deepspeed
from pretrain.training.precision import DTYPES

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine:
    """DeepSpeed around one method: ZeRO, gradient clipping, mixed precision, the state of the optimiser."""

    def __init__(
        self,
        method: Method,
        optimizer: OptimizerConfig,
        deepspeed_config: dict[str, Any],
        precision: str,
        device: torch.device,
    ) -> None:
        self.method = method
        method.to(device)
        if precision in DTYPES:
            # Inside the module, because DeepSpeed switches off an autocast that surrounds its forward.
            method.forward = torch.autocast(device.type, DTYPES[precision])(method.forward)  # type: ignore[method-assign]
        groups = method.parameter_groups()
        # Functions stay here: DeepSpeed copies what the optimiser's groups hold.
        self._active = [group.pop("active", None) for group in groups]
        self._adam = SkippableAdam(groups, device, optimizer)
        self._silence_inactive_groups()
        settings = _settings(deepspeed_config, optimizer.clip_norm)
        self._engine = deepspeed.initialize(model=method, optimizer=self._adam, config=settings)[0]
        self.zero_stage = self._engine.zero_optimization_stage()
        self.grad_norm = float("nan")  # of the last update, before clipping
        if precision == "fp16":
            self._scale_losses()
        if any(self._active):
            # A group that is inactive at first must have moments to save all the same.
            self._make_moments()
            self._set_group_steps([0.0] * len(groups))

    def _silence_inactive_groups(self) -> None:
        """Gradients of an inactive group are zero, so that they count nothing in the norm that clips the others."""
        for group, active in zip(self._adam.param_groups, self._active, strict=True):
            if active is not None:
                for parameter in group["params"]:
                    parameter.register_hook(partial(_unless_inactive, group))

    def begin_update(self, progress: Progress) -> None:
        """Settle which groups are trained at this update; called before its first forward."""
        for group, active in zip(self._adam.param_groups, self._active, strict=True):
            group["is_active"] = active is None or bool(active(progress))

    def _scale_losses(self) -> None:
        """fp16 autocast over fp32 weights: DeepSpeed sees fp32 and would not scale by itself."""
        if self.zero_stage == 0:
            raise ConfigError("precision: fp16 needs deepspeed=zero1 or higher, where DeepSpeed can scale the loss")
        deepspeed_quirks.scale_losses(self._engine.optimizer)

    def forward(self, batch: Batch) -> StepOutput:
        """The method's forward, with DeepSpeed's hooks around it."""
        output = self._engine(batch)
        if not isinstance(output, StepOutput) or output.loss.dim() > 0:
            name = type(self.method).__name__
            raise TypeError(f"{name}.forward: returned {output!r}; return a StepOutput whose loss is one number")
        return output

    def figures(self, batch: Batch) -> dict[str, Any]:
        """The method's pictures of one batch; a collective call, since ZeRO 3 has to gather the weights."""
        with deepspeed.zero.GatheredParameters(list(self.method.parameters()), enabled=self.zero_stage == 3):
            return self.method.figures(batch)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient of one micro-batch; `last` marks the final one of the update."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float, skip: Tensor) -> bool:
        """Clip and update at rate `lr`; returns whether the update was applied.

        `skip` is a () float tensor, nonzero where there is nothing to learn from. Reading the answer is the one
        moment of an update at which the host waits for the device; DeepSpeed waits there too, for the gradient norm.
        """
        for group in self._adam.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._adam.begin(skip)
        if self.zero_stage == 0:
            grads = [p.grad for _, p in self._trained() if p.grad is not None]
            self.grad_norm = float(torch.nn.utils.get_total_norm(grads))
        self._engine.step()
        if self.zero_stage:
            self.grad_norm = float(self._engine.get_global_grad_norm())
        if self.zero_stage == 3:
            deepspeed_quirks.forget_gradients(self._engine.optimizer)
        return self._engine.was_step_applied() and not bool(self._adam.found_inf)

    @property
    def loss_scale(self) -> float:
        """The present factor on the loss; 1 except for fp16."""
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0))

    def weights(self, keep: bool) -> dict[str, Tensor]:
        """Every parameter and buffer of the method, whole, on the CPU; a collective call, empty unless `keep`."""
        state = {}
        for name, value in self.method.state_dict(keep_vars=True).items():
            with _gathered(value, self.zero_stage):
                if keep:
                    state[name] = value.detach().to("cpu", copy=True).contiguous()
        return state

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """(name/moment, whole fp32 tensor) of every trained parameter; a collective call on all ranks."""
        self._link_moments()
        for name, parameter in self._trained():
            for moment in MOMENTS:
                yield f"{name}/{moment}", self._moment(parameter, moment).cpu().contiguous()

    def scalars(self) -> dict[str, Any]:
        """What resuming needs beside tensors: the steps of each of the optimiser's groups and the loss scale."""
        return {"adam_steps": self._group_steps(), "loss_scale": self.loss_scale}

    def load_optimizer_state(self, read: Any, scalars: dict[str, Any]) -> None:
        """Put back what `optimizer_state` gave, at any world size and ZeRO stage; `read(key)` returns a tensor."""
        self._make_moments()
        self._link_moments()
        for name, parameter in self._trained():
            for moment in MOMENTS:
                self._set_moment(parameter, moment, read(f"{name}/{moment}"))
        steps = scalars["adam_steps"]
        self._set_group_steps(steps * len(self._active) if len(steps) == 1 else steps)
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if scaler is not None and scaler.dynamic:
            scaler.cur_scale = scalars["loss_scale"]

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.method.named_parameters() if p.requires_grad]

    def _make_moments(self) -> None:
        """Let the optimiser allocate its state, zeros, by a step at rate zero, which moves nothing."""
        decays = [group["weight_decay"] for group in self._adam.param_groups]
        for group in self._adam.param_groups:
            group["weight_decay"] = 0.0  # Adam's L2 term is a part of the gradient, and would be in the moments
        parameters = [parameter for _, parameter in self._trained()]
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.zero_stage == 3):
            self.backward(cast(Tensor, sum(p.sum() for p in parameters) * 0.0), last=True)
        self.step(0.0, torch.zeros_like(self._adam.found_inf))
        for group, decay in zip(self._adam.param_groups, decays, strict=True):
            group["weight_decay"] = decay

    def _link_moments(self) -> None:
        """Let DeepSpeed find every parameter's moments."""
        if self.zero_stage in (1, 2) and self._adam.state:
            deepspeed_quirks.link_moments(self._engine.optimizer)

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        if not self._adam.state:  # no update was applied yet
            return torch.zeros(getattr(parameter, "ds_shape", parameter.shape))
        if self.zero_stage:
            return deepspeed_quirks.whole_moment(parameter, moment)
        return self._adam.state[parameter][moment]

    def _set_moment(self, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
        value = value.to(self._adam.found_inf.device)
        if self.zero_stage:
            deepspeed_quirks.set_whole_moment(parameter, moment, value, self.zero_stage)
        else:
            self._adam.state[parameter][moment].copy_(value)

    def _group_steps(self) -> list[float]:
        """How often each parameter group was stepped: groups that were inactive for a while have fallen behind."""
        counts = [[float(state["step"]) for state in states] for states in self._states_by_group()]
        return [max(count, default=0.0) for count in counts]

    def _set_group_steps(self, steps: list[float]) -> None:
        for count, states in zip(steps, self._states_by_group(), strict=True):
            for state in states:
                state["step"].fill_(count)

    def _states_by_group(self) -> list[list[dict[str, Tensor]]]:
        """The optimiser's states that exist so far, by parameter group."""
        if self.zero_stage == 3:
            by_group = deepspeed_quirks.parts_by_group(self._engine.optimizer, len(self._adam.param_groups))
        else:
            by_group = [group["params"] for group in self._adam.param_groups]
        states = self._adam.state
        return [[states[p] for p in parts if p in states and "step" in states[p]] for parts in by_group]


def _unless_inactive(group: dict[str, Any], grad: Tensor) -> Tensor:
    return grad if group["is_active"] else torch.zeros_like(grad)


def _settings(deepspeed_config: dict[str, Any], clip_norm: float) -> dict[str, Any]:
    """DeepSpeed's configuration; what the recipe or this file decides cannot be set in conf/deepspeed."""
    owned = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    refused = sorted({*owned, "train_batch_size", "fp16", "bf16", "optimizer", "scheduler"} & set(deepspeed_config))
    if refused:
        raise ConfigError(
            f"deepspeed.{refused[0]}: set by the recipe; use batch, precision, optimizer and schedule instead"
        )
    return {**deepspeed_config, **owned}


def _gathered(value: Tensor, zero_stage: int) -> Any:
    """ZeRO 3 holds parameters in parts; buffers are whole at every stage."""
    partitioned = zero_stage == 3 and isinstance(value, nn.Parameter)
    return deepspeed.zero.GatheredParameters([value], enabled=partitioned)
