"""Reading audio: against torchaudio's resampling of the whole file, Python's own zip and wave modules, closed forms."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import wave
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from pretrain.data import audio
from pretrain.data.archive import open_range, parse_range, stored_entries
from pretrain.data.audio import AudioError, audio_info, read_audio, verify_audio
from tests.audio_maker import babble

RATES = (8000, 11025, 22050, 44100, 48000)


def write(path: Path, waveform: np.ndarray, rate_hz: int, **options: str) -> str:
    soundfile.write(path, waveform, rate_hz, **options)
    return str(path)


def decoded(path: str) -> torch.Tensor:
    """The whole file at its own rate, mixed down, as libsndfile gives it: (frames,)."""
    waveform, _ = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(waveform.mean(axis=1))


@pytest.mark.parametrize("rate_hz", RATES)
@pytest.mark.parametrize("frames", [30011, 44100, 1])
def test_whole_file_equals_torchaudio(tmp_path: Path, rate_hz: int, frames: int) -> None:
    path = write(tmp_path / "a.wav", babble(frames, 1), rate_hz)
    expected = torchaudio.functional.resample(decoded(path), rate_hz, 16000).numpy()
    actual = read_audio(path)
    assert actual.dtype == np.float32
    assert len(actual) == audio_info(path).samples == len(expected)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("rate_hz", [16000, *RATES])
def test_crop_equals_slice_of_whole_file(tmp_path: Path, rate_hz: int) -> None:
    path = write(tmp_path / "a.flac", babble(2 * rate_hz + 17, 2), rate_hz)
    whole = torchaudio.functional.resample(decoded(path), rate_hz, 16000).numpy()
    for start, samples in [(0, 400), (1, 1), (319, 3200), (12345, 16000), (len(whole) - 401, 401), (640, None)]:
        end = None if samples is None else start + samples
        np.testing.assert_allclose(read_audio(path, start, samples), whole[start:end], atol=1e-4)


def test_long_file_is_resampled_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.wav", babble(100_000, 3), 22050)
    whole = torchaudio.functional.resample(decoded(path), 22050, 16000).numpy()
    monkeypatch.setattr(audio, "BLOCK_SAMPLES", 7001)
    np.testing.assert_allclose(read_audio(path), whole, atol=1e-4)
    verify_audio(path)


@pytest.mark.parametrize(
    ("suffix", "options"), [(".ogg", {}), (".mp3", {}), (".opus", {"format": "OGG", "subtype": "OPUS"})]
)
@pytest.mark.parametrize("rate_hz", [16000, 48000])
def test_lossy_formats_seek_exactly(tmp_path: Path, suffix: str, options: dict[str, str], rate_hz: int) -> None:
    path = write(tmp_path / f"a{suffix}", np.tile(babble(8 * rate_hz + 411, 4), 3), rate_hz, **options)
    whole = read_audio(path)
    assert len(whole) == audio_info(path).samples == 24 * 16000 + 1233 * 16000 // rate_hz
    for start in (1, 5001, 100_000, 300_000, len(whole) - 5000, len(whole) - 2000):
        np.testing.assert_allclose(read_audio(path, start, 2000), whole[start : start + 2000], atol=1e-4)


def test_the_last_sample_is_kept(tmp_path: Path) -> None:
    """1/441 of a sample beyond an integer: torchaudio rounds that away in float32, ceil in integers does not."""
    frames = 441 * 2000 + pow(160, -1, 441)
    path = write(tmp_path / "a.wav", babble(frames, 5), 44100)
    samples = frames * 160 // 441 + 1
    assert len(torchaudio.functional.resample(decoded(path), 44100, 16000)) == samples - 1
    assert len(read_audio(path)) == audio_info(path).samples == samples


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = babble(4000, 6), babble(4000, 7)
    path = write(tmp_path / "a.wav", np.stack([left, right], axis=1), 16000, subtype="FLOAT")
    assert audio_info(path).channels == 2
    np.testing.assert_allclose(read_audio(path), (left + right) / 2, atol=1e-7)


def test_header_facts_of_a_file_written_by_another_library(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(np.full(801, 16384, "<i2").tobytes())
    info = audio_info(str(path))
    assert (info.samples, info.native_rate_hz, info.channels, info.format) == (1602, 8000, 1, "WAV/PCM_16")
    np.testing.assert_allclose(read_audio(str(path))[200:-200], 0.5, atol=1e-2)


def broken_files(folder: Path) -> dict[str, str]:
    """{path: what the error must say} for every kind of file that cannot be used."""
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("this is no audio\n" * 100)
    whole = Path(write(folder / "whole.flac", babble(16000, 8), 16000)).read_bytes()
    (folder / "cut.flac").write_bytes(whole[: len(whole) // 2])
    bad = babble(1000, 9)
    bad[500] = np.nan
    infinite = np.where(np.isnan(bad), np.inf, bad)
    return {
        str(folder / "gone.wav"): "no such file",
        str(folder / "empty.wav"): "is empty",
        str(folder / "text.wav"): "cannot be decoded",
        str(folder / "cut.flac"): "ends early|cannot be decoded",
        write(folder / "none.wav", np.zeros(0), 16000): "is empty",
        write(folder / "nan.wav", bad, 16000, subtype="FLOAT"): "NaN",
        write(folder / "nan8.wav", bad, 8000, subtype="FLOAT"): "NaN",
        write(folder / "inf.wav", infinite, 16000, subtype="FLOAT"): "infinite",
        write(folder / "odd.wav", np.zeros(99), 15999): "odd sampling rate",
        str(folder / "gone.zip:0:10"): "no such file",
    }


def test_unusable_files_are_named_with_a_fix(tmp_path: Path) -> None:
    for path, problem in broken_files(tmp_path).items():
        with pytest.raises(AudioError, match=problem) as caught:
            read_audio(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "; " in str(caught.value)
        with pytest.raises(AudioError, match=problem):
            verify_audio(path)
    assert pickle.loads(pickle.dumps(caught.value)).problem == caught.value.problem


@pytest.mark.parametrize(("start", "samples"), [(0, 16001), (15999, 2), (16000, None), (0, 0), (-1, 5)])
def test_shorter_than_asked(tmp_path: Path, start: int, samples: int | None) -> None:
    path = write(tmp_path / "a.wav", babble(16000, 10), 16000)
    with pytest.raises(AudioError, match="has 16000 samples at 16 kHz"):
        read_audio(path, start, samples)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A stored zip of three formats, made by Python's zipfile, beside the files themselves."""
    names = ["a.wav", "b.flac", "c.ogg"]
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_STORED) as file:
        for seed, name in enumerate(names):
            write(tmp_path / name, babble(20_000, seed), 22050)
            file.write(tmp_path / name, name)
    return tmp_path / "x.zip"


