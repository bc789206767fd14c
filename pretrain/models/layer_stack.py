"""Equal layers one after the other, and what an encoder does with them: compile, checkpoint activations, cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from pretrain.method import Encoder
from pretrain.models.activation_checkpointing import call
from pretrain.models.compiled_layers import compile_in_place

E = TypeVar("E", bound=Encoder)


class LayerStack(nn.ModuleList):
    """`passes` layers in a row: each of the list once, or the only one of the list `passes` times.

    A list, so that parameters are named after the place of their layer. `checkpointing` says whether training keeps
    the inputs of the layers alone, and backward computes their activations a second time.
    """

    def __init__(self, layers: Iterable[nn.Module], passes: int | None = None) -> None:
        super().__init__(layers)
        self.passes = len(self) if passes is None else passes
        self.checkpointing = False

    def forward(self, x: Tensor, *inputs: Any, skipped: Sequence[bool] = ()) -> list[Tensor]:
        """(B, F, D) to `passes` + 1 hidden states: `x`, and what each pass makes of the one before.

        `inputs` are what every layer takes beside its frames. A pass that is True in `skipped`, which has one entry
        per pass or none at all, gives its input.
        """
        hidden_states = [x]
        for index, layer in enumerate(self._in_order()):
            if not skipped or not skipped[index]:
                x = call(layer, x, *inputs, checkpointing=self.checkpointing)
            hidden_states.append(x)
        return hidden_states

    def _in_order(self) -> Iterator[nn.Module]:
        return (self[index % len(self)] for index in range(self.passes))


class StackEncoder(Encoder):
    """An encoder with `encoder_layers` in its configuration and a stack of them in `layers`."""

    layers: LayerStack

    def compile_layers(self) -> None:
        """Compile each layer in place; parameter names stay. Meant for GPUs."""
        compile_in_place(self.layers)

    def checkpoint_activations(self) -> None:
        """Keep the input of every layer alone; backward computes the activations within a layer a second time."""
        self.layers.checkpointing = True

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
