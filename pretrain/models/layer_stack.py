"""Equal layers one after the other, and what an encoder does with such a stack: compile, recompute, cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from torch import Tensor, nn

from pretrain.method import Encoder
from pretrain.models.activation_checkpointing import call
from pretrain.models.compiled_layers import compile_in_place

E = TypeVar("E", bound=Encoder)


class LayerStack(nn.ModuleList):
    """`passes` layers in a row: each of the list once, or the only one of the list `passes` times.

    A list, so that parameters are named after the place of their layer. `recompute` says whether the layers'
    activations are computed twice instead of kept.
    """

    def __init__(self, layers: Iterable[nn.Module], passes: int | None = None) -> None:
        super().__init__(layers)
        self.passes = len(self) if passes is None else passes
        self.recompute = False

    def forward(self, x: Tensor, valid: Tensor | None) -> list[Tensor]:
        """(B, F, D) to `passes` + 1 hidden states: `x`, and what each pass makes of the one before."""
        hidden_states = [x]
        for layer in self._in_order():
            x = call(layer, x, valid, recompute=self.recompute)
            hidden_states.append(x)
        return hidden_states

    def _in_order(self) -> Iterator[nn.Module]:
        return (self[index % len(self)] for index in range(self.passes))


class StackEncoder(Encoder):
    """An encoder with `encoder_layers` in its configuration and a stack of them in `layers`."""

    layers: LayerStack

    def compile_regions(self) -> None:
        """Compile each layer in place; parameter names stay. Meant for GPUs."""
        compile_in_place(self.layers)

    def checkpoint_activations(self) -> None:
        """Keep the input of every layer alone, and compute the rest again in backward."""
        self.layers.recompute = True

    def truncated(self: E, layer: int) -> E:
        """A copy without the layers above hidden state `layer`, whose hidden states up to `layer` are this one's."""
        return with_layers(self, layer)


def with_layers(encoder: E, count: int) -> E:
    """A copy of `encoder` that has only its first `count` layers, on the same device and in the same mode."""
    copy = type(encoder).from_config(encoder.to_config() | {"encoder_layers": count})
    kept = copy.state_dict().keys()
    copy.load_state_dict({name: value for name, value in encoder.state_dict().items() if name in kept})
    device = next(encoder.parameters()).device
    return copy.to(device).train(encoder.training)
