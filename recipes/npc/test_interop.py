"""NPC checkpoints of s3prl: in, out, and in the unmodified client on real audio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import s3prl_compat  # noqa: F401  (must come before s3prl)
import soundfile
import torch
from conftest import ROOT
from recipe_checks import (
    assert_same_states,
    build,
    group,
    load_fixture,
    method_state,
    perturb,
    two_waveforms,
    write_checkpoint,
)
from s3prl.nn import S3PRLUpstream
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pretrain import Upstream
from pretrain.models.batch_norm import update_running_statistics
from pretrain.weights.export import ExportConfig, export
from pretrain.weights.interop.types import InteropError, TrainedMethod
from pretrain.weights.read import initialise
from recipes.npc import interop
from recipes.npc.encoder import NpcEncoder

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = ("method.encoder.hidden_size=24", "method.encoder.dropout=0.3")
CODES = ("method.encoder.quantizer.codebook_sizes=[9,7]", "method.encoder.quantizer.code_dims=[10,14]")
VARIANTS = {
    "npc": (*SMALL, *CODES),
    "three_blocks": (*SMALL, *CODES, "method.encoder.n_blocks=3", "method.encoder.mask_size=3"),
    "no_quantizer": (*SMALL, "method.encoder.quantizer=null", "method.encoder.residual=false"),
}


@pytest.fixture(scope="module", params=VARIANTS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of ours, its statistics moved by an update, and its s3prl file."""
    folder = tmp_path_factory.mktemp(request.param)
    method = build("npc_360hr", *VARIANTS[request.param])
    perturb(method)
    method.train().predict(torch.randn(2, 50, 80))
    update_running_statistics(method, applied=True)
    checkpoint = write_checkpoint(folder / "run", method)
    export(ExportConfig(str(checkpoint), str(folder / "npc.pt"), "s3prl"))
    return checkpoint, folder / "npc.pt"


def speech() -> tuple[Tensor, Tensor]:
    """Three utterances of the embedded sample."""
    files = sorted((ROOT / "pretrain" / "data" / "sample" / "audio").glob("*.ogg"))[:60:20]
    waveforms = [torch.from_numpy(soundfile.read(path, dtype="float32")[0]) for path in files]
    return pad_sequence(waveforms, batch_first=True), torch.tensor([len(waveform) for waveform in waveforms])


def test_equals_the_s3prl_client(exported: tuple[Path, Path]) -> None:
    ours, theirs = Upstream("npc", str(exported[0])), S3PRLUpstream("npc_local", str(exported[1]))
    assert ours.num_layers == theirs.num_layers == 2 * len(ours.encoder.blocks) + 1
    assert ours.hidden_sizes == theirs.hidden_sizes
    assert list(ours.downsample_rates) == list(theirs.downsample_rates)
    waveforms, _ = two_waveforms()
    for samples in (27_200, 16_079, 16_080, 800, 100):
        assert_same_states(ours, theirs, waveforms[:1, :samples], torch.tensor([samples]))
    # Padding is read by the convolutions on both sides alike, so that batches agree too, to their last frame.
    assert_same_states(ours, theirs, *two_waveforms())
    assert_same_states(ours, theirs, *speech())


def test_padding_reaches_the_last_frames_alone(exported: tuple[Path, Path]) -> None:
    upstream = Upstream("npc", str(exported[0])).eval()
    waveforms, lengths = two_waveforms()
    with torch.no_grad():
        together, _ = upstream(waveforms, lengths)
        alone, _ = upstream(waveforms[1:, : lengths[1]], lengths[1:])
    frames = (int(lengths[1]) - 400) // 160 + 1
    # Half the kernel, and one frame per block after the first, whose input is zero there in both cases.
    tail = 7 + len(upstream.encoder.blocks)
    for state, single in zip(together, alone, strict=True):
        torch.testing.assert_close(state[1, : frames - tail], single[0, : frames - tail], rtol=1e-4, atol=2e-5)


def test_the_client_holds_exactly_our_tensors(exported: tuple[Path, Path]) -> None:
    written = torch.load(exported[1], weights_only=True)["model"]
    loaded = S3PRLUpstream("npc_local", str(exported[1])).upstream.model.state_dict()
    assert written.keys() == loaded.keys()
    assert all(torch.equal(written[key], loaded[key]) for key in written)


def test_there_and_back(exported: tuple[Path, Path]) -> None:
    checkpoint = torch.load(exported[1], weights_only=True)
    imported = interop.from_pt(checkpoint)
    state = method_state(imported)
    again = interop.to_s3prl(TrainedMethod("npc", {"encoder": imported.encoder_config}, state))
    assert again["config"] == checkpoint["config"]
    assert again["model"].keys() == checkpoint["model"].keys()
    assert all(torch.equal(tensor, checkpoint["model"][key]) for key, tensor in again["model"].items())
    ours, from_file = Upstream("npc", str(exported[0])), Upstream("npc", str(exported[1]))
    assert_same_states(from_file, ours, *two_waveforms(), rtol=0)


def test_pre_training_goes_on_from_an_s3prl_file(tmp_path: Path) -> None:
    temperature = "method.encoder.quantizer.temperature=0.3"
    source, fresh = build("npc_360hr", *VARIANTS["npc"]), build("npc_360hr", *VARIANTS["npc"], temperature)
    perturb(source)
    export(ExportConfig(str(write_checkpoint(tmp_path / "run", source)), str(tmp_path / "npc.pt"), "s3prl"))
    initialise(fresh, str(tmp_path / "npc.pt"), "keep")
    assert all(torch.equal(tensor, source.state_dict()[key]) for key, tensor in fresh.state_dict().items())


def official() -> dict[str, Any]:
    facts, tensors = load_fixture(FIXTURES, "npc_tiny")
    audio = {"feat_type": "fbank", "feat_dim": facts["feat_dim"]}
    return {"config": {"model": {"paras": facts["config"]}, "data": {"audio": audio}}, "model": group(tensors, "state")}


def test_official_weights_return_as_they_came() -> None:
    """The masks of the convolutions too, which we do not keep."""
    checkpoint = official()
    imported = interop.from_pt(checkpoint)
    encoder = NpcEncoder.from_config(imported.encoder_config)
    encoder.load_state_dict(imported.encoder_state)
    state = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()} | imported.head_state
    again = interop.to_s3prl(TrainedMethod("npc", {"encoder": encoder.to_config()}, state))
    assert again["model"].keys() == checkpoint["model"].keys()
    assert all(torch.equal(tensor, checkpoint["model"][key]) for key, tensor in again["model"].items())
    assert again["config"]["model"]["paras"] == checkpoint["config"]["model"]["paras"] | {"dim_bottleneck": None}


def test_what_cannot_be_imported_or_exported_says_why() -> None:
    with pytest.raises(InteropError, match="not s3prl's npc layout"):
        interop.from_pt({"model": {}})
    for name, value in (("activate", "tanh"), ("disable_cross_layer", True), ("num_layers", 3)):
        checkpoint = official()
        checkpoint["config"]["model"]["paras"][name] = value
        with pytest.raises(InteropError, match=rf"paras\.{name}: {value!r} is not supported"):
            interop.from_pt(checkpoint)
    imported = interop.from_pt(official())
    state = {f"encoder.{key}": tensor for key, tensor in imported.encoder_state.items()}
    with pytest.raises(InteropError, match=r"missing postnet\.weight"):
        interop.to_s3prl(TrainedMethod("npc", {"encoder": imported.encoder_config}, state))
