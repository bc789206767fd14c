"""The shared speech encoder against transformers' HubertModel and against closed forms."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import HubertConfig, HubertModel

from pretrain.errors import UserError
from pretrain.models import conv_features
from pretrain.models.kernels import attention
from pretrain.models.speech_encoder import SpeechEncoder, SpeechEncoderConfig, normalize_waveforms

CONV_LAYERS = [[512, 10, 5], *[[512, 3, 2]] * 4, *[[512, 2, 2]] * 2]
SMALL_CONV_LAYERS = [[dim // 16, kernel, stride] for dim, kernel, stride in CONV_LAYERS]
PUBLISHED = {
    "base": ({"encoder_layers": 12, "encoder_embed_dim": 768, "encoder_ffn_embed_dim": 3072}, 94_371_712),
    "large": ({"encoder_layers": 24, "encoder_embed_dim": 1024, "encoder_ffn_embed_dim": 4096}, 315_435_136),
    "xlarge": ({"encoder_layers": 48, "encoder_embed_dim": 1280, "encoder_ffn_embed_dim": 5120}, 962_493_824),
}


def small_config(**changes: Any) -> SpeechEncoderConfig:
    values = {
        "extractor_mode": "default",
        "conv_feature_layers": SMALL_CONV_LAYERS,
        "conv_bias": False,
        "encoder_layers": 3,
        "encoder_embed_dim": 48,
        "encoder_ffn_embed_dim": 96,
        "encoder_attention_heads": 4,
        "layer_norm_first": False,
        "conv_pos": 16,
        "conv_pos_groups": 4,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "dropout_input": 0.0,
        "encoder_layerdrop": 0.0,
        "feature_grad_mult": 1.0,
        "normalize": False,
        "frame_length_rule": "conv",
    }
    return SpeechEncoderConfig(**(values | changes))


def randomised(encoder: SpeechEncoder) -> SpeechEncoder:
    """Every parameter off its initial value, so that biases and norms matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.05))
    return encoder


def hf_config(config: SpeechEncoderConfig) -> HubertConfig:
    dims, kernels, strides = zip(*config.conv_feature_layers, strict=True)
    return HubertConfig(
        feat_extract_norm="group" if config.extractor_mode == "default" else "layer",
        conv_dim=dims,
        conv_kernel=kernels,
        conv_stride=strides,
        conv_bias=config.conv_bias,
        num_hidden_layers=config.encoder_layers,
        hidden_size=config.encoder_embed_dim,
        intermediate_size=config.encoder_ffn_embed_dim,
        num_attention_heads=config.encoder_attention_heads,
        num_conv_pos_embeddings=config.conv_pos,
        num_conv_pos_embedding_groups=config.conv_pos_groups,
        do_stable_layer_norm=config.layer_norm_first,
        hidden_dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        activation_dropout=config.activation_dropout,
        feat_proj_dropout=config.dropout_input,
        layerdrop=config.encoder_layerdrop,
        apply_spec_augment=False,
    )


HF_NAMES = {
    r"^mask_emb": "masked_spec_embed",
    r"^layer_norm": "feature_projection.layer_norm",
    r"^post_extract_proj": "feature_projection.projection",
    r"(conv_layers\.\d+)\.norm": r"\1.layer_norm",
    r"pos_conv\.weight_g": "pos_conv_embed.conv.parametrizations.weight.original0",
    r"pos_conv\.weight_v": "pos_conv_embed.conv.parametrizations.weight.original1",
    r"pos_conv\.bias": "pos_conv_embed.conv.bias",
    r"self_attn_layer_norm": "layer_norm",
    r"self_attn\.": "attention.",
    r"fc1": "feed_forward.intermediate_dense",
    r"fc2": "feed_forward.output_dense",
}


