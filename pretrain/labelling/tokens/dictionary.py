"""The dictionary of a token directory: which combinations of codes are tokens, and how fairseq writes them.

Letters: G groups of codes, V entries per group, N combinations that the training split holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from pretrain.data.labels import LabelError
from pretrain.files import open_new

UNKNOWN_CLASS = 0  # of the labels in a token directory; the dictionary's lines are classes 1 to N
FILE = "dict.txt"
REMEDY = "make the tokens again with tools/make_tokens.py"


def code_numbers(codes: Tensor, entries: int) -> Tensor:
    """(..., G) codes to (...) int64 numbers: the digits of base `entries`, the first group leading."""
    numbers = codes[..., 0]
    for group in range(1, codes.shape[-1]):
        numbers = numbers * entries + codes[..., group]
    return numbers


def code_symbols(numbers: np.ndarray, groups: int, entries: int) -> list[str]:
    """(N,) numbers as fairseq writes them: "i-j", the codes of the groups."""
    digits = [numbers // entries**place % entries for place in reversed(range(groups))]
    return ["-".join(map(str, codes)) for codes in zip(*(row.tolist() for row in digits), strict=True)]


@dataclass(frozen=True)
class TokenDictionary:
    """`numbers` (N,) int64 of the combinations, most frequent first, and their `counts` (N,) in the training split."""

    groups: int
    entries: int
    numbers: np.ndarray
    counts: np.ndarray

    @classmethod
    def from_counts(cls, counts: np.ndarray, groups: int, entries: int) -> TokenDictionary:
        """Of (V ** G,) counts; ties in the order of the symbols as text, as fairseq's `Dictionary.finalize` does it."""
        seen = np.flatnonzero(counts)
        order = np.lexsort((np.array(code_symbols(seen, groups, entries)), -counts[seen]))
        return cls(groups, entries, seen[order], counts[seen][order])

    @classmethod
    def read(cls, directory: Path, groups: int, entries: int) -> TokenDictionary:
        """Read dict.txt of a token directory. Raises LabelError for a line that is no combination of these codes."""
        path = directory / FILE
        if not path.is_file():
            raise LabelError(f"{path}: missing, so {directory} holds no tokens; {REMEDY} and give its output")
        numbers, counts = [], []
        for line, text in enumerate(path.read_text().splitlines(), start=1):
            try:
                symbol, count = text.split()
                codes = [int(code) for code in symbol.split("-")]
                counts.append(int(count))
            except ValueError:
                raise LabelError(f"{path}: line {line}: '{text}' is not 'i-j count'; {REMEDY}") from None
            if len(codes) != groups or not all(0 <= code < entries for code in codes):
                raise LabelError(f"{path}: line {line}: '{symbol}' is not {groups} codes below {entries}; {REMEDY}")
            numbers.append(sum(code * entries**place for place, code in enumerate(reversed(codes))))
        return cls(groups, entries, np.array(numbers, dtype=np.int64), np.array(counts, dtype=np.int64))

    @property
    def num_classes(self) -> int:
        """N and the unknown class."""
        return len(self.numbers) + 1

    def class_of_number(self) -> np.ndarray:
        """(V ** G,) int64: the class of every combination, unknown for those that the dictionary lacks."""
        table = np.full(self.entries**self.groups, UNKNOWN_CLASS, dtype=np.int64)
        table[self.numbers] = np.arange(1, self.num_classes)
        return table

    def text(self) -> str:
        """fairseq's file: one "i-j count" a line."""
        symbols = code_symbols(self.numbers, self.groups, self.entries)
        return "".join(f"{symbol} {count}\n" for symbol, count in zip(symbols, self.counts.tolist(), strict=True))

    def write(self, directory: Path) -> None:
        """Write dict.txt."""
        with open_new(directory / FILE, "w") as file:
            file.write(self.text())
