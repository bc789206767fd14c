"""WavLM checkpoints of other projects: every layout there and back, and the real clients."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import s3prl_compat  # noqa: F401  (must come before s3prl)
import torch
import transformers
from recipe_checks import (
    assert_same_states,
    build,
    hidden_states,
    perturb,
    same_tensors,
    two_waveforms,
    write_exports,
)
from s3prl.nn import S3PRLUpstream

from pretrain import Upstream
from pretrain.method import Method
from pretrain.registry import load_interop
from pretrain.weights.interop.files import read_huggingface, read_torch
from pretrain.weights.interop.types import InteropError, TrainedMethod
from pretrain.weights.read import initialise, read_weights
from recipes.wavlm import interop


@pytest.fixture(scope="module")
def method() -> Method:
    made = build("wavlm_tiny")
    perturb(made)
    return made


@pytest.fixture(scope="module")
def exports(method: Method, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint and its three exports, by format."""
    return write_exports(tmp_path_factory.mktemp("exports"), method)


def trained(method: Method) -> TrainedMethod:
    return TrainedMethod("wavlm", asdict(method.config), method.state_dict())


def test_s3prls_client_agrees(exports: dict[str, Path]) -> None:
    ours, theirs = Upstream("wavlm", str(exports["native"])), S3PRLUpstream("wavlm_local", str(exports["s3prl"]))
    waveforms, lengths = two_waveforms()
    for samples in (27_200, 16_079, 800):
        assert_same_states(ours, theirs, waveforms[:1, :samples], torch.tensor([samples]))
    assert_same_states(ours, theirs, waveforms, lengths)
    assert ours.num_layers == theirs.num_layers
    assert ours.hidden_sizes == theirs.hidden_sizes
    assert list(ours.downsample_rates) == list(theirs.downsample_rates)


def test_s3prls_model_holds_exactly_our_tensors(exports: dict[str, Path]) -> None:
    written = read_torch(exports["s3prl"])
    assert written.keys() == {"cfg", "model"}
    loaded = S3PRLUpstream("wavlm_local", str(exports["s3prl"])).upstream.model.state_dict()
    assert same_tensors(written["model"], dict(loaded))


def test_transformers_class_loads_every_tensor_and_agrees(exports: dict[str, Path]) -> None:
    model, info = transformers.WavLMModel.from_pretrained(exports["huggingface"], output_loading_info=True)
    assert not any(info.values())
    assert same_tensors(dict(model.state_dict()), read_huggingface(exports["huggingface"]).tensors)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(exports["huggingface"])
    ours = Upstream("wavlm", str(exports["native"]))
    waveforms, _ = two_waveforms()
    inputs = extractor(waveforms[0].numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**inputs, output_hidden_states=True).hidden_states
    states, _ = hidden_states(ours, waveforms[:1], torch.tensor([27_200]))
    for state, reference in zip(states, expected, strict=True):
        # An upstream repeats the last frame so that there are as many as s3prl counts.
        assert (state[:, : reference.shape[1]] - reference).abs().max() <= 1e-4 * reference.abs().max()


@pytest.mark.parametrize("large", [False, True])
def test_transformers_there_and_back(large: bool, tmp_path: Path) -> None:
    config = transformers.WavLMConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        conv_dim=[32] * 7,
        feat_extract_norm="layer" if large else "group",
        do_stable_layer_norm=large,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        num_buckets=64,
        max_bucket_distance=90,
    )
    torch.manual_seed(0)
    theirs = transformers.WavLMForCTC(config)
    theirs.save_pretrained(tmp_path)
    imported = interop.from_huggingface(read_huggingface(tmp_path))
    assert imported.encoder_config["num_buckets"] == 64
    assert imported.encoder_config["max_distance"] == 90
    state = {f"encoder.{key}": tensor for key, tensor in imported.encoder_state.items()}
    exported = interop.to_huggingface(TrainedMethod("wavlm", {"encoder": imported.encoder_config}, state))
    assert same_tensors(exported.tensors, dict(theirs.wavlm.state_dict()))
    for name in ("num_buckets", "max_bucket_distance", "hidden_size", "do_stable_layer_norm", "feat_extract_norm"):
        assert exported.config[name] == getattr(config, name), name
    again = interop.from_huggingface(exported)
    assert again.encoder_config == imported.encoder_config
    assert same_tensors(again.encoder_state, imported.encoder_state)


def test_microsofts_layouts_there_and_back(method: Method) -> None:
    """The released one, without heads, and that of the training code, with them."""
    released = interop.to_s3prl(trained(method))
    imported = interop.from_pt(released)
    assert imported.encoder_config == method.encoder.to_config()
    assert same_tensors(imported.encoder_state, dict(method.encoder.state_dict()))
    assert not imported.head_state
    cfg, head = dict(released["cfg"]), trained(method).head_state()
    task = {"normalize": cfg.pop("normalize")}
    theirs = {"cfg": {"model": cfg | {"_name": "wavlm"}, "task": task}, "model": released["model"] | head}
    imported = interop.from_pt(theirs)
    assert imported.encoder_config == method.encoder.to_config()
    assert same_tensors(imported.head_state, head)


def test_options_that_a_released_file_leaves_out_have_microsofts_defaults(method: Method) -> None:
    released = interop.to_s3prl(trained(method))
    del released["cfg"]["max_distance"]
    assert interop.from_pt(released).encoder_config["max_distance"] == 1280


@pytest.mark.parametrize("source", ["native", "s3prl", "huggingface"])
def test_training_goes_on_from_the_encoder(exports: dict[str, Path], method: Method, source: str) -> None:
    other = build("wavlm_tiny", seed=1)
    with pytest.raises(InteropError, match="so the head cannot be kept; set init_head=reset"):
        initialise(other, str(exports[source]), "keep")
    initialise(other, str(exports[source]), "reset")
    assert same_tensors(dict(other.encoder.state_dict()), dict(method.encoder.state_dict()))


def test_training_goes_on_from_a_checkpoint_with_its_heads(exports: dict[str, Path], method: Method) -> None:
    other = build("wavlm_tiny", seed=1)
    initialise(other, str(exports["checkpoint"]), "keep")
    assert same_tensors(dict(other.state_dict()), dict(method.state_dict()))
    assert read_weights(exports["checkpoint"]).method_name == "wavlm"


def test_what_cannot_be_imported_says_why(method: Method) -> None:
    released = interop.to_s3prl(trained(method))
    for change, message in (
        ({"relative_position_embedding": False}, "relative_position_embedding: missing or False, so this is no WavLM"),
        ({"gru_rel_pos": False}, "gru_rel_pos: False with relative_position_embedding is not supported"),
        ({"target_glu": True}, "target_glu: True is not supported"),
        ({"expand_attention_head_size": 48}, "expand_attention_head_size: 48 is not supported"),
        ({"_name": "hubert"}, "'hubert' is not a WavLM model"),
    ):
        with pytest.raises(InteropError, match=message):
            interop.from_pt({**released, "cfg": released["cfg"] | change})


def test_other_methods_have_no_class_with_the_bias(method: Method) -> None:
    hubert = load_interop("hubert")
    assert hubert is not None
    for export in (hubert.to_s3prl, hubert.to_huggingface):
        with pytest.raises(InteropError, match=r"method\.encoder\.pos_enc_type: gated_bias has no counterpart"):
            export(trained(method))
    config = trained(method)
    config.config["encoder"]["pos_enc_type"] = "abs"
    for export in (interop.to_s3prl, interop.to_huggingface):
        with pytest.raises(InteropError, match=r"pos_enc_type: abs has no counterpart .* which has a gated"):
            export(config)
