"""Synthesises the embedded sample (pretrain/data/sample) with espeak-ng, phone alignments included.

Needs the Debian packages espeak-ng and libespeak-ng1; nothing else in the project does.
Run: `python tools/make_sample.py`. The same version of espeak-ng gives the same samples, manifests and alignments each
time; only the serial number that libsndfile draws for every Ogg stream differs between runs.

Phones come from espeak's phoneme events (interface in espeak-ng's speak_lib.h), each of which carries the position of
its first sample at espeak's own rate.
"""

# ruff: noqa: RUF001 (phonetic symbols look like other letters)
from __future__ import annotations

import argparse
import csv
import ctypes
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from pretrain.data.audio import SAMPLE_RATE
from pretrain.data.manifest import write_manifest

SAMPLE_DIR = ROOT / "pretrain" / "data" / "sample"
SEED = 20
NOISE_RMS = 1e-3  # -60 dB of full scale: no digital silence, well below the quietest fricative
MIN_SECONDS, MAX_SECONDS = 0.7, 20.0
VORBIS_BLOCK = 4096  # libsndfile encodes Vorbis on the stack: one very long write can overflow it

SILENCE = "SIL"
ESPEAK_VOICE = {"en": "en-us", "de": "de", "es": "es"}
# espeak's mnemonics without length marks -> one symbol set, so that the languages share the phones that they share.
SYMBOLS = {
    "@": "ə", "@2": "ə", "a#": "ə", "@L": "əl", "A": "ɑ", "0": "ɑ", "aa": "æ", "A@": "ɑɹ", "e@": "ɛɹ", "i@": "ɪə",
    "i@3": "ɪɹ", "o@": "ɔɹ", "O@": "ɔɹ", "U@": "ʊɹ", "UR": "ʊɐ", "aI": "aɪ", "aI3": "aɪɚ", "aU": "aʊ", "eI": "eɪ",
    "oI": "ɔɪ", "OI": "ɔɪ", "OY": "ɔʏ", "oU": "oʊ", "E": "ɛ", "E2": "ɛ", "I": "ɪ", "I#": "ɪ", "I2": "ɪ", "O": "ɔ",
    "O2": "ɔ", "U": "ʊ", "V": "ʌ", "W": "œ", "Y": "ø", "B": "β", "C": "ç", "D": "ð", "T": "θ", "J^": "ʝ", "N": "ŋ",
    "n^": "ɲ", "l^": "ʎ", "Q": "ɣ", "R": "r", "R2": "r", "**": "ɾ", "S": "ʃ", "Z": "ʒ", "dZ": "dʒ", "tS": "tʃ",
    "pF": "pf", "ts": "ts", "t#": "ɾ", "t2": "t", "?": "ʔ",
}  # fmt: skip
LANGUAGE_SYMBOLS = {"en": {"a": "æ", "r": "ɹ", "3": "ɚ"}, "de": {"3": "ɐ"}, "es": {"r": "ɾ"}}
CLOSED = {"p", "t", "k", "ʔ", "ts", "tʃ", "pf"}  # voiceless plosives and affricates: silence, then a release
CLOSURE_PEAK = 64  # of 32768: espeak's output up to this counts as silence
PLAIN = set("abdefghijklmnoprstuvwxyz")  # mnemonics that are their own symbol


class SampleError(Exception):
    """The sample cannot be made; the message says what is missing or wrong and what to do."""


@dataclass(frozen=True)
class Voice:
    """One synthetic speaker: an espeak voice variant at one pitch (0-100) and speed."""

    variant: str
    pitch: int
    words_per_minute: int


VOICES = (
    Voice("m1", 40, 150), Voice("f1", 55, 145), Voice("m2", 50, 160), Voice("f2", 50, 155),
    Voice("m3", 35, 140), Voice("f3", 62, 165), Voice("m4", 45, 150), Voice("f4", 45, 140),
    Voice("m5", 60, 170), Voice("f5", 58, 150), Voice("m7", 30, 145), Voice("m6", 52, 160),
)  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """One utterance to be made: a text read by one voice. Every reading of a text is in the same split."""

    utterance: str
    language: str
    voice: Voice
    split: str
    text: str


@dataclass(frozen=True)
class Phone:
    """A phone from start_seconds to end_seconds of its audio file."""

    start_seconds: float
    end_seconds: float
    symbol: str


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_void_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position_ms", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


