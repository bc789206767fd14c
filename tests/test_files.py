"""Files and directories appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from pretrain.files import new_directory, new_file, open_new, take_place


def test_a_file_appears_when_its_block_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.readlink(f"/proc/self/fd/{handle}")))
    path = tmp_path / "a.txt"
    with new_file(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    assert flushed == []
    with open_new(path, "w") as file:
        file.write("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two"
    assert [Path(name).parent for name in flushed] == [tmp_path]
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path, folder = tmp_path / "a.txt", tmp_path / "folder"
    path.write_text("old")
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), open_new(path, "w") as file:
        file.write("half" + str(1 / 0))
    with pytest.raises(ZeroDivisionError), new_directory(folder) as inside:
        (inside / "new.txt").write_text(str(1 / 0))
    assert path.read_text() == "old"
    assert sorted(tmp_path.rglob("*")) == [path, folder, folder / "old.txt"]


def test_a_directory_takes_the_place_of_another_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    for name in ("first", "second"):
        with new_directory(target) as inside:
            (inside / name).touch()
    assert [path.name for path in target.iterdir()] == ["second"]
    (tmp_path / "deep" / "work").mkdir()
    take_place(tmp_path / "deep" / "work", target)
    assert list((tmp_path / "deep").iterdir()) == [target]
    assert list(target.iterdir()) == []


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with open_new(path, "w") as one, open_new(path, "w") as two:
        one.write("one")
        two.write("two")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_symbols_are_written_and_read_as_utf8_whatever_the_locale_is(tmp_path: Path) -> None:
    # The script itself is ASCII, since the interpreter decodes it by the locale.
    script = f"""
from pathlib import Path
from pretrain.config import save_yaml
from pretrain.data.utterance_targets import read_dictionary, write_dictionary
schwa, path = chr(0x259), Path({str(tmp_path / "dict.txt")!r})
write_dictionary(path, [schwa])
assert read_dictionary(path, "symbols") == [schwa]
save_yaml({{"symbols": [schwa]}}, Path({str(tmp_path / "config.yaml")!r}))
"""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | locale, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == "symbols:\n- \u0259\n"
