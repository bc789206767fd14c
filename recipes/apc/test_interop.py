"""APC and VQ-APC checkpoints of s3prl: in, out, and in the unmodified client on real audio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import s3prl_compat  # noqa: F401  (must come before s3prl)
import soundfile
import torch
from conftest import ROOT
from recipe_checks import assert_same_states, build, method_state, perturb, two_waveforms, write_checkpoint
from s3prl.nn import S3PRLUpstream
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pretrain import Upstream
from pretrain.weights.export import ExportConfig, export
from pretrain.weights.interop.types import InteropError, TrainedMethod
from pretrain.weights.read import initialise
from recipes.apc import interop

SMALL = ("method.encoder.hidden_size=24", "method.encoder.dropout=0.3")
VARIANTS = {
    "apc": ("apc_360hr", *SMALL),
    "vq_apc": (
        "vq_apc_360hr",
        *SMALL,
        "method.encoder.quantizer.codebook_sizes=[9,7]",
        "method.encoder.quantizer.code_dims=[10,14]",
    ),
    "multi_target": ("apc_multi_target", *SMALL),
    "no_residual": (
        "apc_360hr",
        *SMALL,
        "method.encoder.residual=false",
        "method.encoder.front_end.normalization.kind=none",
    ),
}


@pytest.fixture(scope="module", params=VARIANTS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of ours and its s3prl file."""
    folder = tmp_path_factory.mktemp(request.param)
    method = build(*VARIANTS[request.param])
    perturb(method)
    checkpoint = write_checkpoint(folder / "run", method)
    export(ExportConfig(str(checkpoint), str(folder / "apc.pt"), "s3prl"))
    return checkpoint, folder / "apc.pt"


def speech() -> tuple[Tensor, Tensor]:
    """Three utterances of the embedded sample."""
    files = sorted((ROOT / "pretrain" / "data" / "sample" / "audio").glob("*.ogg"))[:60:20]
    waveforms = [torch.from_numpy(soundfile.read(path, dtype="float32")[0]) for path in files]
    return pad_sequence(waveforms, batch_first=True), torch.tensor([len(waveform) for waveform in waveforms])


def test_equals_the_s3prl_client(exported: tuple[Path, Path]) -> None:
    ours, theirs = Upstream("apc", str(exported[0])), S3PRLUpstream("apc_local", str(exported[1]))
    assert ours.num_layers == theirs.num_layers == 3
    assert ours.hidden_sizes == theirs.hidden_sizes
    assert list(ours.downsample_rates) == list(theirs.downsample_rates) == [160] * 3
    waveforms, _ = two_waveforms()
    for samples in (27_200, 16_079, 16_080, 800, 100):
        assert_same_states(ours, theirs, waveforms[:1, :samples], torch.tensor([samples]))
    assert_same_states(ours, theirs, *two_waveforms())
    assert_same_states(ours, theirs, *speech())


def test_a_waveform_has_the_same_states_alone_and_in_a_batch(exported: tuple[Path, Path]) -> None:
    upstream = Upstream("apc", str(exported[0])).eval()
    waveforms, lengths = speech()
    with torch.no_grad():
        together, _ = upstream(waveforms, lengths)
        for row, samples in enumerate(lengths.tolist()):
            alone, _ = upstream(waveforms[row : row + 1, :samples], lengths[row : row + 1])
            frames = (samples - 400) // 160 + 1
            for state, single in zip(together, alone, strict=True):
                torch.testing.assert_close(state[row, :frames], single[0, :frames], rtol=1e-4, atol=2e-5)


def test_the_client_holds_exactly_our_tensors(exported: tuple[Path, Path]) -> None:
    written = torch.load(exported[1], weights_only=True)["model"]
    loaded = S3PRLUpstream("apc_local", str(exported[1])).upstream.model.state_dict()
    assert written.keys() == loaded.keys()
    assert all(torch.equal(written[key], loaded[key]) for key in written)


def test_there_and_back(exported: tuple[Path, Path]) -> None:
    checkpoint = torch.load(exported[1], weights_only=True)
    imported = interop.from_pt(checkpoint)
    config = {"encoder": imported.encoder_config, "time_shift": checkpoint["config"]["task"]["n_future"]}
    state = method_state(imported)
    again = interop.to_s3prl(TrainedMethod("apc", config, state))
    assert again["config"] == checkpoint["config"]
    assert again["model"].keys() == checkpoint["model"].keys()
    assert all(torch.equal(tensor, checkpoint["model"][key]) for key, tensor in again["model"].items())
    ours, from_file = Upstream("apc", str(exported[0])), Upstream("apc", str(exported[1]))
    assert_same_states(from_file, ours, *two_waveforms(), rtol=0)


def test_pre_training_goes_on_from_an_s3prl_file(tmp_path: Path) -> None:
    temperature = "method.encoder.quantizer.temperature=0.3"
    source, fresh = build(*VARIANTS["vq_apc"]), build(*VARIANTS["vq_apc"], temperature)
    perturb(source)
    export(ExportConfig(str(write_checkpoint(tmp_path / "run", source)), str(tmp_path / "apc.pt"), "s3prl"))
    initialise(fresh, str(tmp_path / "apc.pt"), "keep")
    assert all(torch.equal(tensor, source.state_dict()[key]) for key, tensor in fresh.state_dict().items())


def checkpoint(**changes: Any) -> dict[str, Any]:
    paras = {"hidden_size": 24, "num_layers": 3, "dropout": 0.1, "residual": True}
    audio = {"feat_type": "fbank", "feat_dim": 80}
    return {"config": {"model": {"paras": paras}, "data": {"audio": audio | changes}}, "model": {}}


def test_what_cannot_be_imported_or_exported_says_why() -> None:
    with pytest.raises(InteropError, match="not s3prl's apc layout"):
        interop.from_pt({"Transformer": {}, "Config": {}})
    with pytest.raises(InteropError, match=r"data\.audio\.frame_shift: 20 is not supported"):
        interop.from_pt(checkpoint(frame_shift=20))
    with pytest.raises(InteropError, match=r"data\.audio\.low_freq"):
        interop.from_pt(checkpoint(low_freq=60.0))
    npc = checkpoint()
    npc["config"]["model"]["paras"]["kernel_size"] = 15
    with pytest.raises(InteropError, match="kernel_size: no option of APC"):
        interop.from_pt(npc)
    method = build("apc_360hr", *SMALL, "method.encoder.num_layers=2")
    config = {"encoder": method.encoder.to_config(), "time_shift": 5}
    with pytest.raises(InteropError, match="reads 3 layers at least"):
        interop.to_s3prl(TrainedMethod("apc", config, dict(method.state_dict())))
    method = build("apc_360hr", *SMALL)
    config = {"encoder": method.encoder.to_config(), "time_shift": 5}
    state = {key: tensor for key, tensor in method.state_dict().items() if key.startswith("encoder.")}
    with pytest.raises(InteropError, match=r"missing postnet\.weight"):
        interop.to_s3prl(TrainedMethod("apc", config, state))
    config["encoder"]["front_end"]["window"] = "povey"
    with pytest.raises(InteropError, match=r"front_end\.window: 'povey' has no counterpart"):
        interop.to_s3prl(TrainedMethod("apc", config, dict(method.state_dict())))