def packed_paths(archive: Path) -> dict[str, str]:
    """{name: path} of every entry, with the place of its bytes found by search instead of by the directory."""
    whole = archive.read_bytes()
    files = {name: (archive.parent / name).read_bytes() for name in ("a.wav", "b.flac", "c.ogg")}
    return {name: f"{archive}:{whole.index(data)}:{len(data)}" for name, data in files.items()}


def test_packed_equals_unpacked(archive: Path) -> None:
    for name, path in packed_paths(archive).items():
        plain = str(archive.parent / name)
        np.testing.assert_array_equal(read_audio(path), read_audio(plain))
        np.testing.assert_array_equal(read_audio(path, 5000, 777), read_audio(plain, 5000, 777))
        assert audio_info(path).samples == audio_info(plain).samples
        offset, length = map(int, path.split(":")[1:])
        assert stored_entries(str(archive))[offset] == (name, length)


def read_sum(path: str) -> float:
    return float(sum(np.abs(read_audio(path, start, 500)).sum() for start in range(0, 10_000, 500)))


def test_forked_workers_share_an_open_archive(archive: Path) -> None:
    paths = list(packed_paths(archive).values())
    expected = [read_sum(path) for path in paths]  # opens the archive before the fork
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(read_sum, paths * 4, chunksize=1) == expected * 4


def test_damaged_ranges_are_refused(archive: Path) -> None:
    size = archive.stat().st_size
    for byte_range, problem in [
        ("0:0", "is empty"),
        (f"{size - 5}:10", "ends behind"),
        ("3:100", "does not know|decoded"),
    ]:
        with pytest.raises(AudioError, match=problem):
            read_audio(f"{archive}:{byte_range}")


def test_ranges_behave_like_files(archive: Path) -> None:
    path = packed_paths(archive)["a.wav"]
    data = (archive.parent / "a.wav").read_bytes()
    with open_range(parse_range(path)) as window:
        assert window.read() == data
        window.seek(-10, 2)
        assert window.read(100) == data[-10:]
        window.seek(4)
        window.seek(4, 1)
        assert window.read(4) == data[8:12] == b"WAVE"
    assert parse_range("folder/x.wav") is None
    assert parse_range("x.zip:12") is None


def write_m4a(path: Path, waveform: np.ndarray, rate_hz: int) -> None:
    av = pytest.importorskip("av", reason="pip install headwater[audio]")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=rate_hz, layout="mono")
        frame = av.AudioFrame.from_ndarray(waveform[None], format="fltp", layout="mono")
        frame.sample_rate = rate_hz
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


def test_other_containers_by_pyav(tmp_path: Path) -> None:
    path, rate_hz = tmp_path / "a.m4a", 44100
    tone = np.sin(2 * np.pi * 440 * np.arange(rate_hz) / rate_hz).astype(np.float32) / 2
    write_m4a(path, tone, rate_hz)
    whole = read_audio(str(path))
    assert len(whole) == audio_info(str(path)).samples
    assert abs(len(whole) - 16000) < 1000  # AAC pads to whole frames
    np.testing.assert_allclose(read_audio(str(path), 4000, 5000), whole[4000:9000], atol=1e-6)
    spectrum = np.abs(np.fft.rfft(whole[4000:12000]))
    assert np.argmax(spectrum) * 2 == 440
    (tmp_path / "b.m4a").write_bytes(b"no container" * 50)
    with pytest.raises(AudioError, match="cannot be decoded"):
        read_audio(str(tmp_path / "b.m4a"))


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.m4a").write_bytes(b"whatever")
    with pytest.raises(AudioError, match=r"PyAV.*; pip install headwater\[audio\]"):
        audio_info(str(tmp_path / "a.m4a"))
