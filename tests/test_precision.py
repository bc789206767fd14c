"""The precision that a run trains in, and the check that finds a kernel which is wrong in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_method import SmallMethod, micro_batch
from torch import Tensor, nn

from pretrain.config import ConfigError
from pretrain.method import StepOutput
from pretrain.models.kernels import grouped_conv1d
from pretrain.training.precision import BOUND, checked_precision, compare, resolve_precision
from pretrain.world import World

CPU = torch.device("cpu")
# Channels, groups, kernel. The first four are those that oneDNN's kernel for AMX gets wrong in bfloat16, then the same
# with kernels that it gets right, the published positional convolutions, and a conformer's depthwise convolution.
SHAPES = [
    *[(48, 4, 32), (96, 16, 32), (128, 16, 16), (24, 4, 128)],
    *[(48, 4, kernel) for kernel in (15, 17, 31, 33, 95)],
    *[(64, 4, 32), (256, 16, 128), (768, 16, 128), (1024, 16, 128), (64, 64, 31), (64, 64, 32)],
]


@pytest.mark.parametrize(("channels", "groups", "kernel"), SHAPES)
def test_grouped_convolutions_in_bf16_are_those_in_fp32(channels: int, groups: int, kernel: int) -> None:
    torch.manual_seed(0)
    values = [torch.randn(1, channels, 24), torch.randn(channels, channels // groups, kernel), torch.randn(channels)]
    direction = torch.randn(1, channels, 24 + 2 * (kernel // 2) - kernel + 1)

    def value_and_gradients(convolve: Any, *, bf16: bool) -> list[Tensor]:
        # Exact on the bfloat16 grid, so that rounding the inputs costs nothing.
        inputs = [tensor.bfloat16().float().requires_grad_() for tensor in values]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = convolve(*inputs, padding=kernel // 2, groups=groups)
        assert out.dtype == (torch.bfloat16 if bf16 else torch.float32)
        (out.float() * direction).sum().backward()
        return [out.detach().float(), *(tensor.grad for tensor in inputs)]

    exact = value_and_gradients(F.conv1d, bf16=False)
    rounded = value_and_gradients(grouped_conv1d, bf16=True)
    for a, b in zip(exact, rounded, strict=True):
        assert (a - b).norm() < 0.01 * a.norm()


def test_a_grouped_convolution_of_a_bf16_network_is_that_in_fp32() -> None:
    x, weight, bias = torch.randn(2, 48, 40), torch.randn(48, 12, 32), torch.randn(48)
    out = grouped_conv1d(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), 16, 4)
    exact = F.conv1d(x, weight, bias, padding=16, groups=4)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() < 0.01 * exact.norm()


class WrongInLowPrecision(nn.Linear):
    """A layer whose kernel returns noise under autocast, as oneDNN's did."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return torch.randn_like(out) if torch.is_autocast_enabled("cpu") else out


class OftenWrong(SmallMethod):
    """The small method with a wrong kernel in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2] = WrongInLowPrecision(15, 1)


def test_rounding_is_no_fault(world: World) -> None:
    precision, sentence = checked_precision(SmallMethod(), micro_batch(0, 0), "auto", "bf16", world)
    assert precision == "bf16"
    assert "no layer differs from fp32 by more than 0." in sentence


def test_a_wrong_kernel_is_named_and_auto_falls_back(world: World) -> None:
    precision, sentence = checked_precision(OftenWrong(), micro_batch(0, 0), "auto", "bf16", world)
    assert precision == "fp32"
    assert sentence.startswith("WARNING: precision=auto falls back to fp32")
    assert "net.2 is the first layer whose output differs" in sentence


def test_a_wrong_kernel_stops_a_precision_that_was_asked_for(world: World) -> None:
    with pytest.raises(ConfigError, match=r"precision: bf16 is wrong on this cpu: net\.2 is the first layer"):
        checked_precision(OftenWrong(), micro_batch(0, 0), "bf16", "bf16", world)


class WrongInTheLoss(SmallMethod):
    """The small method with a fault that no layer shows."""

    def forward(self, batch: Any) -> StepOutput:
        output = super().forward(batch)
        return output._replace(loss=output.loss * (2 if torch.is_autocast_enabled("cpu") else 1))


def test_a_wrong_loss_is_found_and_so_is_one_that_is_no_number(world: World) -> None:
    difference = compare(WrongInTheLoss(), micro_batch(0, 0), "bf16", CPU)
    assert (difference.wrong_layer, round(difference.loss, 1)) == ("the loss", 1.0)

    class Overflows(SmallMethod):
        def forward(self, batch: Any) -> StepOutput:
            output = super().forward(batch)
            return output._replace(loss=output.loss * (torch.inf if torch.is_autocast_enabled("cpu") else 1))

    assert compare(Overflows(), micro_batch(0, 0), "bf16", CPU).wrong == float("inf")


class ChoosesACode(SmallMethod):
    """A method that goes on with the codebook entry of the largest score, where many scores are nearly equal."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.codebook = nn.Linear(8, 4000), nn.Embedding(4000, 8)
        self.after = nn.Linear(8, 8)
        nn.init.uniform_(self.scores.weight, -0.001, 0.001)
        nn.init.ones_(self.scores.bias)

    def forward(self, batch: Any) -> StepOutput:
        codes = self.scores(batch.waveforms).argmax(1)
        return StepOutput(self.after(self.codebook(codes)).float().square().sum(), {})


def test_codes_that_flip_at_a_near_tie_are_no_fault() -> None:
    method, batch = ChoosesACode(), micro_batch(0, 0)
    exact = method.scores(batch.waveforms).argmax(1)
    with torch.autocast("cpu", torch.bfloat16):
        flipped = method.scores(batch.waveforms).argmax(1)
    assert not torch.equal(exact, flipped)  # a comparison of the ends alone would see other codes, and cry wolf
    difference = compare(method, batch, "bf16", CPU)
    assert difference.wrong_layer is None
    assert difference.loss < BOUND / 2


class Counting(SmallMethod):
    """A method whose forward leaves a trace in a buffer and draws random numbers."""

    def forward(self, batch: Any) -> StepOutput:
        self.seen += torch.rand(1)
        return super().forward(batch)


def test_the_check_leaves_no_trace() -> None:
    method = Counting().train()
    method.net.eval()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    random = torch.get_rng_state()
    compare(method, micro_batch(0, 0), "bf16", CPU)
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert method.training
    assert not method.net.training
    assert not any(module._forward_hooks for module in method.modules())


def test_auto_is_bf16_where_the_processor_has_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert resolve_precision("auto", CPU) == "bf16"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert resolve_precision("auto", CPU) == "fp32"
    with pytest.raises(ConfigError, match="fp16 is for GPUs"):
        resolve_precision("fp16", CPU)
