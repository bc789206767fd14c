"""The conformer side of the speech encoder against transformers and s3prl: states, gradients, names, sizes, FLOPs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import s3prl_compat  # noqa: F401  (must come before s3prl)
import torch
from recipe_checks import assert_same_states, count, perturb, two_waveforms
from s3prl.nn import S3PRLUpstream
from small_hubert import small_method
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel

from pretrain import Upstream
from pretrain.errors import UserError
from pretrain.models.batch_norm import BatchNorm
from pretrain.models.conformer import shifted
from pretrain.models.speech_config import SpeechEncoderConfig
from pretrain.models.speech_encoder import SpeechEncoder
from pretrain.weights.export import write_native
from pretrain.weights.interop import speech_encoder as interop
from pretrain.weights.interop.files import write_torch
from pretrain.weights.interop.types import InteropError, TrainedMethod
from pretrain.weights.read import initialise
from recipes.hubert import interop as hubert

CONV_LAYERS = [[32, 10, 5], *[[32, 3, 2]] * 4, *[[32, 2, 2]] * 2]
POSITIONS = ("rel_pos", "rope")
SAMPLES, SHORTER = 8000, 5377


def small_config(pos_enc_type: str, **changes: Any) -> SpeechEncoderConfig:
    """Three conformer layers in Large's layout; transformers has no other."""
    config = SpeechEncoderConfig(
        extractor_mode="layer_norm",
        conv_feature_layers=CONV_LAYERS,
        conv_bias=True,
        encoder_layers=3,
        encoder_embed_dim=48,
        encoder_ffn_embed_dim=96,
        encoder_attention_heads=4,
        layer_norm_first=True,
        conv_pos=16,
        conv_pos_groups=4,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        dropout_input=0.0,
        encoder_layerdrop=0.0,
        feature_grad_mult=1.0,
        normalize=False,
        frame_length_rule="conv",
        layer_type="conformer",
        pos_enc_type=pos_enc_type,
        depthwise_conv_kernel_size=7,
    )
    return replace(config, **changes)


