"""Key tables: parameter names in two aligned columns, applied in both directions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from pretrain.weights.interop.types import InteropError

_WILDCARDS = re.compile(r"\\\{(\w+)\\\}|\\\*")


class KeyTable:
    """Pairs (ours, theirs) of parameter-name patterns.

    In a pattern `{i}` stands for a number and a closing `*` for `weight` or `bias`; both sides of a pair use the same
    wildcards. The first pair that matches a whole key renames it.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._forward = [(_compile(ours), _template(theirs)) for ours, theirs in pairs]
        self._backward = [(_compile(theirs), _template(ours)) for ours, theirs in pairs]

    def to_theirs(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename our keys to theirs; raises InteropError that lists every key without a counterpart."""
        return _rename(state, self._forward)

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename their keys to ours; raises InteropError that lists every key without a counterpart."""
        return _rename(state, self._backward)


def _compile(pattern: str) -> re.Pattern[str]:
    def group(match: re.Match[str]) -> str:
        return rf"(?P<{match[1]}>\d+)" if match[1] else "(?P<parameter>weight|bias)"

    return re.compile(_WILDCARDS.sub(group, re.escape(pattern)))


def _template(pattern: str) -> str:
    return pattern.replace("*", "{parameter}")


def _rename(state: Mapping[str, Tensor], rows: list[tuple[re.Pattern[str], str]]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    unmatched: list[str] = []
    for key, value in state.items():
        for pattern, template in rows:
            if match := pattern.fullmatch(key):
                renamed[template.format(**match.groupdict())] = value
                break
        else:
            unmatched.append(key)
    if unmatched:
        raise InteropError(
            f"state dict: {len(unmatched)} keys have no counterpart here: {', '.join(unmatched)}; "
            "the checkpoint belongs to another model, or holds tensors that must be removed first"
        )
    if len(renamed) != len(state):
        raise InteropError("state dict: several keys name the same parameter; remove the older copy from the file")
    return renamed