def hf_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors (weights or gradients) under transformers' names."""
    out = {}
    for name, tensor in tensors.items():
        for ours, theirs in HF_NAMES.items():
            name = re.sub(ours, theirs, name)
        if "qkv_proj" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                out[name.replace("qkv_proj", f"{part}_proj")] = rows
        else:
            out[name] = tensor
    return out


def as_hubert(encoder: SpeechEncoder) -> HubertModel:
    model = HubertModel(hf_config(encoder.config))
    model.load_state_dict(hf_tensors(encoder.state_dict()))
    return model


LAYOUTS = [
    {"extractor_mode": "default", "layer_norm_first": False, "conv_bias": False},
    {"extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": False},
    {"extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True},
    {"extractor_mode": "default", "layer_norm_first": False, "conv_bias": True, "conv_pos": 15},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("lengths", [None, [5000, 3377]], ids=["unpadded", "padded"])
@pytest.mark.parametrize("masked", [False, True])
def test_hidden_states_and_gradients_equal_transformers(layout: dict, lengths: list[int] | None, masked: bool) -> None:
    encoder = randomised(SpeechEncoder(small_config(**layout)))
    hubert = as_hubert(encoder)
    hubert.config.apply_spec_augment = masked
    waveforms = torch.randn(2, 5000)
    lengths = None if lengths is None else torch.tensor(lengths)
    attention_mask = None
    if lengths is not None:
        attention_mask = (torch.arange(5000) < lengths.unsqueeze(1)).long()
        waveforms = waveforms * attention_mask
    frames = encoder.frames(5000)
    mask = torch.rand(2, frames) < 0.4 if masked else None

    theirs = hubert(waveforms, attention_mask, mask_time_indices=mask, output_hidden_states=True)
    _, projected, frame_lengths = encoder.features(waveforms, lengths)
    ours = encoder.context(projected, frame_lengths, mask)

    expected = [*theirs.hidden_states[:-1], theirs.last_hidden_state]
    assert len(ours) == len(expected) == len(encoder.hidden_sizes)
    valid = torch.ones(2, frames, dtype=torch.bool)
    if frame_lengths is not None:
        valid = torch.arange(frames) < frame_lengths.unsqueeze(1)
        assert frame_lengths.tolist() == [encoder.frames(n) for n in lengths.tolist()]
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a[valid], b[valid], atol=3e-5, rtol=1e-5)

    weights = torch.randn(2, frames, 48) * valid.unsqueeze(2)
    ((ours[-1] * weights).sum() + ours[1][valid].square().sum()).backward()
    ((expected[-1] * weights).sum() + expected[1][valid].square().sum()).backward()
    gradients = hf_tensors({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
    wanted = {name: p.grad for name, p in hubert.named_parameters() if p.grad is not None}
    assert gradients.keys() == wanted.keys()
    scale = max(g.norm() for g in wanted.values())
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * scale, name


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size: str) -> None:
    changes, parameters = PUBLISHED[size]
    large = size != "base"
    shape = {"conv_feature_layers": CONV_LAYERS, "layer_norm_first": large, "conv_pos": 128, "conv_pos_groups": 16}
    mode = "layer_norm" if large else "default"
    with torch.device("meta"):
        encoder = SpeechEncoder(small_config(extractor_mode=mode, **shape, **changes))
    assert sum(p.numel() for p in encoder.parameters()) == parameters


def test_initialisation() -> None:
    torch.manual_seed(0)
    encoder = SpeechEncoder(small_config(encoder_embed_dim=192, encoder_ffn_embed_dim=384))
    layer = encoder.encoder.layers[0]
    for linear in (layer.self_attn.qkv_proj, layer.self_attn.out_proj, layer.fc1, layer.fc2):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert not linear.bias.any()
    pos_conv = encoder.encoder.pos_conv
    assert pos_conv.weight_v.std().item() == pytest.approx((4 / (16 * 192)) ** 0.5, rel=0.02)
    torch.testing.assert_close(pos_conv.weight_g, pos_conv.weight_v.pow(2).sum((0, 1), keepdim=True).sqrt())
    conv = encoder.feature_extractor.conv_layers[1].conv
    assert conv.weight.std().item() == pytest.approx((2 / (32 * 3)) ** 0.5, rel=0.05)
    assert 0 <= encoder.mask_emb.min() < 0.1 < 0.9 < encoder.mask_emb.max() <= 1


def test_frame_counts() -> None:
    assert conv_features.stride_samples(CONV_LAYERS) == 320
    assert conv_features.receptive_field_samples(CONV_LAYERS) == 400
    samples = torch.arange(400, 4000)
    counts = conv_features.frames(samples, CONV_LAYERS)
    assert torch.equal(counts, (samples - 400) // 320 + 1)
    assert [conv_features.frames(n, CONV_LAYERS) for n in samples.tolist()] == counts.tolist()
    encoder = SpeechEncoder(small_config())
    for n in (400, 719, 720, 721, 1039, 1040, 2000, 2001):
        assert encoder.features(torch.randn(1, n), None).conv.shape[1] == encoder.frames(n)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (10, 5), (4, 1)])
def test_convolution_equals_torch_and_its_gradient_is_right(kernel: int, stride: int) -> None:
    conv = conv_features.Conv1d(3, 4, kernel, stride).double()
    x = torch.randn(2, 23, 3, dtype=torch.double, requires_grad=True)
    expected = torch.nn.functional.conv1d(x.transpose(1, 2), conv.weight, conv.bias, stride).transpose(1, 2)
    torch.testing.assert_close(conv(x), expected)

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(conv, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(convolve, (x, conv.weight))


def test_norm_over_time_survives_a_steep_spectrum() -> None:
    """A loud offset and a slow drift, which every filter must cancel to see the rest 60 dB below."""
    layer = SpeechEncoder(small_config()).feature_extractor.conv_layers[0]
    time = torch.arange(4000) / 4000
    waveforms = (0.3 + 0.5 * torch.sin(2 * torch.pi * time) + 5e-4 * torch.randn(2, 4000)).double()
    with torch.no_grad():
        layer.conv.weight -= layer.conv.weight.mean(2, keepdim=True)
    exact = torch.nn.functional.conv1d(waveforms.unsqueeze(1), layer.conv.weight.double(), stride=5)
    exact = torch.nn.functional.gelu((exact - exact.mean(2, keepdim=True)) / (exact.var(2, False, True) + 1e-5).sqrt())
    ours = layer(waveforms.float().unsqueeze(2))
    assert (ours.transpose(1, 2) - exact).abs().max() < 1e-3


def test_fold_rule_is_fairseqs() -> None:
    """fairseq's `HubertModel.forward_padding_mask`, written out on the sample mask."""
    encoder = SpeechEncoder(small_config(frame_length_rule="fold"))
    for samples in (4000, 4001, 5119, 5120):
        for max_frames in (None, 9):
            lengths = torch.tensor([samples, samples - 1, 3000, 2561, 2560, 400])
            conv, _, frame_lengths = encoder.features(torch.randn(6, samples), lengths, max_frames)
            padding = torch.arange(samples) >= lengths.unsqueeze(1)
            padding = padding[:, : samples - samples % conv.shape[1]]
            expected = (~padding.view(6, conv.shape[1], -1).all(-1)).sum(1)
            assert frame_lengths.tolist() == expected.tolist()


def test_normalize_matches_layer_norm_of_each_waveform() -> None:
    waveforms = torch.randn(2, 3000) * 0.1 + 0.3
    lengths = torch.tensor([3000, 1234])
    waveforms[1, 1234:] = 0
    out = normalize_waveforms(waveforms, lengths)
    for row, length in zip(range(2), lengths.tolist(), strict=True):
        alone = torch.nn.functional.layer_norm(waveforms[row, :length], (length,))
        torch.testing.assert_close(out[row, :length], alone, atol=1e-5, rtol=1e-5)
    assert not out[1, 1234:].any()
    torch.testing.assert_close(normalize_waveforms(waveforms, None)[0], out[0], atol=1e-5, rtol=1e-5)


def test_feature_grad_mult_scales_the_convolutions_only() -> None:
    grads = {}
    for mult in (1.0, 0.1, 0.0):
        torch.manual_seed(0)
        encoder = SpeechEncoder(small_config(feature_grad_mult=mult))
        torch.manual_seed(1)
        conv, projected, _ = encoder.features(torch.randn(1, 2000), None)
        (conv.square().sum() + projected.square().sum()).backward()
        grads[mult] = encoder.feature_extractor.conv_layers[0].conv.weight.grad
    torch.testing.assert_close(grads[0.1], grads[1.0] * 0.1)
    assert grads[0.0] is None


def test_layerdrop_rate_and_effect() -> None:
    encoder = SpeechEncoder(small_config(encoder_layers=4, encoder_layerdrop=0.25))
    rng = np.random.default_rng(0)
    skipped = 0
    projected = torch.randn(1, 5, 48)
    for _ in range(500):
        encoder.draw_layerdrop(rng)
        hidden_states = encoder.context(projected, None)
        skipped += sum(torch.equal(a, b) for a, b in itertools.pairwise(hidden_states))
    # Binomial(2000, 0.25): 99.99 % lie within four standard deviations.
    assert abs(skipped - 500) < 4 * (2000 * 0.25 * 0.75) ** 0.5
    hidden_states = encoder.eval().context(projected, None)
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(hidden_states))


def test_attention_with_dropout_keeps_its_mean_and_hides_keys() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 6, 8).unbind(0)
    valid = torch.tensor([True, True, True, True, False, False])[None, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=valid)
    draws = torch.stack([attention(q, k, v, valid, 0.2) for _ in range(4000)])
    error = (draws.mean(0) - expected).abs() / (draws.std(0) / 4000**0.5)
    assert error.max() < 5
    assert torch.equal(attention(q, k, v, valid, 0.0), expected)


