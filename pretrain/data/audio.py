"""Reading audio: any container and rate to mono float32 at 16 kHz, seeking to the crop that is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import soundfile
import torch
from torchaudio.transforms import Resample

from pretrain.data.archive import open_range, parse_range
from pretrain.errors import UserError

SAMPLE_RATE = 16000
SOUNDFILE_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64", ".sph", ".caf")
AV_SUFFIXES = (".m4a", ".mp4", ".aac", ".webm", ".mka", ".mkv", ".wma", ".amr", ".3gp")
BLOCK_SAMPLES = 1 << 21  # whole files are resampled in blocks of 131 s, so that an hour costs little memory
# After a seek into the last page libsndfile 1.2 may be one block off (its issue 885). A page holds at most 255
# packets, and a packet of libvorbis at most 1024 frames: this far before the crop the seek is exact.
NEAR_FRAMES = 3 * SAMPLE_RATE
VORBIS_PREROLL_FRAMES = 256 * 1024
MAX_KERNEL_SIZE = 1 << 25
PREPARE_AGAIN = "run tools/prepare_manifest.py again, or take the row out of the manifest"


class AudioError(UserError):
    """A file that cannot be used: "<path>: <what>; <what to do>". `problem` is the <what>."""

    def __init__(self, message: str, problem: str = "") -> None:
        super().__init__(message)
        self.problem = problem


def _error(path: str, problem: str, fix: str = PREPARE_AGAIN) -> AudioError:
    return AudioError(f"{path}: {problem}; {fix}", problem)


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """What a file holds: `samples` as `read_audio` returns them (at 16 kHz), the rest as stored."""

    path: str
    samples: int
    native_rate_hz: int
    channels: int
    format: str


class _Reader(Protocol):
    """An open file: native rate and frames; `read` gives (count,) float32, mixed down, or fewer at a cut end."""

    rate_hz: int
    frames: int
    channels: int
    format: str

    def read(self, start: int, count: int) -> np.ndarray: ...


class _SoundFileReader:
    def __init__(self, file: soundfile.SoundFile) -> None:
        self._file = file
        self._preroll = VORBIS_PREROLL_FRAMES if file.subtype == "VORBIS" else 0
        self.rate_hz, self.frames, self.channels = file.samplerate, file.frames, file.channels
        self.format = f"{file.format}/{file.subtype}"

    def read(self, start: int, count: int) -> np.ndarray:
        """(count,) float32 from frame `start` on, mixed down; fewer at a cut end."""
        position = self._file.tell()
        if position != start:
            # Decoding a few seconds costs less than a seek in compressed audio.
            target = 0 if start <= NEAR_FRAMES else max(0, start - self._preroll)
            if target != position:
                position = self._file.seek(target)
        # A whole-file call keeps reading where it stands, hence no pre-roll.
        block = self._file.read(start - position + count, dtype="float32", always_2d=True)[start - position :]
        return block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)


class _AvReader:
    """Containers that only FFmpeg knows. Their headers do not tell the exact length: the whole stream is decoded."""

    def __init__(self, source: str | BinaryIO) -> None:
        import av

        blocks: list[np.ndarray] = []
        with av.open(source, "r") as container:
            if not container.streams.audio:
                raise ValueError("no audio stream")
            stream = container.streams.audio[0]
            self.rate_hz, self.channels = stream.codec_context.sample_rate, stream.codec_context.channels
            self.format = f"{container.format.name}/{stream.codec_context.name}"
            converter = av.AudioResampler(format="fltp")
            for frame in container.decode(stream):
                blocks.extend(piece.to_ndarray().mean(axis=0) for piece in converter.resample(frame))
        self._waveform = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
        self.frames = len(self._waveform)

    def read(self, start: int, count: int) -> np.ndarray:
        return self._waveform[start : start + count]


@contextmanager
def _source(path: str) -> Iterator[str | BinaryIO]:
    """The file itself, or a window on its archive, with what the file system refuses told as AudioError."""
    byte_range = parse_range(path)
    try:
        if byte_range is None:
            if os.stat(path).st_size == 0:
                raise _error(path, "is empty (0 bytes)")
            yield path
        else:
            if byte_range.length == 0:
                raise _error(path, "is empty (0 bytes)")
            with open_range(byte_range) as window:
                yield window
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _error(path, "no such file", "check the manifest's first line, or prepare the manifest again") from error
    except (OSError, EOFError) as error:
        raise _error(
            path, f"cannot be read ({error})", "check the file and its permissions, or pack it again"
        ) from error


@contextmanager
def _open(path: str) -> Iterator[_Reader]:
    suffix = Path(path).suffix.lower()
    with _source(path) as source:
        if suffix not in AV_SUFFIXES:
            try:
                file = soundfile.SoundFile(source)
            except soundfile.LibsndfileError as error:
                if suffix in SOUNDFILE_SUFFIXES:
                    raise _error(path, f"cannot be decoded ({error.error_string})") from error
            else:
                with file:
                    reader: _Reader = _SoundFileReader(file)
                    _check_header(path, reader)
                    yield reader
                return
        if not isinstance(source, str):
            source.seek(0)
        reader = _open_av(path, source)
        _check_header(path, reader)
        yield reader


def _open_av(path: str, source: str | BinaryIO) -> _AvReader:
    try:
        import av
    except ImportError as error:
        problem = "libsndfile does not know this format, and PyAV, which knows more, is not installed"
        raise _error(path, problem, "pip install headwater[audio]") from error
    try:
        return _AvReader(source)
    except (av.FFmpegError, ValueError) as error:
        raise _error(path, f"cannot be decoded ({error})") from error


def _check_header(path: str, reader: _Reader) -> None:
    if reader.frames <= 0:
        raise _error(path, "is empty (no samples)")
    if reader.frames >= 1 << 62:
        raise _error(path, "the header does not tell the length", "write it again as FLAC")
    orig, new = _ratio(reader.rate_hz)
    # torchaudio's kernel has about `new` rows of `orig` + 14 or more taps: gigabytes for rates prime to 16000.
    if orig * new > MAX_KERNEL_SIZE:
        raise _error(path, f"odd sampling rate ({reader.rate_hz} Hz)", "convert it to 16000 Hz")


def _ratio(rate_hz: int) -> tuple[int, int]:
    """Native frames and 16 kHz samples of the shortest common period."""
    divisor = int(np.gcd(rate_hz, SAMPLE_RATE))
    return rate_hz // divisor, SAMPLE_RATE // divisor


def _samples(reader: _Reader) -> int:
    """Length at 16 kHz: ceil(frames * 16000 / rate), torchaudio's rule, in integers."""
    return -(-reader.frames * SAMPLE_RATE // reader.rate_hz)


@lru_cache(maxsize=16)
def _resampler(rate_hz: int) -> Resample:
    return Resample(rate_hz, SAMPLE_RATE)


def audio_info(path: str) -> AudioInfo:
    """Length, rate, channels and format from the header (containers that only PyAV reads are decoded to count).

    Raises AudioError for a file that is missing, empty or not readable as audio.
    """
    with _open(path) as reader:
        return AudioInfo(path, _samples(reader), reader.rate_hz, reader.channels, reader.format)


def verify_audio(path: str) -> None:
    """Decode the whole file; raises AudioError where it is cut, damaged or holds NaN or infinite values."""
    with _open(path) as reader:
        for start in range(0, reader.frames, BLOCK_SAMPLES):
            _read_native(path, reader, start, min(reader.frames, start + BLOCK_SAMPLES))


def read_audio(path: str, start: int = 0, samples: int | None = None) -> np.ndarray:
    """Read (T,) float32, mono, 16 kHz: `samples` from `start` on (both at 16 kHz), or everything after `start`.

    A crop equals the same slice of the whole file. `path` may be `archive.zip:offset:length`. Raises AudioError for a
    file that is missing, empty, undecodable, shorter than asked, or holds NaN or infinite values.
    """
    with _open(path) as reader:
        total = _samples(reader)
        end = total if samples is None else start + samples
        if not 0 <= start < end <= total:
            raise _error(path, f"has {total} samples at 16 kHz where {start} to {end} are asked for")
        if reader.rate_hz == SAMPLE_RATE:
            return _read_native(path, reader, start, end)
        bounds = [*range(start, end, BLOCK_SAMPLES), end]
        blocks = [_read_resampled(path, reader, a, b) for a, b in pairwise(bounds)]
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def _read_native(path: str, reader: _Reader, start: int, end: int) -> np.ndarray:
    """Frames `start` to `end` at the native rate, checked."""
    try:
        waveform = reader.read(start, end - start)
    except soundfile.LibsndfileError as error:
        raise _error(path, f"cannot be decoded ({error.error_string})") from error
    if len(waveform) < end - start:
        problem = f"ends early (frame {start + len(waveform)} of the {reader.frames} that its header promises)"
        raise _error(path, problem)
    if not np.isfinite(waveform).all():
        raise _error(path, "holds NaN or infinite values")
    return waveform


def _read_resampled(path: str, reader: _Reader, start: int, end: int) -> np.ndarray:
    """Samples `start` to `end` at 16 kHz of a file at another rate.

    The filter repeats every `orig` native frames = `new` samples. Reading from a multiple of `orig`, with at least the
    filter's half width on both sides, gives the phases and the values of the resampled whole file.
    """
    orig, new = _ratio(reader.rate_hz)
    resampler = _resampler(reader.rate_hz)
    margin_periods = -(-resampler.width // orig)
    first_period = max(0, start // new - margin_periods)
    last_period = (end - 1) // new + 1 + margin_periods
    native = _read_native(path, reader, first_period * orig, min(last_period * orig, reader.frames))
    # torchaudio rounds the output length in float32, which may drop the last sample; one period of silence behind the
    # end, which is what it pads with anyway, keeps it.
    padded = torch.nn.functional.pad(torch.from_numpy(native), (0, orig))
    offset = start - first_period * new
    return resampler(padded)[offset : offset + end - start].numpy().copy()
