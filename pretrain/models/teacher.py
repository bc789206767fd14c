"""Teachers: networks whose outputs a method trains against, and which no gradient reaches.

A method holds its teacher outside `encoder`, so that it is in every checkpoint and in no export. One that follows its
student as a moving average (data2vec, BYOL) is made, started and moved like this:

    self.teacher = Teacher.copy_of(self.encoder)         # in __init__; any part of the encoder will do
    self.teacher.start_at(self.encoder)                  # in begin, since `init_from` comes after __init__
    hidden_states, _ = self.teacher(batch.waveforms, batch.lengths_if_padded)  # in forward
    decay = linear_ramp(progress.update, 0.999, 0.9999, 30_000)
    self.teacher.update(self.encoder, decay)             # in after_step

and one that stays as it was trained (DistilHuBERT), with a field `teacher: TeacherConfig` in the configuration:

    replace(config, teacher=complete_teacher(config.teacher, ...))  # in complete: its shape, if the weights tell it
    self.teacher = frozen_teacher(config.teacher)        # in __init__; reads no file
    load_teacher(self.teacher, self.config.teacher)      # in begin

Its weights are parameters without a gradient, not buffers. ZeRO 3 then shares them out over the ranks as it does those
of the student, and `update` works on each rank's share: parameters of one shape are divided alike, so nothing has to
be gathered. Buffers would be whole on every rank, and each update would gather the whole student.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.method import Encoder
from pretrain.registry import load_method
from pretrain.weights.read import load_matching, read_weights

_NETWORK = "network."


class Teacher(nn.Module):
    """`network` in float32, in evaluation mode whatever its parent is put in, and without gradients.

    In a state dict its tensors have the names that `network` gives them, without a prefix of their own.
    """

    def __init__(self, network: nn.Module) -> None:
        """Takes `network` over: what still trains must be copied first, which `copy_of` does."""
        super().__init__()
        self.network = network.float().requires_grad_(False)
        self.is_loaded = False  # whether a checkpoint has brought it weights of its own
        self.register_load_state_dict_pre_hook(_add_prefix)
        self.train()

    @classmethod
    def copy_of(cls, student: nn.Module) -> Teacher:
        """A teacher that starts where `student` is."""
        return cls(copy.deepcopy(student))

    def train(self, mode: bool = True) -> Teacher:
        """Evaluation mode, whatever `mode` is: no dropout, and running statistics as they are."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: Any, **options: Any) -> Any:
        """What `network` makes of the same arguments."""
        return self.network(*args, **options)

    def start_at(self, student: nn.Module) -> None:
        """Become the student, unless `init_from` has brought a teacher with it."""
        if not self.is_loaded:
            self.update(student, decay=0.0)

    @torch.no_grad()
    def update(self, student: nn.Module, decay: float, copied: tuple[str, ...] = ()) -> None:
        """Each parameter becomes decay * its own value + (1 - decay) * the student's; buffers become the student's.

        So do parameters whose names begin with one of `copied`. For `after_step`, where the student has the weights of
        this update; all ranks call it. It communicates nothing, at any ZeRO stage. `student` is what the teacher was
        copied from. Raises UserError with the names that only one of the two has, or has in another shape.
        """
        own, theirs = self.network.state_dict(keep_vars=True), student.state_dict(keep_vars=True)
        alone = sorted(n for n in own.keys() | theirs.keys() if _shape(own.get(n)) != _shape(theirs.get(n)))
        if alone:
            raise UserError(
                f"teacher: {', '.join(alone)}: not in teacher and student alike; give Teacher.update the module that "
                "the teacher was copied from"
            )
        # By identity, because a tensor that two layers share has two names and must move once.
        pairs: list[tuple[str, Any, Any]] = list(
            {id(mine): (name, mine, theirs[name]) for name, mine in own.items()}.values()
        )
        parameters = [pair for pair in pairs if isinstance(pair[1], nn.Parameter)]
        for _, mine, other in pairs:
            if not isinstance(mine, nn.Parameter):
                mine.copy_(other)
        for share, chosen in (
            (decay, [pair for pair in parameters if not pair[0].startswith(copied)]),
            (0.0, [pair for pair in parameters if pair[0].startswith(copied)]),
        ):
            if chosen:
                averages = [_share(average) for _, average, _ in chosen]
                torch._foreach_lerp_(averages, [_share(weight) for _, _, weight in chosen], 1.0 - share)
        # ZeRO 3 keeps small parameters whole between uses. These have changed: the next forward gathers them again.
        divided = [parameter for _, parameter, _ in parameters if hasattr(parameter, "ds_tensor")]
        if divided:
            divided[0].partition(divided)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """That of `network`."""
        return self.network.state_dict(*args, **options)


