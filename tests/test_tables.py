"""Tables with a header: what is read, and how every error names file, line and column."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.errors import UserError
from pretrain.tables import Table


class WrongTable(UserError):
    """The error of this file's tables."""


def table_of(folder: Path, text: str | bytes) -> Table:
    path = folder / "t.tsv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return Table(path, (("utt", "path"), "speaker"), WrongTable, "data.speakers")


def test_columns_are_found_by_name_wherever_they_stand(tmp_path: Path) -> None:
    table = table_of(tmp_path, 'age\tspeaker\tpath\r\n30\tAnn "x\ta b.wav\r\n\tBob\tc.wav')
    assert table.names == ("path", "speaker")
    assert list(table) == [(2, ("a b.wav", 'Ann "x')), (3, ("c.wav", "Bob"))]
    assert list(table) == list(table)
    # Cells that nobody asked for may be absent at the end of a line.
    assert list(table_of(tmp_path, "utt\tspeaker\tage\nü\tAnn\n")) == [(2, ("ü", "Ann"))]
    assert list(table_of(tmp_path, "utt\tspeaker\n")) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: has no column utt or path; the line is empty; name these between tabs: utt or path, speaker"),
        ("utt speaker\n", r"line 1: has no column utt or path; known: utt speaker; name these"),
        ("utt\tspaeker\n", r"line 1: has no column speaker; did you mean spaeker\?"),
        ("utt\tspeaker\na\n", r"line 2: has too few columns: speaker is missing; correct the line"),
        ("utt\tspeaker\na\tb\n\n", r"line 3: has too few columns: speaker is missing"),
        ("utt\tspeaker\na\tb\tc\n", r"line 2: has 3 columns where the header has 2; .*tabs"),
        (
            b"utt\tspeaker\n\xff\tb\n",
            r"cannot be read \(.*utf-8.*\); give a tab-separated table with the columns utt or",
        ),
    ],
)
def test_a_wrong_table_is_refused(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(WrongTable, match=rf"^data\.speakers: {tmp_path}/t\.tsv: {message}"):
        list(table_of(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WrongTable, match=rf"^{tmp_path}/no\.tsv: cannot be read \(No such file.*the columns utt$"):
        Table(tmp_path / "no.tsv", ["utt"], WrongTable)