def small_encoder(pos_enc_type: str, **changes: Any) -> SpeechEncoder:
    """Every parameter and running statistic off its initial value."""
    torch.manual_seed(0)
    encoder = SpeechEncoder(small_config(pos_enc_type, **changes))
    perturb(encoder)
    for module in encoder.modules():
        if isinstance(module, BatchNorm):
            module.running_mean.normal_(0.0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    return encoder


def as_transformers(encoder: SpeechEncoder) -> Wav2Vec2ConformerModel:
    """The same weights in transformers' class; every tensor of it comes from us."""
    config = encoder.to_config()
    model = Wav2Vec2ConformerModel(Wav2Vec2ConformerConfig(**interop.config_to_huggingface(config)))
    model.load_state_dict(interop.state_to_huggingface(encoder.state_dict(), config))
    return model.train(encoder.training)


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-4 * theirs.abs().max())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("padded", [False, True], ids=["single", "padded"])
@pytest.mark.parametrize("pos_enc_type", POSITIONS)
def test_hidden_states_and_gradients_equal_transformers(pos_enc_type: str, padded: bool, training: bool) -> None:
    """In training the batch norm sees padded frames too, in both: so they have to agree on those as well."""
    encoder = small_encoder(pos_enc_type).train(training)
    theirs = as_transformers(encoder)
    waveforms, lengths = two_waveforms(SAMPLES, SHORTER) if padded else (two_waveforms(SAMPLES, SHORTER)[0][:1], None)
    attention_mask = None if lengths is None else (torch.arange(SAMPLES) < lengths[:, None]).long()
    output = theirs(waveforms, attention_mask, output_hidden_states=True)
    expected = [*output.hidden_states[:-1], output.last_hidden_state]
    states, frame_lengths = encoder(waveforms, lengths)
    assert len(states) == len(expected) == 4
    valid = torch.arange(states[0].shape[1]) < frame_lengths[0][:, None]
    assert not padded or not valid.all()
    for ours, reference in zip(states, expected, strict=True):
        assert close(ours, reference)
    weights = torch.randn(states[-1].shape) * valid.unsqueeze(2)
    ((states[-1] * weights).sum() + states[1][valid].square().sum()).backward()
    ((expected[-1] * weights).sum() + expected[1][valid].square().sum()).backward()
    gradients = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    renamed = interop.state_to_huggingface(gradients, encoder.to_config())
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    # All of ours has a gradient but the mask embedding, which was not used.
    assert gradients.keys() == {name for name, _ in encoder.named_parameters()} - {"mask_emb"}
    # The biases of the keys change nothing: their gradient is rounding.
    scale = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (renamed[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * scale, name


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_shifted_picks_the_column_of_the_distance(frames: int) -> None:
    scores = torch.randn(2, 3, frames, 2 * frames, dtype=torch.double, requires_grad=True)
    query, key = torch.meshgrid(torch.arange(frames), torch.arange(frames), indexing="ij")
    expected = scores.gather(3, (frames - 1 - query + key).expand(2, 3, -1, -1))
    assert torch.equal(shifted(scores), expected)
    assert torch.autograd.gradcheck(shifted, scores)


@pytest.mark.parametrize("layer_norm_first", [True, False], ids=["large", "base"])
@pytest.mark.parametrize("pos_enc_type", POSITIONS)
def test_s3prl_loads_the_export(pos_enc_type: str, layer_norm_first: bool, tmp_path: Path) -> None:
    encoder = small_encoder(pos_enc_type, layer_norm_first=layer_norm_first, normalize=layer_norm_first)
    config = encoder.to_config()
    model, task = interop.config_to_fairseq(config)
    weights = interop.state_to_fairseq(encoder.state_dict(), config)
    heads = {"project_q": nn.Linear(32, 16), "final_proj": nn.Linear(48, 16)}
    for name, head in heads.items():
        weights |= {f"{name}.{key}": value for key, value in head.state_dict().items()}
    model |= {"final_dim": 16, "quantize_targets": False, "max_positions": 1000}
    write_torch(tmp_path / "theirs.pt", {"model_cfg": model, "task_cfg": task, "model_weight": weights})
    write_native("hubert", encoder, tmp_path / "ours")
    ours, theirs = Upstream(None, str(tmp_path / "ours")), S3PRLUpstream("wav2vec2_local", str(tmp_path / "theirs.pt"))
    waveforms, lengths = two_waveforms(SAMPLES, SHORTER)
    assert_same_states(ours, theirs, waveforms[:1], lengths[:1])
    assert_same_states(ours, theirs, waveforms, lengths)
    loaded = theirs.upstream.model.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in loaded.items())
    # What a checkpoint of fairseq's holds beyond ours, and no client reads: 3 tensors, and the rates of each layer.
    assert len(weights) - len(interop.split_qkv(encoder.state_dict())) - 4 == 3 + 3 * (pos_enc_type == "rope")


@pytest.mark.parametrize("pos_enc_type", POSITIONS)
def test_weights_and_config_there_and_back(pos_enc_type: str) -> None:
    encoder = small_encoder(pos_enc_type, dropout=0.1, attention_dropout=0.1, activation_dropout=0.1)
    config, state = encoder.to_config(), encoder.state_dict()
    back = interop.config_from_fairseq(*interop.config_to_fairseq(config))
    assert back == config | {"frame_length_rule": "fold"}
    again = interop.state_from_fairseq(interop.state_to_fairseq(state, config), config)
    huggingface = interop.config_to_huggingface(config)
    assert interop.config_from_huggingface(huggingface, {"do_normalize": False}) == config
    theirs = interop.state_to_huggingface(state, config)
    for copy in (again, interop.state_from_huggingface(theirs, config, prefix="wav2vec2_conformer")):
        assert copy.keys() == state.keys()
        assert all(torch.equal(copy[key], state[key]) for key in state)


def test_what_cannot_be_converted_says_why() -> None:
    with pytest.raises(InteropError, match="layer_norm_first"):
        interop.config_to_huggingface(small_encoder("rope", layer_norm_first=False).to_config())
    model, task = interop.config_to_fairseq(small_encoder("rope").to_config())
    for field, value in (("attn_type", ""), ("pos_enc_type", "abs"), ("layer_type", "trf_adp")):
        with pytest.raises(InteropError, match=f"layer_type: .*{value}"):
            interop.config_from_fairseq(model | {field: value}, task)
    theirs = {"model_type": "wav2vec2-conformer", "hidden_act": "swish", "position_embeddings_type": None}
    with pytest.raises(InteropError, match="position_embeddings_type: None"):
        interop.config_from_huggingface(theirs, {})


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("layer_type", {"layer_type": "mamba"}),
        ("pos_enc_type", {"pos_enc_type": "abs"}),
        ("pos_enc_type", {"layer_type": "transformer"}),
        ("depthwise_conv_kernel_size", {"depthwise_conv_kernel_size": 30}),
        ("encoder_attention_heads", {"encoder_attention_heads": 16}),
    ],
)
def test_what_does_not_go_together_is_refused(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"method\.encoder\.{field}: .*; use "):
        replace(small_config("rope"), **changes)


