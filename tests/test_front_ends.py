"""Front ends against torchaudio per waveform, and against s3prl's own extractors on real and synthetic speech."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import s3prl_compat  # noqa: F401  (must come before s3prl)
import soundfile
import torch
from conftest import ROOT
from s3prl.upstream.apc.audio import create_transform
from s3prl.upstream.baseline.extracter import get_extracter
from s3prl.upstream.baseline.preprocessor import get_preprocessor
from torch import Tensor
from torchaudio.compliance import kaldi

from pretrain.config import encoder_config, typed
from pretrain.errors import UserError
from pretrain.features.front_end import (
    FbankConfig,
    FixedNormalizationConfig,
    FrontEnd,
    FrontEndConfig,
    LogLinearConfig,
    LogMelConfig,
    NormalizationConfig,
)

UTTERANCE, NONE = NormalizationConfig("utterance"), NormalizationConfig("none")
LOG_MEL = LogMelConfig("log_mel", 1, UTTERANCE, bins=80, level_db=-25.0)
LOG_LINEAR = LogLinearConfig("log_linear", 1, UTTERANCE, level_db=-25.0)
FBANK_240 = FbankConfig("fbank", 1, UTTERANCE, bins=80, window="povey", low_hz=20.0, deltas=2)
HAMMING = FbankConfig("fbank", 1, UTTERANCE, bins=80, window="hamming", low_hz=20.0, deltas=0)
EVERY_SECOND = FbankConfig("fbank", 2, UTTERANCE, bins=80, window="hamming", low_hz=20.0, deltas=0)
MPC = FbankConfig("fbank", 1, NONE, bins=40, window="povey", low_hz=60.0, deltas=0)
AST = replace(HAMMING, normalization=FixedNormalizationConfig("fixed", mean=[-4.2677393], deviation=[9.1379948]))
ALL = {"mel": LOG_MEL, "linear": LOG_LINEAR, "240": FBANK_240, "hamming": HAMMING, "step": EVERY_SECOND}
ALL |= {"mpc": MPC, "ast": AST}
STFT = {"win_ms": 25, "hop_ms": 10, "n_freq": 201, "n_mels": 80, "n_mfcc": 13, "target_level": -25}


@cache
def preprocessor(kind: str) -> torch.nn.Module:
    """s3prl's OnlinePreprocessor for one kind of feature."""
    features = {"feat_type": kind, "channel": 0, "log": True, "delta": 0, "cmvn": True}
    return get_preprocessor(STFT | {"input": features}, process_input_only=True)[0]


def online(waveform: Tensor, kind: str) -> Tensor:
    """Its features of one waveform, after the level that its builder sets."""
    level = 10 ** (STFT["target_level"] / 20) / (waveform.square().mean().sqrt() + 1e-10)
    return preprocessor(kind)((waveform * level)[None, None], wavs_len=[len(waveform)])[0][0]


def s3prl_features(name: str, waveform: Tensor) -> Tensor:
    """(F, D) features of one waveform, by the code of the upstream that uses them."""
    if name in ("mel", "linear"):
        return online(waveform, name)
    if name == "240":
        audio = {"kaldi": {"feat_type": "fbank", "fbank": {"num_mel_bins": 80, "frame_length": 25.0}}}
        extract, _, _ = get_extracter(audio | {"delta": {"order": 2, "win_length": 5}, "cmvn": {"use_cmvn": True}})
        return extract(waveform)
    extract, _ = create_transform({"feat_type": "fbank", "feat_dim": 80, "frame_length": 25, "frame_shift": 10})
    return extract(waveform[None])[:: 2 if name == "step" else 1]


def audio(path: Path) -> Tensor:
    return torch.from_numpy(soundfile.read(path, dtype="float32")[0])


