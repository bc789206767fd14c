"""Augmentation of waveforms: what is added where and how loud, how often, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from scipy.linalg import hadamard
from scipy.signal import fftconvolve
from scipy.stats import binomtest, chisquare, kstest

from pretrain.config import ConfigError, compose_recipe, run_config
from pretrain.data.augment.augmenter import Augmenter, open_augmenter
from pretrain.data.augment.options import (
    AugmentConfig,
    AugmentError,
    Babble,
    Mixing,
    Noise,
    Reverberation,
    WhiteNoise,
)
from pretrain.data.augment.signals import reverberate
from pretrain.data.manifest import Manifest, write_manifest
from pretrain.method import Example

TINY = compose_recipe("hubert_tiny")
SAMPLES = 400
UNLIKELY = 1e-3  # of tests with fixed seeds


def signs(rng: np.random.Generator, samples: int, level: float) -> np.ndarray:
    """Random signs at one level: every part has the power of the whole, so that ratios can be read off any sample."""
    return (level * rng.choice([-1.0, 1.0], samples)).astype(np.float32)


def write_files(folder: Path, waveforms: dict[str, np.ndarray]) -> Manifest:
    """The waveforms as float wavs with their manifest, `folder`/train.tsv."""
    folder.mkdir(parents=True)
    for name, waveform in waveforms.items():
        soundfile.write(folder / f"{name}.wav", waveform, 16_000, subtype="FLOAT")
    write_manifest(folder / "train.tsv", folder, [(f"{name}.wav", len(w)) for name, w in waveforms.items()])
    return Manifest.read(folder / "train.tsv")


def examples_of(waveforms: list[np.ndarray], epoch: int = 0) -> list[Example]:
    rows = enumerate(waveforms)
    return [Example(torch.from_numpy(w), row, 0, [], np.random.default_rng([7, epoch, row])) for row, w in rows]


def draw(augmenter: Augmenter, waveforms: list[np.ndarray], epochs: int) -> list[tuple[int, np.ndarray]]:
    """What `epochs` passes over `waveforms` add to each: (row, augmented - clean (T,) float64)."""
    added = []
    for epoch in range(epochs):
        problems: list[str] = []
        for row, example in enumerate(augmenter(examples_of(waveforms, epoch), problems)):
            added.append((row, example.waveform.numpy().astype(np.float64) - waveforms[row]))
        assert problems == []
    return added


def make(folder: Path, files: dict[str, np.ndarray] | None = None, /, **stages: Any) -> Augmenter:
    """An augmenter with `stages`, and with `files` of noise where given."""
    if files is not None:
        write_files(folder / "noise", files)
    augmenter = open_augmenter(AugmentConfig(**stages), str(folder / "noise"), None, None)  # type: ignore[arg-type]
    assert augmenter is not None
    return augmenter


def assert_uniform(values: list[float], low: float, high: float) -> None:
    assert low - 1e-3 <= min(values)
    assert max(values) <= high + 1e-3
    assert kstest(values, "uniform", (low, high - low)).pvalue > UNLIKELY


def assert_uniform_integers(values: list[int], counts: list[int]) -> None:
    """Each value is uniform between 0 and its own count - 1: spread over its step, the quotient is uniform."""
    spread = np.random.default_rng(0).random(len(values))
    assert_uniform(((np.array(values) + spread) / np.array(counts)).tolist(), 0.0, 1.0)


def region(added: np.ndarray) -> tuple[int, int]:
    """Where `added` is not zero: first sample and number; there is no hole in it."""
    places = np.flatnonzero(added)
    assert len(places) == places[-1] - places[0] + 1
    return int(places[0]), len(places)


def test_mixing_has_the_published_statistics(tmp_path: Path) -> None:
    """WavLM: a fifth of the utterances, -5 to 5 dB, at most half of the length, from anywhere to anywhere."""
    rng = np.random.default_rng(0)
    waveforms = [signs(rng, SAMPLES, level) for level in (0.1, 0.2, 0.3, 0.4)]
    augmenter = make(tmp_path, mixing=Mixing(0.2, [-5.0, 5.0]))
    drawn = draw(augmenter, waveforms, 2000)
    mixed = [(row, added) for row, added in drawn if added.any()]
    lengths, ratios, starts, sources, others = [], [], [], [], []
    for row, added in mixed:
        start, length = region(added)
        pattern = np.sign(added[start : start + length]).astype(np.int8).tobytes()
        found = [other for other in range(4) if pattern in np.sign(waveforms[other]).astype(np.int8).tobytes()]
        lengths.append(length)
        ratios.append(20 * np.log10(np.abs(waveforms[row][0]) / np.abs(added[start : start + length]).mean()))
        starts.append((start, SAMPLES - length + 1))
        if length >= 30:  # shorter patterns of signs occur by chance
            assert len(found) == 1
            assert found != [row]
            others.append((found[0] - row) % 4)
            sources.append((np.sign(waveforms[found[0]]).astype(np.int8).tobytes().find(pattern), SAMPLES - length + 1))
    # A mixed part of length 0 cannot be told from none.
    assert binomtest(len(mixed), len(drawn), 0.2 * 200 / 201).pvalue > UNLIKELY
    assert max(lengths) <= SAMPLES // 2
    assert_uniform_integers([length - 1 for length in lengths], [SAMPLES // 2] * len(lengths))
    assert_uniform(ratios, -5.0, 5.0)
    for places in (starts, sources):
        assert_uniform_integers([first for first, _ in places], [count for _, count in places])
    assert chisquare(np.bincount(others)[1:]).pvalue > UNLIKELY


def test_an_utterance_alone_in_its_micro_batch_is_not_mixed(tmp_path: Path) -> None:
    waveform = signs(np.random.default_rng(0), SAMPLES, 0.5)
    augmenter = make(tmp_path, mixing=Mixing(1.0, [0.0, 0.0]))
    alone, twice = examples_of([waveform]), examples_of([waveform, waveform])
    twice[1].row = twice[0].row  # two crops of one row
    for examples in (alone, twice):
        pairs = zip(examples, augmenter(examples, []), strict=True)
        assert all(torch.equal(clean.waveform, augmented.waveform) for clean, augmented in pairs)


@pytest.mark.parametrize("samples", [150, 2000], ids=["short files", "long files"])
def test_noise_over_the_whole_has_the_ratio_that_was_drawn(tmp_path: Path, samples: int) -> None:
    rng = np.random.default_rng(1)
    waveforms = [rng.normal(0, level, SAMPLES).astype(np.float32) for level in (0.01, 0.1, 0.5)]
    noise = {str(i): rng.normal(0, 10.0**-i, samples).astype(np.float32) for i in range(3)}
    drawn = draw(make(tmp_path, noise, noise=Noise(0.4, [-5.0, 20.0])), waveforms, 700)
    noisy = [(row, added) for row, added in drawn if added.any()]
    assert binomtest(len(noisy), len(drawn), 0.4).pvalue > UNLIKELY
    ratios = [10 * np.log10(np.mean(waveforms[row] ** 2) / np.mean(added**2)) for row, added in noisy]
    assert_uniform(ratios, -5.0, 20.0)
    # What was added is a piece of one of the files, repeated where the file is shorter.
    places = {name: [] for name in noise}
    for _, added in noisy[:150]:
        for name, file in noise.items():
            line = np.resize(file, SAMPLES + samples) if samples < SAMPLES else file
            windows = np.lib.stride_tricks.sliding_window_view(line.astype(np.float64), SAMPLES)
            windows = windows[:samples] if samples < SAMPLES else windows
            likeness = windows @ added / (np.linalg.norm(windows, axis=1) * np.linalg.norm(added))
            if likeness.max() > 0.999:
                places[name].append((int(likeness.argmax()), len(windows)))
    assert sum(map(len, places.values())) == 150
    assert chisquare([len(found) for found in places.values()]).pvalue > UNLIKELY
    found = [place for of_file in places.values() for place in of_file]
    assert_uniform_integers([start for start, _ in found], [count for _, count in found])


@pytest.mark.parametrize("stage", [Noise, WhiteNoise])
def test_a_range_of_one_number_gives_that_ratio(tmp_path: Path, stage: Callable[..., Any]) -> None:
    rng = np.random.default_rng(2)
    waveforms = [rng.normal(0, 0.2, SAMPLES).astype(np.float32)]
    noise = {"a": rng.normal(0, 0.01, 1000).astype(np.float32)}
    name = "noise" if stage is Noise else "white_noise"
    for _, added in draw(make(tmp_path, noise, **{name: stage(1.0, [7.0, 7.0])}), waveforms, 20):
        assert 10 * np.log10(np.mean(waveforms[0] ** 2) / np.mean(added**2)) == pytest.approx(7.0, abs=1e-3)


def test_noise_over_a_part(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    waveforms = [signs(rng, SAMPLES, 0.25)]
    noise = {"long": signs(rng, 3000, 0.5), "short": signs(rng, 80, 0.125)}
    drawn = draw(make(tmp_path, noise, noise=Noise(1.0, [-5.0, 20.0], max_part=0.5)), waveforms, 2000)
    lengths = {"long": [], "short": []}
    ratios = []
    for _, added in drawn:
        if added.any():
            start, length = region(added)
            pattern = np.sign(added[start : start + length]).astype(np.int8).tobytes()
            files = [name for name, file in noise.items() if pattern in np.sign(file).astype(np.int8).tobytes()]
            if length >= 30:
                lengths[files[0]].append(length)
            ratios.append(20 * np.log10(0.25 / np.abs(added[start : start + length]).mean()))
    assert_uniform(ratios, -5.0, 20.0)
    for name, longest in (("long", 200), ("short", 80)):
        assert max(lengths[name]) <= longest
        assert_uniform_integers([n - 30 for n in lengths[name]], [longest - 29] * len(lengths[name]))


def test_babble_is_a_sum_of_others_of_equal_power(tmp_path: Path) -> None:
    """Eight orthogonal utterances: projections count how often each of them is in the babble."""
    base = hadamard(8) * np.array([0.05, 0.1, 0.2, 0.3, 0.4, 0.1, 0.2, 0.3])[:, None]
    waveforms = [np.tile(row, SAMPLES // 8).astype(np.float32) for row in base]
    speech = write_files(tmp_path / "speech", {str(i): w for i, w in enumerate(waveforms)})
    augmenter = open_augmenter(AugmentConfig(babble=Babble(0.5, [5.0, 15.0], [3, 7])), None, None, speech)
    drawn = draw(augmenter, waveforms, 150)
    talkers, heard, ratios = [], np.zeros((8, 8)), []
    for row, added in drawn:
        if added.any():
            projections = np.array([added @ w / np.linalg.norm(w) for w in waveforms])
            counts = projections / projections[projections > 1e-4].min()
            # The smallest count may be 2 or 3: the power of the whole settles the unit.
            assert np.abs(projections[row]) < 1e-4
            whole = next(k for k in (1, 2, 3) if np.allclose(k * counts, np.round(k * counts), atol=1e-2))
            talkers.append(int(np.round(whole * counts).sum()))
            heard[row] += np.round(whole * counts) > 0
            ratios.append(10 * np.log10(np.mean(waveforms[row] ** 2) / np.mean(added**2)))
    assert binomtest(len(talkers), len(drawn), 0.5).pvalue > UNLIKELY
    assert chisquare(np.bincount(talkers, minlength=8)[3:]).pvalue > UNLIKELY
    assert_uniform(ratios, 5.0, 15.0)
    assert chisquare(heard.sum(0)).pvalue > UNLIKELY


@pytest.mark.parametrize(("samples", "taps"), [(5000, 900), (240_000, 16_000), (240_000, 40_000), (700, 5000), (1, 1)])
def test_reverberation_is_scipys_convolution_shifted_to_the_peak(samples: int, taps: int) -> None:
    rng = np.random.default_rng(4)
    waveform = rng.normal(0, 0.1, samples).astype(np.float32)
    response = (rng.normal(0, 1e-3, taps) * np.exp(-np.arange(taps) / (taps / 5))).astype(np.float32)
    peak = taps // 10
    response[peak] = -0.02
    expected = fftconvolve(waveform.astype(np.float64), response.astype(np.float64))[peak : peak + samples]
    expected *= np.sqrt(np.sum(waveform.astype(np.float64) ** 2) / np.sum(expected**2))
    wet = reverberate(waveform, response)
    assert wet.dtype == np.float32
    assert wet.shape == waveform.shape
    np.testing.assert_allclose(wet, expected, atol=2e-6)


def test_reverberation_keeps_alignment_and_takes_a_random_response(tmp_path: Path) -> None:
    """A pure delay is no change at all; of two responses each comes about half of the time."""
    rng = np.random.default_rng(5)
    waveforms = [signs(rng, SAMPLES, 0.25) for _ in range(3)]
    delay, echo = np.zeros(300, np.float32), np.zeros(300, np.float32)
    delay[137], echo[10], echo[60] = 0.01, 0.02, 0.01
    write_files(tmp_path / "rirs", {"delay": delay, "echo": echo})
    options = AugmentConfig(reverberation=Reverberation(0.6))
    augmenter = open_augmenter(options, None, str(tmp_path / "rirs" / "train.tsv"), None)  # type: ignore[arg-type]
    changed = [(row, added) for row, added in draw(augmenter, waveforms, 500) if np.abs(added).max() > 1e-4]
    assert binomtest(len(changed), 1500, 0.3).pvalue > UNLIKELY
    for row, added in changed:
        dry = waveforms[row].astype(np.float64)
        wet = dry + 0.5 * np.concatenate([np.zeros(50), dry[:-50]])
        wet *= np.linalg.norm(dry) / np.linalg.norm(wet)
        np.testing.assert_allclose(added, wet - dry, atol=1e-6)


def test_of_exclusive_stages_one_at_most_is_applied(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    waveforms, noise = [signs(rng, SAMPLES, 0.25)] * 2, {"a": signs(rng, 1000, 0.5)}
    stages = {"noise": Noise(0.3, [0.0, 10.0]), "white_noise": WhiteNoise(0.5, [0.0, 10.0])}
    for exclusive, shares in ((True, (0.3, 0.5)), (False, (0.3 * 0.5, 0.5))):
        folder = tmp_path / str(exclusive)
        drawn = draw(make(folder, noise, exclusive=exclusive, **stages), waveforms, 800)
        # Noise of one level alone leaves the size of what is added constant, white noise never does.
        spread = [np.std(np.abs(added)) / np.mean(np.abs(added)) for _, added in drawn if added.any()]
        counts = [sum(s < 1e-3 for s in spread), sum(s > 1e-3 for s in spread)]
        for count, share in zip(counts, shares, strict=True):
            assert binomtest(count, len(drawn), share).pvalue > UNLIKELY


def test_ratios_refer_to_the_utterance_whatever_came_before(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    waveforms, noise = [signs(rng, SAMPLES, 0.25)], {"a": signs(rng, 1000, 0.5)}
    one = draw(make(tmp_path, noise, noise=Noise(1.0, [0.0, 0.0])), waveforms, 200)
    both = draw(make(tmp_path, noise=Noise(1.0, [0.0, 0.0]), white_noise=WhiteNoise(1.0, [0.0, 0.0])), waveforms, 200)
    assert np.mean([np.mean(added**2) for _, added in one]) == pytest.approx(0.25**2, rel=1e-3)
    assert np.mean([np.mean(added**2) for _, added in both]) == pytest.approx(2 * 0.25**2, rel=0.02)


def test_silence_stays_silent_and_finite(tmp_path: Path) -> None:
    loud, silent = np.full(SAMPLES, 0.5, np.float32), np.zeros(SAMPLES, np.float32)
    write_files(tmp_path / "noise", {"silent": silent})
    write_files(tmp_path / "rirs", {"silent": silent})
    speech = write_files(tmp_path / "speech", {"a": silent, "b": silent})
    levels, files = [0.0, 0.0], (str(tmp_path / "noise"), str(tmp_path / "rirs"), speech)
    stages = {
        "reverberation": Reverberation(1.0),
        "mixing": Mixing(1.0, levels),
        "babble": Babble(1.0, levels, [1, 2]),
        "noise": Noise(1.0, levels),
        "white_noise": WhiteNoise(1.0, levels),
    }
    for waveforms in ([silent, loud], [silent, silent]):
        augmenter = open_augmenter(AugmentConfig(**stages), *files)
        first, *_ = augmenter(examples_of(waveforms), [])
        assert not first.waveform.any()
    del stages["white_noise"]
    augmenter = open_augmenter(AugmentConfig(**stages), *files)
    _, second = augmenter(examples_of([silent, loud]), [])
    np.testing.assert_array_equal(second.waveform.numpy(), loud)


def test_a_noise_that_cannot_be_read_is_replaced_and_reported(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    waveforms = [signs(rng, SAMPLES, 0.25)] * 4
    augmenter = make(tmp_path, {name: signs(rng, 1000, 0.5) for name in "ab"}, noise=Noise(1.0, [0.0, 0.0]))
    (tmp_path / "noise" / "a.wav").write_bytes(b"\x07" * 5000)
    problems: list[str] = []
    examples = [example for epoch in range(10) for example in augmenter(examples_of(waveforms, epoch), problems)]
    assert all(not np.array_equal(example.waveform.numpy(), waveforms[0]) for example in examples)
    assert 20 < len(problems) < 80
    assert all(problem.startswith(f"{tmp_path / 'noise' / 'a.wav'}: ") for problem in problems)
    (tmp_path / "noise" / "b.wav").unlink()
    with pytest.raises(Exception, match=r"data\.noise: 8 files drawn one after the other could not be read"):
        augmenter(examples_of(waveforms), [])


def test_only_the_piece_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def remember(path: str, start: int, samples: int) -> np.ndarray:
        read.append(samples)
        return np.ones(samples, np.float32)

    monkeypatch.setattr("pretrain.data.augment.clips.read_audio", remember)
    rng = np.random.default_rng(9)
    draw(make(tmp_path, {"a": signs(rng, 100_000, 0.5)}, noise=Noise(1.0, [0.0, 0.0])), [signs(rng, SAMPLES, 0.2)], 5)
    assert read == [SAMPLES] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("noise: {prob: 0.4}", r"augment\.noise\.snr_db: missing; state it"),
        (
            "noise: {prob: 0.0, snr_db: [0, 10]}",
            r"augment\.noise\.prob: 0 is not in \(0, 1\]; set augment\.noise to null",
        ),
        ("noise: {prob: 0.4, snr_db: [10, 0]}", r"augment\.noise\.snr_db: \[10\.0, 0\.0\] is not \[lowest, highest\]"),
        ("noise: {prob: 0.4, snr_db: [0, 101]}", r"augment\.noise\.snr_db: .* give two numbers from -100 to 100"),
        ("white_noise: {prob: 0.4, snr_db: [-500, 0]}", r"augment\.white_noise\.snr_db: .* from -100 to 100"),
        ("mixing: {prob: 0.4, snr_db: [.nan, 0]}", r"augment\.mixing\.snr_db: \[nan, 0\.0\] is not"),
        ("noise: {prob: 0.4, snr_db: [0, 1], max_part: 1.5}", r"augment\.noise\.max_part: 1\.5 is not in \(0, 1\]"),
        (
            "mixing: {prob: 0.2, snr_db: [-5, 5], max_part: 0.6}",
            r"augment\.mixing\.max_part: 0\.6 is not in \(0, 0\.5\]",
        ),
        (
            "babble: {prob: 0.2, snr_db: [-5, 5], talkers: [3]}",
            r"augment\.babble\.talkers: \[3\] is not \[fewest, most\]",
        ),
        ("reverberation: {prob: 1.2}", r"augment\.reverberation\.prob: 1\.2 is not in"),
        ("exclusive: true, reverberation: {prob: 0.6}, white_noise: {prob: 0.6, snr_db: [0, 1]}", r"add up to 1\.2"),
        ("nose: {prob: 0.4}", r"augment\.nose: no such option; did you mean noise"),
    ],
)
def test_wrong_options_are_named(options: str, message: str) -> None:
    values = TINY | {"augment": yaml.safe_load(f"{{{options}}}")}
    with pytest.raises((AugmentError, ConfigError), match=message):
        run_config(values)


def test_recipes_and_the_command_line_state_stages() -> None:
    changes = ["augment.noise={prob:0.4,snr_db:[0,10]}", "augment.exclusive=true", "data.noise=data/noise"]
    config = run_config(compose_recipe("hubert_tiny", changes))
    assert config.augment == AugmentConfig(exclusive=True, noise=Noise(0.4, [0.0, 10.0], None))
    assert config.data.noise == "data/noise"
    assert run_config(TINY).augment.stages() == {}


def test_missing_files_are_named_with_the_command_that_makes_them(tmp_path: Path) -> None:
    noise, reverberation = AugmentConfig(noise=Noise(0.4, [0.0, 1.0])), AugmentConfig(reverberation=Reverberation(0.5))
    rng = np.random.default_rng(0)
    manifest = write_files(tmp_path / "noise", {"a": signs(rng, 100, 0.1), "b": signs(rng, 100, 0.1)})
    command = r"python tools/prepare_manifest\.py audio_dir=<folder of audio> output=data/"
    with pytest.raises(AugmentError, match=rf"data\.noise: missing, .*augment\.noise .*{command}noise valid_percent=0"):
        open_augmenter(noise, None, None, manifest)
    with pytest.raises(AugmentError, match=rf"data\.rirs: missing, .*{command}rirs .*min_seconds=0\.01"):
        open_augmenter(reverberation, str(tmp_path / "noise"), None, manifest)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(AugmentError, match=rf"data\.noise: .*nothing/train\.tsv does not exist; .*{command}"):
        open_augmenter(noise, str(tmp_path / "nothing"), None, manifest)
    write_manifest(tmp_path / "long.tsv", tmp_path / "noise", [("a.wav", 31 * 16_000)])
    with pytest.raises(AugmentError, match=r"data\.rirs: .*a\.wav has 31 s, and impulse responses a few"):
        open_augmenter(reverberation, None, str(tmp_path / "long.tsv"), manifest)
    (tmp_path / "noise" / "b.wav").unlink()
    with pytest.raises(AugmentError, match=r"data\.noise: .*lists files that do not exist \(.*b\.wav\); make it anew"):
        open_augmenter(noise, str(tmp_path / "noise"), None, manifest)
    one = write_files(tmp_path / "one", {"a": signs(rng, 100, 0.1)})
    with pytest.raises(AugmentError, match=r"augment\.babble: the training data have one utterance"):
        open_augmenter(AugmentConfig(babble=Babble(0.5, [0.0, 1.0], [3, 7])), None, None, one)
