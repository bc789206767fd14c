"""Manifests: the numpy index against a naive parse, errors with file and line, fingerprints, missing files."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pretrain.data import manifest as manifest_module
from pretrain.data.manifest import Manifest, ManifestError, write_manifest


def write_text(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_300k_rows_equal_a_naive_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    lengths = 10 ** rng.integers(0, 9, 300_000) + rng.integers(0, 9, 300_000)
    names = [f"{'sprache/ü' * (n % 5)}{n}.flac" for n in range(len(lengths))]
    path = tmp_path / "train.tsv"
    write_manifest(path, Path("/audio"), zip(names, lengths.tolist(), strict=True))
    monkeypatch.setattr(manifest_module, "CHUNK_BYTES", 1 << 20)  # many chunks
    manifest = Manifest.read(path)
    with open(path) as file:
        assert next(file) == "/audio\n"
        naive = [line.rstrip("\n").split("\t") for line in file]
    assert len(manifest) == len(naive)
    assert manifest.lengths.dtype == np.int64
    np.testing.assert_array_equal(manifest.lengths, [int(length) for _, length in naive])
    for row in [0, 1, *rng.integers(0, len(naive), 2000).tolist(), len(naive) - 1]:
        assert manifest.relative_path(row) == naive[row][0]
        assert manifest.path(row) == "/audio/" + naive[row][0]
    body = path.read_bytes().partition(b"\n")[2]
    assert manifest.fingerprint() == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 24])
@pytest.mark.parametrize(
    "text", ["/r\na.wav\t5\nb c.wav\t1234\n", "/r\r\na.wav\t5\r\nb c.wav\t1234\r\n", "/r\na.wav\t5\nb c.wav\t1234"]
)
def test_line_ends_and_chunks_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, chunk_bytes: int
) -> None:
    monkeypatch.setattr(manifest_module, "CHUNK_BYTES", chunk_bytes)
    manifest = Manifest.read(write_text(tmp_path / "train.tsv", text))
    assert manifest.lengths.tolist() == [5, 1234]
    assert [manifest.path(row) for row in range(2)] == ["/r/a.wav", "/r/b c.wav"]
    assert manifest.fingerprint() == hashlib.sha256(b"a.wav\t5\nb c.wav\t1234\n").hexdigest()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("/r\n", "lists no audio"),
        ("/r", "lists no audio"),
        ("a.wav\t5\nb.wav\t6\n", "line 1: the root folder is missing"),
        ("\na.wav\t5\n", "line 1: the root folder is missing"),
        ("/r\na.wav\t5\nb.wav 6\n", "line 3: is not `path<TAB>samples`"),
        ("/r\na.wav\t5\t6\n", "line 2: is not `path<TAB>samples`"),
        ("/r\na.wav\t5\n\nb.wav\t6\n", "line 3: is not `path<TAB>samples`"),
        ("/r\n\t5\n", "line 2: has no path"),
        ("/r\na.wav\t5\nb.wav\t\n", "line 3: the length is not a positive integer"),
        ("/r\na.wav\t5\nb.wav\t1x\n", "line 3: the length is not a positive integer"),
        ("/r\na.wav\t-5\n", "line 2: the length is not a positive integer"),
        ("/r\na.wav\t1.5\n", "line 2: the length is not a positive integer"),
        ("/r\na.wav\t5\nb.wav\t0\n", "line 3: the length is not a positive integer"),
        ("/r\na.wav\t12345678901234567890\n", "line 2: the length is not a positive integer"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 24])
def test_errors_name_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str, chunk_bytes: int
) -> None:
    monkeypatch.setattr(manifest_module, "CHUNK_BYTES", chunk_bytes)
    path = write_text(tmp_path / "train.tsv", text)
    with pytest.raises(ManifestError) as caught:
        Manifest.read(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "; " in str(caught.value)


def test_a_missing_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"train.tsv: no such manifest; run `python tools/prepare_manifest.py"):
        Manifest.read(tmp_path / "train.tsv")


def test_relative_roots_and_ids(tmp_path: Path) -> None:
    manifest = Manifest.read(write_text(tmp_path / "train.tsv", "wavs\nspeaker/a.b.wav\t5\n"))
    assert manifest.path(0) == str(tmp_path / "wavs" / "speaker" / "a.b.wav")
    assert manifest.utterance_id(0) == "speaker/a.b"


def test_ids_of_packed_audio_are_the_entries_names(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("speaker/a.wav", b"0123456789")
        file.writestr("speaker/b.wav", b"abc")
    data = (tmp_path / "x.zip").read_bytes()
    rows = [(f"x.zip:{data.index(b'0123456789')}:10", 4), (f"x.zip:{data.index(b'abc')}:3", 1), ("x.zip:1:3", 1)]
    write_manifest(tmp_path / "train.tsv", Path("."), rows)
    manifest = Manifest.read(tmp_path / "train.tsv")
    assert [manifest.utterance_id(row) for row in range(2)] == ["speaker/a", "speaker/b"]
    assert manifest.path(0) == f"{tmp_path}/{rows[0][0]}"
    with pytest.raises(ManifestError, match="line 4"):
        manifest.utterance_id(2)


def test_fingerprint_ignores_the_root_alone(tmp_path: Path) -> None:
    def fingerprint(root: str, rows: list[tuple[str, int]]) -> str:
        write_manifest(tmp_path / "m.tsv", Path(root), rows)
        return Manifest.read(tmp_path / "m.tsv").fingerprint()

    rows = [("a.wav", 10), ("b.wav", 20)]
    assert fingerprint("/one", rows) == fingerprint("/another/place", rows)
    others = [[("a.wav", 10), ("b.wav", 21)], [("a.wav", 10), ("c.wav", 20)], rows[::-1], rows[:1]]
    assert len({fingerprint("/one", r) for r in [rows, *others]}) == 5


def test_pickles_are_small_and_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_manifest(Path("m.tsv"), Path("wavs"), [(f"{n}.wav", n + 1) for n in range(10_000)])
    manifest = Manifest.read(Path("m.tsv"))
    data = pickle.dumps(manifest)
    assert len(data) < 1000
    monkeypatch.chdir("/")
    copy = pickle.loads(data)
    np.testing.assert_array_equal(copy.lengths, manifest.lengths)
    assert copy.path(77) == manifest.path(77) == str(tmp_path / "wavs" / "77.wav")


def test_missing_files_are_listed(tmp_path: Path) -> None:
    for n in range(0, 30, 2):
        (tmp_path / f"{n}.wav").touch()
    (tmp_path / "x.zip").touch()
    rows = [(f"{n}.wav", 1) for n in range(30)] + [("x.zip:0:5", 1), ("y.zip:0:5", 1)]
    write_manifest(tmp_path / "m.tsv", tmp_path, rows)
    manifest = Manifest.read(tmp_path / "m.tsv")
    assert manifest.missing(3) == [str(tmp_path / f"{n}.wav") for n in (1, 3, 5)]
    assert manifest.missing(100)[-1] == f"{tmp_path}/y.zip:0:5"
    assert len(manifest.missing(100)) == 16


def test_writing_refuses_what_reading_would_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.tsv"
    write_manifest(path, tmp_path, [("a.wav", 1)])
    before = path.read_bytes()
    for row in [("a\tb.wav", 1), ("a\nb.wav", 1), ("a.wav", 0)]:
        with pytest.raises(ManifestError, match=r"m\.tsv"):
            write_manifest(path, tmp_path, [("c.wav", 2), row])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.tsv"]


def test_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.wav")
    write_manifest(tmp_path / "m.tsv", tmp_path, [(name, 3)])
    assert Manifest.read(tmp_path / "m.tsv").relative_path(0) == name
