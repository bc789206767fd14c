"""CPC in other projects' files: s3prl's client loads what we export, and CPC_audio's checkpoints come in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import s3prl_compat  # noqa: F401  (must come before s3prl)
import torch
from recipe_checks import (
    assert_same_states,
    build,
    hidden_states,
    load_fixture,
    method_state,
    perturb,
    two_waveforms,
    write_checkpoint,
)
from s3prl.nn import S3PRLUpstream

from pretrain import Upstream
from pretrain.weights.export import ExportConfig, export
from pretrain.weights.interop.files import read_torch
from pretrain.weights.interop.types import InteropError, TrainedMethod
from pretrain.weights.read import initialise
from recipes.cpc import interop
from recipes.cpc.method import CpcMethod
from recipes.cpc.test_cpc import official_checkpoint

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = "method.encoder.conv_layers=[[24,10,5,3,3],[24,8,4,2,2],[24,4,2,1,1],[24,4,2,1,1],[24,4,2,1,1]]"
# LSTM of two layers after channel norm; GRU after batch norm, as in the model of 2018.
KINDS = {
    "modified": [SMALL, "method.encoder.norm=channel", "method.encoder.context_layers=2"],
    "original": [SMALL, "method.encoder.context=gru"],
}


def small_method(kind: str) -> CpcMethod:
    method = build("cpc_tiny", *KINDS[kind], "method.encoder.context_dim=32", "method.predictor=linear")
    perturb(method)
    for name, buffer in method.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            torch.nn.init.uniform_(buffer, 0.1, 1.0)
    return method


@pytest.fixture(scope="module", params=KINDS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its export for s3prl."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = write_checkpoint(folder / "run", small_method(request.param))
    export(ExportConfig(str(checkpoint), str(folder / "cpc.pt"), "s3prl"))
    return checkpoint, folder / "cpc.pt"


@pytest.mark.parametrize("samples", [16_000, 16_079, 20_480])
def test_the_s3prl_client_computes_our_hidden_states(exported: tuple[Path, Path], samples: int) -> None:
    checkpoint, path = exported
    theirs = S3PRLUpstream("cpc_local", path_or_url=str(path))
    ours = Upstream("cpc", path_or_url=str(checkpoint))
    assert (ours.num_layers, ours.hidden_sizes) == (theirs.num_layers, theirs.hidden_sizes)
    assert ours.downsample_rates == theirs.downsample_rates == [160, 160]
    wavs = 0.1 * torch.randn(1, samples, generator=torch.Generator().manual_seed(1))
    assert_same_states(ours, theirs, wavs, torch.tensor([samples]))


def test_a_padded_batch_differs_from_s3prl_in_the_last_frame_at_most(exported: tuple[Path, Path]) -> None:
    """Its convolutions see the padding behind a shorter waveform; ours see zeros there, as when it is alone."""
    checkpoint, path = exported
    wavs, lengths = two_waveforms()
    ours, _ = hidden_states(Upstream("cpc", path_or_url=str(checkpoint)), wavs, lengths)
    theirs, _ = hidden_states(S3PRLUpstream("cpc_local", path_or_url=str(path)), wavs, lengths)
    alone, _ = hidden_states(Upstream("cpc", path_or_url=str(checkpoint)), wavs[1:, : lengths[1]], lengths[1:])
    frames = int(lengths[1]) // 160
    for mine, other, single in zip(ours, theirs, alone, strict=True):
        scale = other.abs().max()
        assert (mine[0] - other[0]).abs().max() <= 1e-4 * scale
        assert (mine[1, : frames - 1] - other[1, : frames - 1]).abs().max() <= 1e-4 * scale
        assert (mine[1, :frames] - single[0, :frames]).abs().max() <= 1e-4 * scale


def test_every_tensor_of_the_client_comes_from_our_file(exported: tuple[Path, Path]) -> None:
    """The client loads leniently: a wrong name would leave a random tensor."""
    client = S3PRLUpstream("cpc_local", path_or_url=str(exported[1])).upstream.model
    weights = read_torch(exported[1])["weights"]
    assert client.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in client.state_dict().items())


def test_there_and_back(exported: tuple[Path, Path]) -> None:
    checkpoint, path = exported
    imported, native = Upstream("cpc", path_or_url=str(path)), Upstream("cpc", path_or_url=str(checkpoint))
    theirs, ours = imported.encoder.state_dict(), native.encoder.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    wavs, lengths = two_waveforms()
    assert_same_states(native, imported, wavs, lengths)


@pytest.mark.parametrize("name", ["modified", "original"])
def test_training_goes_on_from_a_checkpoint_of_the_official_trainer(name: str, tmp_path: Path) -> None:
    """Encoder and predictors; the file's other entries (optimiser, best weights) are left alone."""
    facts, tensors = load_fixture(FIXTURES, name)
    checkpoint = official_checkpoint(facts, tensors)
    torch.save(checkpoint | {"optimizer": {"state": {}}, "best": None}, tmp_path / "checkpoint_5.pt")
    dim, gar = facts["config"]["hiddenEncoder"], facts["config"]["hiddenGar"]
    layers = [[dim, kernel, stride, pad, pad] for kernel, stride, pad in interop.CONV_SHAPES]
    original = name == "original"
    options = [
        f"method.encoder.conv_layers={layers}",
        f"method.encoder.context_dim={gar}",
        f"method.encoder.context_frames={facts['shapes']['frames']}",
        "method.encoder.context_heads=8",
        "method.encoder.context_ffn_dim=2048",
        "method.steps=3",
        f"method.predictor_ffn_dim={facts['shapes']['ffn_dim']}",
        f"method.window_frames={facts['shapes']['frames']}",
        f"method.predictor={'linear' if original else 'transformer'}",
        f"method.encoder.norm={'batch' if original else 'channel'}",
        f"method.encoder.context={'gru' if original else 'lstm'}",
    ]
    method = build("cpc_tiny", *options)
    initialise(method, str(tmp_path / "checkpoint_5.pt"), "keep")
    imported = interop.from_pt(checkpoint)
    state = method_state(imported)
    assert method.state_dict().keys() == state.keys()
    assert all(torch.equal(method.state_dict()[key], state[key]) for key in state)