def test_dropout_rates_and_eval() -> None:
    encoder = SpeechEncoder(small_config(dropout=0.3, dropout_input=0.2, attention_dropout=0.1))
    projected = torch.randn(8, 100, 48)
    first = encoder.context(projected, None)[0]
    assert (first == 0).float().mean().item() == pytest.approx(0.3, abs=0.015)
    encoder.eval()
    assert torch.equal(encoder.context(projected, None)[-1], encoder.context(projected, None)[-1])


@pytest.mark.parametrize("first", [False, True])
def test_feed_forwards_are_what_the_layers_add(first: bool) -> None:
    """Each layer's feed-forward, without dropout, by a hook on its last product; none is skipped in training."""
    encoder = randomised(SpeechEncoder(small_config(layer_norm_first=first, encoder_layerdrop=0.9))).train()
    seen: list[Tensor] = []
    for layer in encoder.layers:
        layer.fc2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x, lengths = torch.randn(2, 20, 48), torch.tensor([20, 13])
    encoder.draw_layerdrop(np.random.default_rng(0))
    outputs = list(encoder.encoder.feed_forwards(x, lengths))
    assert len(outputs) == len(seen) == 3
    for output, expected in zip(outputs, seen, strict=True):
        assert torch.equal(output, expected)
    # The same layers as in a forward.
    seen.clear()
    encoder.eval().encoder(x, lengths)
    for output, expected in zip(outputs, seen, strict=True):
        torch.testing.assert_close(output, expected)


