"""torch's fused Adam and AdamW, with updates that leave everything alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.config import OptimizerConfig


class SkippableAdam(torch.optim.Adam):
    """Fused Adam or AdamW that leaves weights and moments alone where a gradient is not finite or `begin` was told so.

    The decision stays on the device: torch's fused kernel reads it as `found_inf`, as it does for gradient scalers.
    Groups whose entry `is_active` is False are passed over.
    """

    def __init__(self, groups: list[dict[str, Any]], device: torch.device, config: OptimizerConfig) -> None:
        super().__init__(
            [{"lr_scale": 1.0, "is_active": True, **group} for group in groups],
            lr=0.0,  # set before every step from the schedule
            betas=(config.betas[0], config.betas[1]),
            eps=config.eps,
            weight_decay=config.weight_decay,
            decoupled_weight_decay=config.name == "adamw",
            fused=True,
        )
        self.found_inf = torch.zeros((), device=device)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # called without a closure, so no overloads
        """One update of every parameter that has a gradient, in the active groups."""
        for group in self.param_groups:
            if not group["is_active"]:
                for parameter in group["params"]:
                    parameter.grad = None
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        total = torch.stack(torch._foreach_norm(grads)).sum() if grads else torch.zeros_like(self.found_inf)
        # ZeRO 3 makes a step for each part of the groups: what was found in one of them holds for those after it.
        self.found_inf = torch.maximum(self.found_inf, (~torch.isfinite(total)).float())
        super().step(closure)

    def begin(self, skip: Tensor) -> None:
        """Called before the steps of one update; `skip` is a () float tensor, nonzero where nothing may change."""
        self.found_inf = skip
