"""Tab-separated tables whose first line names their columns: transcripts, speakers, alignments, labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pretrain.config import nearest
from pretrain.errors import UserError


class Row(NamedTuple):
    """One line: its number in the file, and the cells of the columns that were asked for, in the order asked."""

    number: int
    cells: tuple[str, ...]


class Table:
    """The rows of one file, read as they are asked for.

    `columns` are the names that the header must have; a tuple of names takes the first of them that is there. `names`
    says which were taken. Further columns may stand anywhere. A cell is all between two tabs: quotes mean nothing.
    """

    def __init__(
        self, path: Path, columns: Sequence[str | tuple[str, ...]], error: type[UserError], option: str = ""
    ) -> None:
        """Errors are of the class `error`, and name the `option` that gave the file, where there is one.

        Raises `error` for a file that cannot be read and for a header without one of the columns.
        """
        self.path, self._error, self._where = path, error, f"{option}: {path}" if option else str(path)
        wanted = [(column,) if isinstance(column, str) else column for column in columns]
        self._columns = ", ".join(" or ".join(names) for names in wanted)
        self._header = next((cells for _, cells in self._lines()), [])
        self.names = tuple(self._found(names) for names in wanted)

    def __iter__(self) -> Iterator[Row]:
        """Raises `error`, naming the line, for one with more cells than the header or without a column asked for."""
        places = [self._header.index(name) for name in self.names]
        for number, cells in self._lines():
            if number == 1:
                continue
            if len(cells) > len(self._header):
                raise self.error(number, f"has {len(cells)} columns where the header has {len(self._header)}")
            if len(cells) <= max(places):
                missing = next(name for name, place in zip(self.names, places, strict=True) if len(cells) <= place)
                raise self.error(number, f"has too few columns: {missing} is missing")
            yield Row(number, tuple(cells[place] for place in places))

    def error(self, number: int, problem: str, fix: str = "correct the line; tabs separate the columns") -> UserError:
        """An error about line `number`, to be raised by who understands the cells."""
        return self._error(f"{self._where}: line {number}: {problem}; {fix}")

    def _found(self, names: tuple[str, ...]) -> str:
        found = next((name for name in names if name in self._header), None)
        if found is None:
            hint = nearest(names[0], self._header) if any(self._header) else "the line is empty"
            raise self.error(
                1, f"has no column {' or '.join(names)}; {hint}", f"name these between tabs: {self._columns}"
            )
        return found

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        try:
            with self.path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    yield number, line.rstrip("\r\n").split("\t")
        except (OSError, UnicodeDecodeError) as error:
            problem = error.strerror if isinstance(error, OSError) else str(error)
            raise self._error(
                f"{self._where}: cannot be read ({problem}); give a tab-separated table with the columns "
                f"{self._columns}"
            ) from None