def test_several_positional_convolutions_share_the_kernel() -> None:
    encoder = SpeechEncoder(small_config(conv_pos=14, pos_conv_depth=3))
    assert [tuple(conv.weight.shape) for conv in encoder.encoder.pos_conv.convs] == [(48, 12, 4)] * 3
    # Three frames at least, as in fairseq.
    assert SpeechEncoder(small_config(conv_pos=4, pos_conv_depth=2)).encoder.pos_conv.convs[1].kernel_size == (3,)
    # No change of the first frames beyond the frames that they see: 2 of 4, less the one that is cut, three times.
    x = torch.randn(1, 30, 48)
    changed = torch.cat([x[:, :15], torch.randn(1, 15, 48)], dim=1)
    difference = (encoder.encoder.pos_conv(x) - encoder.encoder.pos_conv(changed)).abs().amax((0, 2)) > 1e-6
    assert difference.nonzero().min() == 15 - 3
    # An even kernel makes a frame more than is counted.
    odd = SpeechEncoder(small_config(conv_pos=17, pos_conv_depth=3))
    with FlopCounterMode(display=False) as counter:
        odd.encoder.pos_conv(x)
    layers = SpeechEncoder(small_config(conv_pos=16)).context_flops(30) - 2.0 * 30 * 48 * 12 * 16
    assert odd.context_flops(30) - layers == counter.get_total_flops()