def test_exports_from_before_conformers_still_load(tmp_path: Path) -> None:
    method = small_method()
    write_native("hubert", method.encoder, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for field in ("layer_type", "pos_enc_type", "depthwise_conv_kernel_size"):
        del config["encoder"][field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Upstream(None, str(tmp_path)).encoder.config == method.encoder.config
    assert initialise(small_method(), str(tmp_path), "reset")
    conformer = small_method(layer_type="conformer", pos_enc_type="rope")
    with pytest.raises(InteropError, match=r"encoder\.layer_type: 'transformer' there, 'conformer' in the recipe"):
        initialise(conformer, str(tmp_path), "reset")
    theirs = interop.state_to_fairseq(method.encoder.state_dict(), config["encoder"])
    assert theirs.keys() == interop.state_to_fairseq(method.encoder.state_dict(), method.encoder.to_config()).keys()


def test_a_conformer_hubert_stays_at_home() -> None:
    method = small_method(layer_type="conformer", pos_enc_type="rope")
    trained = TrainedMethod("hubert", asdict(method.config), method.state_dict())
    for convert in (hubert.to_s3prl, hubert.to_huggingface):
        with pytest.raises(InteropError, match=r"method\.encoder\.layer_type: .* export to native"):
            convert(trained)


@pytest.mark.parametrize("pos_enc_type", POSITIONS)
def test_truncated_keeps_the_hidden_states(pos_enc_type: str) -> None:
    encoder = small_encoder(pos_enc_type).eval()
    waveforms, lengths = two_waveforms(SAMPLES, SHORTER)
    short = encoder.truncated(1)
    assert len(short.encoder.layers) == 2
    for ours, whole in zip(short(waveforms, lengths)[0][:2], encoder(waveforms, lengths)[0], strict=False):
        assert torch.equal(ours, whole)


@pytest.mark.parametrize(("pos_enc_type", "published"), [("rel_pos", 618_559_104), ("rope", 593_344_128)])
def test_size_is_the_published_one_less_the_unused_convolution(pos_enc_type: str, published: int) -> None:
    large = {"encoder_layers": 24, "encoder_embed_dim": 1024, "encoder_ffn_embed_dim": 4096}
    large |= {"encoder_attention_heads": 16, "depthwise_conv_kernel_size": 31}
    large |= {"conv_feature_layers": [[512, *layer[1:]] for layer in CONV_LAYERS]}
    with torch.device("meta"):
        encoder = SpeechEncoder(small_config(pos_enc_type, **large))
    assert count(encoder) == published - (1024 * 64 * 128 + 128 + 1024)


@pytest.mark.parametrize("pos_enc_type", POSITIONS)
def test_flops_against_torch_counter(pos_enc_type: str) -> None:
    encoder = small_encoder(pos_enc_type)
    theirs = as_transformers(encoder)
    theirs.set_attn_implementation("eager")  # fused attention on the CPU is not counted
    theirs.feature_extractor._requires_grad = False  # no gradient for the waveform
    frames = encoder.frames(SAMPLES)
    with FlopCounterMode(display=False) as counter:
        out = theirs(torch.randn(1, SAMPLES)).last_hidden_state
    forward = counter.get_total_flops()
    # transformers has one distance fewer to project and to multiply with; their table takes no gradient.
    project, multiply = (3 * 2.0 * 48 * rows if pos_enc_type == "rel_pos" else 0.0 for rows in (48, frames))
    assert encoder.forward_flops(SAMPLES) == forward + project + multiply
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    # torch counts the weight gradient of a depthwise convolution once per channel.
    counted_twice = 3 * 2.0 * frames * 48 * 7 * (48 - 1)
    counted = forward + counter.get_total_flops() - counted_twice
    assert encoder.training_flops(SAMPLES) == counted + 2 * project + 3 * multiply
