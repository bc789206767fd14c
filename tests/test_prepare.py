"""The tools that make manifests and packed archives, end to end on generated folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pretrain.data.audio import read_audio
from pretrain.data.manifest import Manifest
from pretrain.data.prepare.pack import PackError, pack
from pretrain.data.prepare.scan import PrepareOptions, ScanError, find_audio, prepare, split_rows
from tests.audio_maker import babble, write_corpus
from tests.conftest import ROOT


def run_tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """40 good files of 0.5 to 1.5 s, and one of each kind of bad file."""
    folder = tmp_path / "audio"
    write_corpus(folder, {f"speaker{n % 4}/u{n:02d}.wav": 8000 + 400 * n for n in range(40)})
    soundfile.write(folder / "telephone.flac", babble(8000, 50), 8000)
    soundfile.write(folder / "stereo.ogg", np.stack([babble(44100, 51)] * 2, axis=1), 44100)
    (folder / "empty.wav").touch()
    (folder / "text.mp3").write_text("no audio")
    soundfile.write(folder / "none.wav", np.zeros(0), 16000)
    soundfile.write(folder / "short.wav", babble(320, 52), 16000)
    bad = babble(16000, 53)
    bad[9000] = np.nan
    soundfile.write(folder / "nan.wav", bad, 16000, subtype="FLOAT")
    whole = (folder / "telephone.flac").read_bytes()
    (folder / "cut.flac").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("not looked at")
    (folder / "._u01.wav").write_bytes(b"not looked at either")
    return folder


def rows_of(path: Path) -> dict[str, int]:
    manifest = Manifest.read(path)
    return {manifest.relative_path(row): int(manifest.lengths[row]) for row in range(len(manifest))}


def test_the_command_line_scans_splits_and_reports(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    arguments = [f"audio_dir={corpus}", f"output={output}", "valid_percent=10", "check=full", "workers=2"]
    result = run_tool("prepare_manifest.py", *arguments)
    assert result.returncode == 0, result.stderr
    train, valid = rows_of(output / "train.tsv"), rows_of(output / "valid.tsv")
    assert len(valid) == 4
    assert not set(train) & set(valid)
    expected = {f"speaker{n % 4}/u{n:02d}.wav": 8000 + 400 * n for n in range(40)}
    assert train | valid == expected | {"telephone.flac": 16000, "stereo.ogg": 16000}
    assert list(train) == sorted(train)
    skipped = dict(line.split("\t") for line in (output / "skipped.tsv").read_text().splitlines())
    assert {Path(path).name for path in skipped} == {
        "empty.wav", "text.mp3", "none.wav", "short.wav", "nan.wav", "cut.flac"
    }  # fmt: skip
    assert skipped[str(corpus / "short.wav")] == "shorter than min_seconds (0.020 s)"
    report = json.loads((output / "report.json").read_text())
    assert report["skipped"]["files"] == 6
    assert report["skipped"]["reasons"]["is empty"] == 2
    seconds = sum((train | valid).values()) / 16000
    assert sum(split["hours"] for split in report["splits"].values()) == pytest.approx(seconds / 3600, abs=1e-3)
    assert "38 utterances" in result.stdout
    for split in ("train", "valid"):
        manifest = Manifest.read(output / f"{split}.tsv")
        assert all(len(read_audio(manifest.path(n))) == manifest.lengths[n] for n in range(len(manifest)))


def test_header_check_and_duration_limits(corpus: Path, tmp_path: Path) -> None:
    options = PrepareOptions(corpus, tmp_path / "data", valid_percent=0, min_seconds=0.6, max_seconds=1.2)
    report = prepare(options)
    rows = rows_of(tmp_path / "data" / "train.tsv")
    assert all(0.6 * 16000 <= length <= 1.2 * 16000 for length in rows.values())
    assert {"nan.wav", "stereo.ogg"} <= set(rows)  # a NaN shows only when decoded
    assert set(report["splits"]) == {"train"}
    assert report["splits"]["train"]["rates_hz"]["44100"] == 1
    assert report["splits"]["train"]["channels"]["2"] == 1
    assert report["skipped"]["reasons"]["longer than max_seconds"] == 11


def test_a_second_run_is_equal_and_drops_a_stale_split(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    prepare(PrepareOptions(corpus, output, seed=3, workers=1))
    first = [(output / name).read_bytes() for name in ("train.tsv", "valid.tsv")]
    assert len(rows_of(output / "valid.tsv")) == 1  # 1 % of 44, at least one
    prepare(PrepareOptions(corpus, output, seed=3))
    assert [(output / name).read_bytes() for name in ("train.tsv", "valid.tsv")] == first
    prepare(PrepareOptions(corpus, output, valid_percent=0))
    assert not (output / "valid.tsv").exists()


def test_another_folder_as_validation(corpus: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "dev", {"d.wav": 12345})
    prepare(PrepareOptions(corpus, tmp_path / "data", valid_dir=tmp_path / "dev"))
    manifest = Manifest.read(tmp_path / "data" / "valid.tsv")
    assert manifest.path(0) == str(tmp_path / "dev" / "d.wav")
    assert rows_of(tmp_path / "data" / "valid.tsv") == {"d.wav": 12345}
    assert len(rows_of(tmp_path / "data" / "train.tsv")) == 44


def test_links_are_followed_once(tmp_path: Path) -> None:
    write_corpus(tmp_path / "real", {"b.WAV": 500, "a/c.wav": 500})
    write_corpus(tmp_path / "elsewhere", {"d.wav": 500})
    (tmp_path / "real" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "real" / "a" / "loop").symlink_to(tmp_path / "real")
    assert find_audio(tmp_path / "real") == ["a/c.wav", "b.WAV", "linked/d.wav"]


def test_wrong_options_and_folders(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    (tmp_path / "bare").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "empty.wav").touch()
    for options, message in [
        (PrepareOptions(tmp_path / "gone", output), "gone: no such folder"),
        (PrepareOptions(tmp_path / "bare", output), "bare: no audio"),
        (PrepareOptions(tmp_path / "bad", output), "bad: no usable audio.*is empty"),
        (PrepareOptions(corpus, output, valid_dir=corpus, valid_percent=1), "valid_percent: given together"),
        (PrepareOptions(corpus, output, valid_percent=100), "valid_percent: 100 is not"),
        (PrepareOptions(corpus, output, check="half"), "check: 'half' is unknown"),
        (PrepareOptions(corpus, output, min_seconds=2, max_seconds=1), "max_seconds: 1 is below"),
        (PrepareOptions(corpus, output, workers=0), "workers: 0"),
    ]:
        with pytest.raises(ScanError, match=message):
            prepare(options)
    with pytest.raises(ScanError, match="nothing to train on"):
        split_rows(1, 1.0, 0)
    result = run_tool("prepare_manifest.py", f"audio_dir={tmp_path / 'gone'}", f"output={output}")
    assert result.returncode == 1
    assert result.stderr.strip().endswith("give the folder that holds the audio")


def test_packed_audio_equals_unpacked(corpus: Path, tmp_path: Path) -> None:
    prepare(PrepareOptions(corpus, tmp_path / "data", valid_percent=0, check="full"))
    source = tmp_path / "data" / "train.tsv"
    output = tmp_path / "packed" / "train"
    result = run_tool("pack_audio.py", f"manifest={source}", f"output={output}", "archive_mb=0.5")
    assert result.returncode == 0, result.stderr
    archives = sorted(output.parent.glob("*.zip"))
    assert [path.name for path in archives] == [f"train_{n:05d}.zip" for n in range(len(archives))]
    assert len(archives) > 1
    moved = output.parent.rename(tmp_path / "moved")
    plain, packed = Manifest.read(source), Manifest.read(moved / "train.tsv")
    np.testing.assert_array_equal(packed.lengths, plain.lengths)
    assert packed.missing() == []
    for row in range(len(plain)):
        assert packed.utterance_id(row) == plain.utterance_id(row)
        np.testing.assert_array_equal(read_audio(packed.path(row), 100, 5000), read_audio(plain.path(row), 100, 5000))


def test_archives_open_with_unzip(corpus: Path, tmp_path: Path) -> None:
    prepare(PrepareOptions(corpus, tmp_path / "data", valid_percent=0))
    pack(Manifest.read(tmp_path / "data" / "train.tsv"), tmp_path / "p", 10**9)
    command = [sys.executable, "-m", "zipfile", "-e", str(tmp_path / "p_00000.zip"), str(tmp_path / "out")]
    subprocess.run(command, check=True)
    for name in rows_of(tmp_path / "data" / "train.tsv"):
        assert (tmp_path / "out" / name).read_bytes() == (corpus / name).read_bytes()


def test_packing_refuses_what_it_cannot_do(corpus: Path, tmp_path: Path) -> None:
    prepare(PrepareOptions(corpus, tmp_path / "data", valid_percent=0))
    manifest = Manifest.read(tmp_path / "data" / "train.tsv")
    pack(manifest, tmp_path / "p", 10**9)
    with pytest.raises(PackError, match=r"p\.tsv: exists"):
        pack(manifest, tmp_path / "p", 10**9)
    with pytest.raises(PackError, match="line 2: is packed already"):
        pack(Manifest.read(tmp_path / "p.tsv"), tmp_path / "q", 10**9)
    with pytest.raises(PackError, match="archive_mb"):
        pack(manifest, tmp_path / "q", 0)
    Path(manifest.path(20)).unlink()
    with pytest.raises(PackError, match=r"cannot be read \(No such file"):
        pack(manifest, tmp_path / "q", 10**9)
    assert not list(tmp_path.glob("q*"))