def test_flops_against_torch_counter() -> None:
    """torch counts the weight gradient of the grouped positional convolution `groups` times; corrected here."""
    encoder = SpeechEncoder(small_config(extractor_mode="layer_norm", conv_pos=15))
    hubert = as_hubert(encoder)
    hubert.set_attn_implementation("eager")  # fused attention on the CPU is not counted
    hubert.feature_extractor._requires_grad = False  # no gradient for the waveform
    samples = 8000
    with FlopCounterMode(display=False) as counter:
        out = hubert(torch.randn(1, samples)).last_hidden_state
    forward = counter.get_total_flops()
    assert encoder.forward_flops(samples) == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    positions = 2.0 * encoder.frames(samples) * 48 * (48 // 4) * 15
    assert encoder.training_flops(samples) == forward + counter.get_total_flops() - positions * (4 - 1)


@pytest.mark.parametrize(
    ("field", "value", "choices"),
    [
        ("extractor_mode", "other", "'other'; use default or layer_norm"),
        ("frame_length_rule", "other", "'other'; use fold or conv"),
        ("conv_feature_layers", [[32, 10]], r"\[dim, kernel, stride\]"),
        ("conv_feature_layers", [[32, 2, 5]], "every sample is seen"),
        ("encoder_attention_heads", 5, "5 does not divide encoder_embed_dim 48"),
        ("conv_pos_groups", 5, "5 does not divide encoder_embed_dim 48"),
    ],
)
def test_impossible_choices_are_refused(field: str, value: object, choices: str) -> None:
    with pytest.raises(UserError, match=rf"^method\.encoder\.{field}: .*{choices}"):
        small_config(**{field: value})


@pytest.mark.parametrize("mode", ["default", "layer_norm"])
def test_bf16_autocast_stays_close(mode: str) -> None:
    encoder = randomised(SpeechEncoder(small_config(extractor_mode=mode))).eval()
    waveforms = torch.randn(2, 4000)
    exact = encoder(waveforms, None)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder(waveforms, None)[0]
    for a, b in zip(exact, rounded, strict=True):
        assert (a - b.float()).norm() < 0.03 * a.norm()


def test_config_round_trip_and_forward() -> None:
    encoder = SpeechEncoder(small_config()).eval()
    copy = SpeechEncoder.from_config(encoder.to_config()).eval()
    copy.load_state_dict(encoder.state_dict())
    waveforms = torch.randn(2, 3000)
    hidden_states, frame_lengths = copy(waveforms, None)
    assert torch.equal(hidden_states[-1], encoder(waveforms, torch.tensor([3000, 3000]))[0][-1])
    assert [n.tolist() for n in frame_lengths] == [[encoder.frames(3000)] * 2] * 4
    assert encoder.downsample_rates == [320] * 4