class Espeak:
    """libespeak-ng in its synchronous mode with phoneme events on.

    Raises SampleError when the library or a voice is absent or a call fails.
    """

    _SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS: samples go to the callback before espeak_Synth returns
    _PHONEME_EVENTS = 1  # espeakINITIALIZE_PHONEME_EVENTS
    _RATE, _PITCH = 1, 3  # espeak_PARAMETER
    _UTF8 = 1  # espeakCHARS_UTF8
    _LIST_END, _PHONEME = 0, 7  # espeak_EVENT_TYPE

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libespeak-ng.so.1")
        except OSError as error:
            raise SampleError(
                "libespeak-ng.so.1: not found; install the packages espeak-ng and libespeak-ng1"
            ) from error
        self._chunks: list[np.ndarray] = []
        self._events: list[tuple[int, str]] = []
        self.rate_hz = self._library.espeak_Initialize(self._SYNCHRONOUS, 0, None, self._PHONEME_EVENTS)
        if self.rate_hz <= 0:
            raise SampleError("espeak_Initialize: failed; check that espeak-ng's data package is installed")
        prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
        self._callback = prototype(self._receive)  # kept: the library holds only a bare pointer to it
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: ctypes._Pointer, count: int, events: ctypes._Pointer) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type != self._LIST_END:
            if events[index].type == self._PHONEME:
                self._events.append((events[index].sample, events[index].id.string.decode()))
            index += 1
        return 0

    def _check(self, what: str, status: int) -> None:
        if status != 0:
            raise SampleError(
                f"{what}: espeak-ng answered {status}; check the installed voices with espeak-ng --voices"
            )

    def speak(self, text: str, language: str, voice: Voice) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """Returns int16 samples (T,) at rate_hz and (first sample, phoneme mnemonic) per phoneme event."""
        name = f"{ESPEAK_VOICE[language]}+{voice.variant}"
        self._check(name, self._library.espeak_SetVoiceByName(name.encode()))
        self._check("pitch", self._library.espeak_SetParameter(self._PITCH, voice.pitch, 0))
        self._check("rate", self._library.espeak_SetParameter(self._RATE, voice.words_per_minute, 0))
        self._chunks.clear()
        self._events.clear()
        ctypes.CDLL(None).srand(SEED)  # espeak draws its noise from the C library's generator
        data = text.encode()
        status = self._library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 1, 0, self._UTF8, None, None)
        self._check(text, status)
        return np.concatenate(self._chunks), list(self._events)


def phone_symbol(mnemonic: str, language: str) -> str | None:
    """The shared symbol of an espeak mnemonic; None for a mark that only lengthens the phone before it.

    Raises SampleError for a mnemonic that the tables do not know.
    """
    if mnemonic == "" or mnemonic.startswith("_"):
        return SILENCE
    if mnemonic == ";":  # palatalisation: a transition, not a phone
        return None
    plain = mnemonic.rstrip(":-")
    symbol = LANGUAGE_SYMBOLS[language].get(plain) or SYMBOLS.get(plain) or (plain if plain in PLAIN else None)
    if symbol is None:
        raise SampleError(f"{language}: phoneme {mnemonic!r} has no symbol; add it to SYMBOLS in {Path(__file__).name}")
    return symbol


def phone_starts(speech: np.ndarray, events: Iterable[tuple[int, str]], language: str) -> list[tuple[int, str]]:
    """(first sample, symbol) per phone of int16 speech, silence first; neighbouring silences are one.

    espeak reports a voiceless plosive at its release and leaves the closure to the phone before; by custom the closure
    belongs to the plosive, so its start moves back over the silence, unless that is a pause.
    """
    starts = [(0, SILENCE)]
    for sample, mnemonic in events:
        symbol = phone_symbol(mnemonic, language)
        if symbol is None or (symbol == SILENCE and starts[-1][1] == SILENCE):
            continue
        if symbol in CLOSED and starts[-1][1] != SILENCE:
            loud = np.flatnonzero(np.abs(speech[starts[-1][0] : sample].astype(np.int32)) > CLOSURE_PEAK)
            sample = starts[-1][0] + int(loud[-1]) + 1 if len(loud) else sample
        starts.append((sample, symbol))
    return starts


def align(starts: list[tuple[int, str]], rate_hz: int, lead_seconds: float, duration_seconds: float) -> list[Phone]:
    """Gapless phones from 0 to duration_seconds; `starts` are samples at rate_hz, lead_seconds into the file."""
    times = [0.0, *(lead_seconds + sample / rate_hz for sample, _ in starts[1:]), duration_seconds]
    return [
        Phone(start, end, symbol)
        for start, end, (_, symbol) in zip(times[:-1], times[1:], starts, strict=True)
        if end > start
    ]