def noise(samples: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def features(config: FrontEndConfig, waveform: Tensor) -> Tensor:
    return FrontEnd(config)(waveform[None], None)[0][0]


def assert_as_s3prl(files: list[Path]) -> None:
    assert len(files) >= 3
    for path in files:
        waveform = audio(path)
        for name in ("mel", "linear", "240", "hamming", "step"):
            torch.testing.assert_close(features(ALL[name], waveform), s3prl_features(name, waveform), rtol=0, atol=1e-4)


def test_s3prl_on_the_embedded_sample() -> None:
    assert_as_s3prl(sorted((ROOT / "pretrain" / "data" / "sample" / "audio").rglob("*.*"))[::50])


def test_s3prl_on_real_speech(shared_dir: Path) -> None:
    files = sorted((shared_dir / "data" / "mboshi" / "dev").rglob("*.flac"))
    assert_as_s3prl(files[::100])


@pytest.mark.parametrize("window", ["povey", "hamming"])
@pytest.mark.parametrize(("bins", "low_hz"), [(80, 20.0), (40, 60.0), (23, 0.0)])
def test_the_batched_filter_banks_are_torchaudios(window: str, bins: int, low_hz: float) -> None:
    config = FbankConfig("fbank", 1, NONE, bins=bins, window=window, low_hz=low_hz, deltas=0)
    waveforms = torch.stack([noise(9_000, seed) + 0.3 * seed for seed in range(3)])
    waveforms[1, 2_000:5_000] = 0.0  # digital silence reaches the floor
    batched, counts = FrontEnd(config)(waveforms, None)
    assert counts is None
    for row, waveform in zip(batched, waveforms, strict=True):
        expected = kaldi.fbank(waveform[None], num_mel_bins=bins, low_freq=low_hz, window_type=window)
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shorter", [16_079, 12_800, 700, 150])
def test_a_padded_row_is_the_waveform_alone(name: str, shorter: int) -> None:
    front_end = FrontEnd(ALL[name])
    lengths = torch.tensor([16_500, shorter])
    waveforms = torch.stack([noise(16_500, seed) for seed in range(2)]) * (torch.arange(16_500) < lengths[:, None])
    padded, counts = front_end(waveforms, lengths)
    assert padded.shape == (2, front_end.frames(16_500), front_end.dim)
    assert counts.tolist() == [front_end.frames(16_500), max(1, front_end.frames(shorter))]
    assert not padded[1, counts[1] :].any()
    assert torch.isfinite(padded).all()
    for index, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        if length >= front_end.receptive_field_samples:
            alone, _ = front_end(waveforms[index : index + 1, :length], None)
            torch.testing.assert_close(padded[index, :count], alone[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("samples", [400, 559, 560, 8_001, 31_999])
def test_frame_counts_and_the_crop_grid(name: str, samples: int) -> None:
    config, front_end = ALL[name], FrontEnd(ALL[name])
    frames = len(features(config, noise(samples)))
    assert frames == front_end.frames(samples) == config.frames(torch.tensor([samples])).item()
    assert config.frames(samples + config.stride_samples) == frames + 1


def test_frames_are_normalised_over_the_utterance() -> None:
    made = features(FBANK_240, noise(32_000))
    torch.testing.assert_close(made.mean(0), torch.zeros(240), rtol=0, atol=1e-5)
    torch.testing.assert_close(made.std(0), torch.ones(240), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_silence_stays_finite_and_nothing_is_trained_or_saved(name: str) -> None:
    front_end = FrontEnd(ALL[name])
    waveforms = torch.zeros(2, 4_000, requires_grad=True)
    made, _ = front_end(waveforms, torch.tensor([4_000, 2_000]))
    assert torch.isfinite(made).all()
    assert not made.requires_grad
    assert not list(front_end.parameters())
    assert not front_end.state_dict()


def test_features_are_float32_under_bf16_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        made, _ = FrontEnd(LOG_MEL)(noise(8_000)[None], None)
    torch.testing.assert_close(made[0], features(LOG_MEL, noise(8_000)), rtol=0, atol=0)


def test_given_mean_and_deviation() -> None:
    """One number for all dimensions, or one for each; the frames behind a padded row stay zero."""
    raw = features(MPC, noise(16_000))
    mean, deviation = [float(value) for value in range(40)], [1.0 + value for value in range(40)]
    each = replace(MPC, normalization=FixedNormalizationConfig("fixed", mean, deviation))
    torch.testing.assert_close(
        features(each, noise(16_000)), (raw - torch.tensor(mean)) / torch.tensor(deviation), rtol=0, atol=1e-5
    )
    one = replace(MPC, normalization=FixedNormalizationConfig("fixed", [3.0], [2.0]))
    torch.testing.assert_close(features(one, noise(16_000)), (raw - 3) / 2, rtol=0, atol=1e-5)


@dataclass
class Holder:
    """A configuration with a front end, as encoders have."""

    front_end: FrontEndConfig
    target: FrontEndConfig | None


@pytest.mark.parametrize("name", ALL)
def test_the_kind_names_the_class(name: str) -> None:
    config = Holder(ALL[name], None)
    assert typed(Holder, asdict(config)) == config
    assert encoder_config(Holder, asdict(Holder(LOG_MEL, ALL[name]))) == Holder(LOG_MEL, ALL[name])


def test_null_takes_away_what_another_kind_has() -> None:
    """So a recipe can take another kind than the recipe that it starts from."""
    values = asdict(Holder(HAMMING, None))
    values["front_end"] |= {"level_db": None}
    assert typed(Holder, values) == Holder(HAMMING, None)


@pytest.mark.parametrize("name", ["mel", "linear", "240", "step", "mpc"])
def test_an_export_of_before_the_kinds_is_read(name: str) -> None:
    """Its block was flat: `cmvn`, and null (or no differences) where a field belonged to another kind."""
    values = asdict(ALL[name])
    old = {"window": None, "low_hz": None, "deltas": 0, "level_db": None, "bins": 201} | values
    old["cmvn"] = old.pop("normalization")["kind"] == "utterance"
    assert encoder_config(Holder, {"front_end": old, "target": None}) == Holder(ALL[name], None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "mfcc"}, r"^front_end\.kind: unknown kind 'mfcc'"),
        ({"kind": None}, r"^front_end\.kind: missing; state one of"),
        ({"level_db": -25.0}, r"^front_end\.level_db: no such option"),
        ({"bins": None}, r"^front_end\.bins: "),
        ({"window": "hann"}, "povey or hamming"),
        ({"kind": "log_mel", "level_db": -25.0}, r"^front_end\.window: no such option"),
        ({"frame_step": 0}, "at least 1"),
        ({"normalization": {"kind": "given"}}, r"^front_end\.normalization\.kind: unknown kind 'given'"),
        ({"normalization": {"kind": "fixed", "mean": [0.0]}}, r"^front_end\.normalization\.deviation: missing"),
        ({"normalization": {"kind": "fixed", "mean": [0.0], "deviation": [0.0]}}, "must be positive"),
        ({"normalization": {"kind": "fixed", "mean": [0.0] * 2, "deviation": [1.0]}}, "2 numbers for 80 dimensions"),
    ],
)
def test_what_does_not_fit_together_says_so(changes: dict[str, Any], message: str) -> None:
    values = asdict(HAMMING) | changes
    with pytest.raises(UserError, match=message):
        typed(Holder, {"front_end": values, "target": None})
