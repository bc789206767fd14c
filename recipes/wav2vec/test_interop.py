"""wav2vec's checkpoints in s3prl's layout and fairseq's: the real client loads them, and they come back."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import s3prl_compat  # noqa: F401  (must come before s3prl)
import torch
from recipe_checks import assert_same_states, perturb, two_waveforms, write_checkpoint
from s3prl.nn import S3PRLUpstream

from pretrain import Upstream
from pretrain.weights.export import ExportConfig, export
from pretrain.weights.interop.files import read_torch
from pretrain.weights.interop.types import InteropError, TrainedMethod
from pretrain.weights.read import initialise, load_encoder
from recipes.wav2vec import interop
from recipes.wav2vec.test_wav2vec import small


def trained(case: str) -> TrainedMethod:
    method = small(case)
    return TrainedMethod("wav2vec", asdict(method.config), method.state_dict())


@pytest.fixture(params=["wav2vec", "wav2vec, wider context", "gumbel", "gumbel, combined", "kmeans, combined"])
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Path]:
    """The case, a run of ours, and its export to s3prl."""
    run, output = tmp_path / "run", tmp_path / "wav2vec.pt"
    write_checkpoint(run, small(request.param))
    export(ExportConfig(str(run), str(output), "s3prl"))
    return request.param, run, output


def test_the_client_has_our_hidden_states(exported: tuple[str, Path, Path]) -> None:
    case, run, path = exported
    ours = Upstream("wav2vec", str(run))
    theirs = S3PRLUpstream("wav2vec_local" if case.startswith("wav2vec") else "vq_wav2vec_custom", str(path))
    waveforms, lengths = two_waveforms(11_200, 8_079)
    # Below 1,105 samples the client refuses: it makes less than half the frames that it promises.
    for samples in (11_200, 8_079, 1_105):
        assert_same_states(ours, theirs, waveforms[:1, :samples], torch.tensor([samples]))
    # The norms see the padding in both, so a padded batch agrees as well.
    assert_same_states(ours, theirs, waveforms, lengths)
    assert ours.hidden_sizes == theirs.hidden_sizes
    assert list(ours.downsample_rates) == list(theirs.downsample_rates)
    saved, loaded = read_torch(path)["model_weight"], theirs.upstream.model.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)


def test_the_published_encoder_has_thirteen_states() -> None:
    ours = Upstream("wav2vec_large", randomize=True)
    assert ours.num_layers == 13
    assert set(ours.hidden_sizes) == {512}
    assert set(ours.downsample_rates) == {160}


def test_there_and_back(exported: tuple[str, Path, Path]) -> None:
    case, run, path = exported
    method, again = small(case), small(case)
    perturb(again)
    initialise(again, str(path), "keep")
    for (name, before), after in zip(method.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(before, after), name
    encoder = load_encoder(path, "wav2vec")
    assert encoder.to_config() == load_encoder(run).to_config() == method.encoder.to_config()


@pytest.mark.parametrize("case", ["wav2vec", "gumbel"])
def test_fairseqs_layouts(case: str) -> None:
    exported = interop.to_s3prl(trained(case))
    model, state = exported["model_cfg"], exported["model_weight"]
    expected = interop.from_pt(exported)
    for checkpoint in (
        {"cfg": {"model": model | {"_name": "wav2vec"}, "task": {}}, "model": state},
        {"args": model | {"arch": "wav2vec"}, "model": state},
    ):
        imported = interop.from_pt(checkpoint)
        assert imported.encoder_config == expected.encoder_config
        assert imported.encoder_state.keys() == expected.encoder_state.keys()
        assert imported.head_state.keys() == set(interop.HEAD_KEYS)


def test_fields_that_a_checkpoint_leaves_out_take_the_official_defaults() -> None:
    exported = interop.to_s3prl(trained("wav2vec"))
    config = interop.from_pt(exported | {"model_cfg": {"infonce": False}}).encoder_config
    assert config["conv_feature_layers"] == [[512, 10, 5], [512, 8, 4], *[[512, 4, 2]] * 3, *[[512, 1, 1]] * 3]
    assert config["conv_aggregator_layers"] == [[512, kernel] for kernel in range(2, 14)]
    assert config["activation"] == "relu"
    assert config["quantizer"] is None


def test_what_cannot_be_imported_says_why() -> None:
    exported = interop.to_s3prl(trained("gumbel"))
    model = exported["model_cfg"]
    for change, problem in (
        ({"aggregator": "gru"}, "aggregator: 'gru' is not supported"),
        ({"project_features": "same"}, "project_features"),
        ({"vq_dim": 10}, "vq_dim: 10 is not the 24"),
        ({"conv_aggregator_layers": "[(24, 2, 2)]"}, "conv_aggregator_layers: a stride"),
        ({"conv_aggregator_layers": "open('x')"}, "conv_aggregator_layers: cannot read"),
        ({"arch": "wav2vec2"}, "'wav2vec2'"),
    ):
        with pytest.raises(InteropError, match=problem):
            interop.from_pt(exported | {"model_cfg": model | change})
    with pytest.raises(InteropError, match="neither fairseq's"):
        interop.from_pt({"state_dict": {}})
    complete = trained("gumbel")
    headless = {key: value for key, value in complete.state.items() if key.startswith("encoder.")}
    with pytest.raises(InteropError, match="project_to_steps"):
        interop.to_s3prl(TrainedMethod("wav2vec", complete.config, headless))