@dataclass
class TeacherConfig:
    """A frozen teacher: the encoder of `method` with the plain configuration `encoder`, as in an export's config.json.

    `weights` is what `read_weights` reads, once, where a run starts; null leaves the weights that the seed draws, which
    know nothing of speech and are for trying things alone. What is built follows from the configuration alone, so dry
    runs, exports and runs that resume do without that file. `encoder` null takes the configuration in `weights`, by
    `complete_teacher`.
    """

    method: str
    encoder: dict[str, Any] | None
    weights: str | None


def complete_teacher(config: TeacherConfig, earlier: Mapping[str, Any] | None = None) -> TeacherConfig:
    """`config` with an `encoder`: its own, that of the run which is resumed (`earlier`), or the one in `weights`.

    For `Method.complete`. Raises UserError where none of them says, and InteropError as `read_weights` does.
    """
    if config.encoder is not None:
        return config
    if earlier and earlier.get("encoder") is not None:
        return replace(config, encoder=dict(earlier["encoder"]))
    if config.weights is None:
        raise UserError("method.teacher.encoder: missing; state the teacher's encoder, or its weights")
    with torch.device("meta"):
        # Through the class, so that weights from before a field existed get its default.
        encoder = read_weights(config.weights, config.method).build_encoder().to_config()
    return replace(config, encoder=encoder)


def frozen_teacher(config: TeacherConfig) -> Teacher:
    """The teacher that `config` describes, with fresh weights: `load_teacher` or a checkpoint brings the trained."""
    if config.encoder is None:
        raise UserError("method.teacher.encoder: missing; complete_teacher finds it in the weights")
    return Teacher(load_method(config.method).Encoder.from_config(config.encoder))


def load_teacher(teacher: Teacher, config: TeacherConfig, field: str = "method.teacher") -> None:
    """Load the weights that `config` names, if any. `field` is where `config` stands among the run's options.

    Raises InteropError where they cannot be read, are of another method, or of an encoder that differs from
    `config.encoder` in more than options on which no tensor depends, such as dropout.
    """
    if config.weights is not None:
        load_matching(cast(Encoder, teacher.network), read_weights(config.weights, config.method), f"{field}.encoder")


def linear_ramp(update: int, start: float, end: float, updates: int) -> float:
    """From `start` at update 0 in a straight line to `end` at update `updates`, and `end` from there on.

    With `Progress.update` in `after_step` this is the decay of data2vec (arXiv 2202.03555, section 3.3; fairseq's
    `get_annealed_rate`).
    """
    return end if update >= updates else start + (end - start) * update / updates


def _add_prefix(module: Teacher, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Give the tensors of a teacher the names under which torch looks for those of its only child."""
    found = [key for key in state_dict if key.startswith(prefix)]
    module.is_loaded |= bool(found)
    for key in found:
        state_dict[f"{prefix}{_NETWORK}{key.removeprefix(prefix)}"] = state_dict.pop(key)


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    """The shape of a whole tensor; one that ZeRO 3 has divided has none of its own."""
    return None if tensor is None else tuple(getattr(tensor, "ds_shape", tensor.shape))


def _share(parameter: Tensor) -> Tensor:
    """What this rank owns of a parameter: all of it, or under ZeRO 3 its flat share."""
    return getattr(parameter, "ds_tensor", parameter)