def s3prl_form() -> dict[str, Any]:
    facts, tensors = load_fixture(FIXTURES, "modified")
    checkpoint = official_checkpoint(facts, tensors)
    return {"config": checkpoint["config"], "weights": checkpoint["gEncoder"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_type": "mfcc"}, "encoder_type: 'mfcc' is not supported"),
        ({"normMode": "instanceNorm"}, "normMode: 'instanceNorm'"),
        ({"arMode": "RNN"}, "arMode: 'RNN'"),
        ({"cpc_mode": "reverse"}, "cpc_mode: 'reverse'"),
        ({"arMode": "transformer", "abspos": True}, "abspos: True"),
        ({"arMode": "transformer"}, r"missing gAR\.0\.multihead"),
    ],
)
def test_what_cannot_be_imported_says_why(changes: dict[str, Any], message: str) -> None:
    checkpoint = s3prl_form()
    with pytest.raises(InteropError, match=message):
        interop.from_pt({**checkpoint, "config": checkpoint["config"] | changes})


def test_other_files_are_refused() -> None:
    checkpoint = s3prl_form()
    with pytest.raises(InteropError, match=r"checkpoint_args\.json under 'config'"):
        interop.from_pt({"gEncoder": checkpoint["weights"], "optimizer": {}})
    with pytest.raises(InteropError, match=r"encoder\.layers\.0: no part of CPC_audio's encoder"):
        interop.from_pt({**checkpoint, "weights": {"encoder.layers.0": torch.zeros(1)}})
    strange = {"wPrediction.predictors.0.module.weight": torch.zeros(1)}
    with pytest.raises(InteropError, match="init_head=reset"):
        interop.from_pt(checkpoint | {"cpcCriterion": strange})


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("bidir_cpc_tiny", [], r"method\.encoder\.conv_layers: s3prl's cpc_local has only"),
        ("cpc_tiny", ["method.encoder.context=transformer"], r"method\.encoder\.context: s3prl ships no transformer"),
        (
            "cpc_tiny",
            ["method.encoder.norm=group", "method.encoder.norm_groups=4"],
            r"method\.encoder\.norm: .*'group'",
        ),
        ("cpc_tiny", ["method.encoder.bidirectional=true"], r"method\.encoder\.bidirectional: .*only False"),
    ],
)
def test_what_s3prl_cannot_build_is_refused(recipe: str, overrides: list[str], message: str) -> None:
    method = build(recipe, *overrides)
    config = {"encoder": method.encoder.to_config()}
    with pytest.raises(InteropError, match=message):
        interop.to_s3prl(TrainedMethod("cpc", config, method.state_dict()))
