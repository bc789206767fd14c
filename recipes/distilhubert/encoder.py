"""DistilHuBERT's student, and how it starts from its teacher.

Source: `s3prl/upstream/distiller/model.py` and `s3prl/pretrain/distiller/pretrain_expert.py` of s3prl.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pretrain.config import ConfigError
from pretrain.models.speech_config import SpeechEncoderConfig
from pretrain.models.speech_encoder import SpeechEncoder

CONVOLUTIONS = ("feature_extractor", "post_extract_proj")


class StudentEncoder(SpeechEncoder):
    """The shared speech encoder without a layer norm before its projection, and without a mask embedding.

    `is_loaded` says whether weights have come from a file; a student without them starts from its teacher.
    """

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__(config)
        self.layer_norm = nn.Identity()  # type: ignore[assignment]
        del self.mask_emb  # nothing is masked, and a parameter without a gradient would be a burden under ZeRO
        self.is_loaded = False
        self.register_load_state_dict_pre_hook(_note_loading)

    @property
    def context_parts(self) -> tuple[str, ...]:
        """What of the Transformer the teacher gives; not the layer norm behind the positions, as in the source."""
        return ("encoder.pos_conv", *(f"encoder.layers.{index}" for index in range(self.config.encoder_layers)))


def check_parts(student: StudentEncoder, teacher: nn.Module, parts: tuple[str, ...], field: str) -> None:
    """Raise ConfigError, naming the first tensor, where the teacher has not what the student is to start from."""
    for part in parts:
        ours, theirs = _tensors(student, part), _tensors(teacher, part)
        for name in {**ours, **theirs}:
            if _shape(ours, name) != _shape(theirs, name):
                raise ConfigError(
                    f"{field}: {part}.{name}: {_shape(theirs, name)} in the teacher, {_shape(ours, name)} in the "
                    f"student, which therefore cannot start from it; set method.encoder to the teacher's sizes, or "
                    f"{field}=false"
                )


def copy_parts(student: StudentEncoder, teacher: nn.Module, parts: tuple[str, ...]) -> None:
    """Give the student the teacher's weights of `parts`, which `check_parts` has seen."""
    for part in parts:
        student.get_submodule(part).load_state_dict(teacher.get_submodule(part).state_dict())


def _tensors(network: nn.Module, part: str) -> Mapping[str, Tensor]:
    """The tensors of a sub-module, none where there is no such one."""
    try:
        return network.get_submodule(part).state_dict()
    except AttributeError:
        return {}


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "absent"


def _note_loading(module: StudentEncoder, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    module.is_loaded |= any(key.startswith(prefix) for key in state_dict)
