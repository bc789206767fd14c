"""`Upstream` against the public clients of s3prl and transformers, and its own promises."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import s3prl_compat  # noqa: F401  (must come before s3prl)
import torch
from recipe_checks import finish, write_checkpoint, write_exports
from s3prl.nn import S3PRLUpstream
from s3prl.upstream.hubert.hubert_model import HubertConfig as TheirConfig
from s3prl.upstream.hubert.hubert_model import HubertModel as TheirModel
from s3prl.upstream.hubert.hubert_model import HubertPretrainingConfig as TheirTask
from small_hubert import KINDS, batch, small_method
from transformers import AutoFeatureExtractor, HubertModel

from pretrain import Upstream
from pretrain.labelling.kmeans.features import FeatureSpec
from pretrain.labelling.kmeans.model import KMeansModel, make_extractor
from pretrain.models.speech_encoder import normalize_waveforms
from pretrain.weights.export import ExportConfig, export, write_native
from pretrain.weights.interop.types import InteropError

ROOT = Path(__file__).resolve().parent.parent
close = partial(torch.testing.assert_close, rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module", params=KINDS)
def exports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint and its three exports, by format."""
    folder = tmp_path_factory.mktemp(request.param)
    return write_exports(folder, small_method(request.param))


def hidden_states(model: torch.nn.Module, *inputs: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    with torch.no_grad():
        return model.eval()(*inputs)


def assert_same_states(ours: torch.nn.Module, theirs: torch.nn.Module, *inputs: torch.Tensor) -> None:
    our_states, our_lengths = hidden_states(ours, *inputs)
    their_states, their_lengths = hidden_states(theirs, *inputs)
    assert len(our_states) == len(their_states) == 4
    for our_length, their_length in zip(our_lengths, their_lengths, strict=True):
        assert torch.equal(our_length, their_length)
    for our_state, their_state in zip(our_states, their_states, strict=True):
        close(our_state, their_state)


def test_equals_s3prl(exports: dict[str, Path]) -> None:
    ours, theirs = Upstream("hubert", str(exports["native"])), S3PRLUpstream("hubert_local", str(exports["s3prl"]))
    waveforms, lengths = batch()
    # Singles: whole, short of a frame, one sample past a frame, shorter than 0.05 s.
    for samples in (21000, 16079, 16081, 800, 100, 1):
        assert_same_states(ours, theirs, waveforms[:1, :samples], torch.tensor([samples]))
    # Padding enters s3prl's result by fairseq's rule, which the checkpoint asks for, so a padded batch agrees as well.
    assert_same_states(ours, theirs, waveforms, lengths)
    assert_same_states(ours, theirs, waveforms.unsqueeze(-1), lengths)
    short = waveforms[:, :700] * (torch.arange(700) < torch.tensor([[700], [90]]))
    assert_same_states(ours, theirs, short, torch.tensor([700, 90]))
    assert ours.num_layers == theirs.num_layers
    assert ours.hidden_sizes == theirs.hidden_sizes
    assert list(ours.downsample_rates) == list(theirs.downsample_rates)


def test_normalize_equals_s3prl(exports: dict[str, Path]) -> None:
    ours = Upstream("hubert", str(exports["native"]), normalize=True)
    assert_same_states(ours, S3PRLUpstream("hubert_local", str(exports["s3prl"]), normalize=True), *batch())


def test_s3prl_model_holds_exactly_our_tensors(exports: dict[str, Path]) -> None:
    written = torch.load(exports["s3prl"], weights_only=True)["model_weight"]
    loaded = S3PRLUpstream("hubert_local", str(exports["s3prl"])).upstream.model.state_dict()
    assert written.keys() == loaded.keys()
    assert all(torch.equal(written[key], loaded[key]) for key in written)


def test_equals_transformers(exports: dict[str, Path]) -> None:
    theirs, info = HubertModel.from_pretrained(exports["huggingface"], output_loading_info=True)
    assert not any(info.values())
    theirs.eval()
    extractor = AutoFeatureExtractor.from_pretrained(exports["huggingface"])
    ours = Upstream("hubert", str(exports["native"]), extra_conf={"frame_length_rule": "conv"})
    waveforms, lengths = batch()
    # Loud, because transformers adds 1e-7 to the variance that it divides by and fairseq 1e-5.
    waveforms = 10 * waveforms
    layer_norm = theirs.config.feat_extract_norm == "layer"
    # Group norm sees padding, and transformers then takes no mask: compare singles.
    batches = [[0], [1], [0, 1]] if layer_norm else [[0], [1]]
    for rows in batches:
        audio = [waveforms[row, : lengths[row]].numpy() for row in rows]
        inputs = extractor(audio, sampling_rate=16000, padding=True, return_tensors="pt")
        with torch.no_grad():
            outputs = theirs(**inputs, output_hidden_states=True)
        # Before the final layer norm in transformers' list, after it in s3prl's and ours.
        expected = [*outputs.hidden_states[:-1], outputs.last_hidden_state]
        states, _ = hidden_states(ours, waveforms[rows, : int(lengths[rows].max())], lengths[rows])
        for index, row in enumerate(rows):
            frames = (int(lengths[row]) - 400) // 320 + 1
            for ours_state, their_state in zip(states, expected, strict=True):
                close(ours_state[index, :frames], their_state[index, :frames])


def test_every_kind_of_path_gives_the_same_states(exports: dict[str, Path]) -> None:
    waveforms, lengths = batch()
    expected, _ = hidden_states(Upstream("hubert", str(exports["native"])), waveforms[:1], lengths[:1])
    for path in (exports["checkpoint"], exports["s3prl"], exports["huggingface"]):
        states, _ = hidden_states(Upstream("hubert_base", str(path)), waveforms[:1], lengths[:1])
        for state, other in zip(states, expected, strict=True):
            close(state, other)


def test_a_run_folder_gives_its_newest_undamaged_checkpoint_or_its_export(tmp_path: Path) -> None:
    run, method = tmp_path / "run", small_method()
    for update in (100, 200, 300):
        with torch.no_grad():
            method.encoder.mask_emb.fill_(update)
        write_checkpoint(run, method, update)
    write_native("hubert", small_method().encoder, run / "export")
    newest, middle = run / "checkpoints" / "step_00000300", run / "checkpoints" / "step_00000200"
    (newest / "model.safetensors").write_bytes(b"cut short")
    upstream = Upstream(None, run)
    assert upstream.method_name == "hubert"
    assert upstream.encoder.mask_emb.unique().tolist() == [200]
    (middle / "complete.json").unlink()
    assert Upstream("hubert", run).encoder.mask_emb.unique().tolist() == [100]
    shutil.rmtree(run / "checkpoints")
    assert torch.equal(Upstream("hubert", run).encoder.mask_emb, small_method().encoder.mask_emb)


@pytest.mark.parametrize("place", [".", "checkpoints/step_00000100"])
def test_a_checkpoint_is_hashed_once_and_only_what_is_read(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    step = write_checkpoint(run, small_method())
    (step / "optimizer-00000-of-00001.safetensors").write_bytes(b"moments")
    (step / "complete.json").unlink()
    finish(step)
    hashed: list[str] = []
    digest = hashlib.file_digest

    def note(file: Any, name: str) -> Any:
        hashed.append(Path(file.name).name)
        return digest(file, name)

    monkeypatch.setattr("hashlib.file_digest", note)
    Upstream("hubert", run / place)
    assert sorted(hashed) == ["config.yaml", "model.safetensors"]


def test_garbage_after_the_end_of_a_waveform_is_not_heard(exports: dict[str, Path]) -> None:
    upstream = Upstream("hubert", str(exports["native"]))
    waveforms, lengths = batch()
    expected, _ = hidden_states(upstream, waveforms, lengths)
    waveforms[1, lengths[1] :] = 7.0
    states, _ = hidden_states(upstream, waveforms, lengths)
    assert all(torch.equal(state, other) for state, other in zip(states, expected, strict=True))


def test_lengths_that_do_not_fit_are_refused(exports: dict[str, Path]) -> None:
    upstream = Upstream("hubert", str(exports["native"]))
    for lengths in ([801], [0], [800, 800]):
        with pytest.raises(ValueError, match="wavs_len"):
            upstream(torch.zeros(1, 800), torch.tensor(lengths))


def test_randomize_keeps_the_architecture_and_draws_fresh_weights(exports: dict[str, Path]) -> None:
    trained = Upstream("hubert", str(exports["native"]))
    fresh = Upstream("hubert", str(exports["native"]), randomize=True)
    assert fresh.encoder.to_config() == trained.encoder.to_config()
    name = "encoder.layers.1.fc1.weight"
    weight = fresh.encoder.state_dict()[name]
    assert not torch.equal(weight, trained.encoder.state_dict()[name])
    # HuBERT draws its Transformer's matrices from N(0, 0.02).
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_randomize_builds_a_recipe_without_a_path() -> None:
    upstream = Upstream("hubert_tiny", randomize=True)
    assert upstream.hidden_sizes == [96] * 4
    assert upstream.downsample_rates == [320] * 4
    # Inherited from hubert_base, which hubert_tiny does not repeat.
    assert upstream.encoder.to_config()["frame_length_rule"] == "fold"


def test_errors_say_what_to_do(exports: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InteropError, match="no recipe or method 'hubert_bse'; did you mean hubert_base"):
        Upstream("hubert_bse")
    with pytest.raises(InteropError, match=r"no published weights.*randomize=True"):
        Upstream("hubert_base")
    with pytest.raises(InteropError, match="no such file"):
        Upstream("hubert_base", str(tmp_path / "nothing"))
    with pytest.raises(InteropError, match="does not name its method"):
        Upstream(None, str(exports["s3prl"]))
    with pytest.raises(InteropError, match="did you mean encoder_layers"):
        Upstream("hubert", str(exports["native"]), extra_conf={"encoder_layer": 2})
    with pytest.raises(InteropError, match="no k-means model travelled"):
        Upstream("hubert", str(exports["native"])).units(*batch())


def test_a_checkpoint_of_another_method_is_refused(exports: dict[str, Path], tmp_path: Path) -> None:
    for name in ("config.json", "encoder.safetensors"):
        (tmp_path / name).write_bytes((exports["native"] / name).read_bytes())
    config = (tmp_path / "config.json").read_text().replace('"method": "hubert"', '"method": "apc"')
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InteropError, match="a checkpoint of 'apc', not of 'hubert'"):
        Upstream("hubert_base", str(tmp_path))


def test_units_are_the_nearest_centroids_of_each_waveform_alone(exports: dict[str, Path], tmp_path: Path) -> None:
    waveforms, lengths = batch()
    theirs = HubertModel.from_pretrained(exports["huggingface"]).eval()
    alone = [waveform[None, :length] for waveform, length in zip(waveforms, lengths, strict=True)]
    if theirs.config.feat_extract_norm == "layer":
        alone = [normalize_waveforms(waveform, None) for waveform in alone]
    with torch.no_grad():
        features = [theirs(waveform, output_hidden_states=True).hidden_states[2][0] for waveform in alone]
    centroids = torch.cat(features)[::9]
    encoder = Upstream("hubert", str(exports["native"])).encoder
    KMeansModel(centroids, make_extractor(FeatureSpec("upstream", "hubert", 2), encoder)).save(tmp_path / "kmeans")
    export(ExportConfig(str(exports["checkpoint"]), str(tmp_path / "export"), kmeans=str(tmp_path)))
    upstream = Upstream("hubert", str(tmp_path / "export"))
    units, counts = upstream.units(waveforms, lengths)
    assert counts.tolist() == [65, 38]
    assert units.dtype == torch.int64
    for row, expected in zip(units, features, strict=True):
        assert torch.equal(row[: len(expected)], torch.cdist(expected, centroids).argmin(1))
    assert units[1, 38:].unique().tolist() == [-1]
    # The encoder that makes the units is not this one's: loading and using it leaves the upstream's mode alone.
    assert upstream.training


def test_s3prl_weights_without_a_projection(tmp_path: Path) -> None:
    # fairseq leaves post_extract_proj out where convolutions and Transformer are equally wide.
    model = {
        "label_rate": 50.0,
        "conv_feature_layers": "[(32,10,5)] + [(32,3,2)] * 4 + [(32,2,2)] * 2",
        "encoder_layers": 3,
        "encoder_embed_dim": 32,
        "encoder_ffn_embed_dim": 48,
        "encoder_attention_heads": 4,
        "conv_pos": 16,
        "conv_pos_groups": 4,
    }
    task = {"label_rate": 50.0, "normalize": True}
    symbols = [[str(index) for index in range(9)]]
    network = TheirModel(TheirConfig(**model), TheirTask(**task), symbols)
    checkpoint = {"task_cfg": task, "model_cfg": model, "dictionaries_symbols": symbols}
    torch.save(checkpoint | {"model_weight": dict(network.state_dict())}, tmp_path / "narrow.pt")
    ours = Upstream("hubert", str(tmp_path / "narrow.pt"))
    assert_same_states(ours, S3PRLUpstream("hubert_local", str(tmp_path / "narrow.pt")), *batch())


def test_upstream_loads_neither_deepspeed_nor_hydra(tmp_path: Path) -> None:
    write_native("hubert", small_method().encoder, tmp_path / "export")
    code = (
        "import sys, torch; from pretrain import Upstream\n"
        "model = Upstream('hubert_base', sys.argv[1]).eval(); model(torch.zeros(1, 1600), torch.tensor([1600]))\n"
        "Upstream('hubert_tiny', randomize=True)\n"
        "print([name for name in ('deepspeed', 'hydra') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "export")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