def record(speech: np.ndarray, rate_hz: int, generator: np.random.Generator) -> tuple[np.ndarray, float]:
    """A recording of int16 speech at rate_hz: float32 (T,) at 16 kHz and the seconds of room noise put before it."""
    lead, trail = (int(seconds * SAMPLE_RATE) for seconds in generator.uniform(0.1, 0.3, size=2))
    at_rate = torch.from_numpy(speech.astype(np.float32) / 32768.0)
    waveform = torchaudio.functional.resample(at_rate, rate_hz, SAMPLE_RATE).numpy()
    gain = 10 ** (generator.uniform(-4.0, 0.0) / 20)
    waveform = np.pad(waveform * gain, (lead, trail))
    waveform += generator.normal(scale=NOISE_RMS, size=waveform.shape)
    return np.clip(waveform, -0.99, 0.99).astype(np.float32), lead / SAMPLE_RATE


def readings(text_path: Path) -> Iterator[Reading]:
    """Texts are dealt to the voices in turn; those of up to three words are read by three voices.

    Every eleventh text is for validation: 11 and the number of voices have no common factor, so all voices get there.
    """
    counts = dict.fromkeys(VOICES, 0)
    with text_path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    for index, row in enumerate(rows):
        for step in (0, 4, 8) if len(row["text"].split()) <= 3 else (0,):
            voice = VOICES[(index + step) % len(VOICES)]
            utterance = f"audio/{voice.variant}-{counts[voice]:03d}"
            counts[voice] += 1
            yield Reading(utterance, row["language"], voice, "valid" if index % 11 == 4 else "train", row["text"])


def write_vorbis(path: Path, waveform: np.ndarray) -> None:
    """Writes waveform (T,) at 16 kHz as Ogg Vorbis."""
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, channels=1, format="OGG", subtype="VORBIS") as file:
        for start in range(0, len(waveform), VORBIS_BLOCK):
            file.write(waveform[start : start + VORBIS_BLOCK])


def write_table(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Tab separated, one header line, no quoting."""
    lines = ["\t".join(str(field) for field in row) for row in (header, *rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make(text_path: Path, output: Path) -> list[tuple[Reading, int, list[Phone]]]:
    """Writes the audio files and tables into output; returns (reading, samples, phones) per utterance."""
    espeak = Espeak()
    shutil.rmtree(output / "audio", ignore_errors=True)
    (output / "audio").mkdir(parents=True)
    made = []
    for index, reading in enumerate(readings(text_path)):
        speech, events = espeak.speak(reading.text, reading.language, reading.voice)
        waveform, lead_seconds = record(speech, espeak.rate_hz, np.random.default_rng([SEED, index]))
        seconds = len(waveform) / SAMPLE_RATE
        if not MIN_SECONDS <= seconds <= MAX_SECONDS:
            raise SampleError(
                f"{text_path}: {reading.text!r} lasts {seconds:.2f} s as read by {reading.voice.variant}; "
                f"change the text so that it lasts {MIN_SECONDS} to {MAX_SECONDS} s"
            )
        write_vorbis(output / f"{reading.utterance}.ogg", waveform)
        starts = phone_starts(speech, events, reading.language)
        made.append((reading, len(waveform), align(starts, espeak.rate_hz, lead_seconds, seconds)))
    made.sort(key=lambda item: item[0].utterance)
    for split in ("train", "valid"):
        rows = [(f"{reading.utterance}.ogg", samples) for reading, samples, _ in made if reading.split == split]
        write_manifest(output / f"{split}.tsv", Path("."), rows)
    write_table(
        output / "utterances.tsv",
        ("utt", "path", "samples", "language", "voice", "split", "text"),
        (
            (r.utterance, f"{r.utterance}.ogg", samples, r.language, r.voice.variant, r.split, r.text)
            for r, samples, _ in made
        ),
    )
    write_table(
        output / "phones.tsv",
        ("utt", "start_s", "end_s", "phone"),
        (
            (reading.utterance, f"{phone.start_seconds:.5f}", f"{phone.end_seconds:.5f}", phone.symbol)
            for reading, _, phones in made
            for phone in phones
        ),
    )
    write_table(
        output / "transcripts.tsv",
        ("utt", "phones"),
        (
            (reading.utterance, " ".join(phone.symbol for phone in phones if phone.symbol != SILENCE))
            for reading, _, phones in made
        ),
    )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=SAMPLE_DIR / "text.tsv", help="columns: language, text")
    parser.add_argument("--output", type=Path, default=SAMPLE_DIR)
    arguments = parser.parse_args()
    try:
        made = make(arguments.text, arguments.output)
    except SampleError as error:
        sys.exit(str(error))
    minutes = sum(samples for _, samples, _ in made) / SAMPLE_RATE / 60
    megabytes = sum(path.stat().st_size for path in (arguments.output / "audio").iterdir()) / 1e6
    phones = {phone.symbol for _, _, alignment in made for phone in alignment}
    print(f"{len(made)} utterances, {minutes:.2f} minutes, {megabytes:.2f} MB, {len(phones)} phone symbols")


if __name__ == "__main__":
    main()
