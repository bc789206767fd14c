"""WavLM against microsoft's code, transformers and fairseq's HuBERT: states, gradients, loss; what is mixed."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3prl_compat  # noqa: F401  (must come before s3prl)
import soundfile
import torch
import torch.nn.functional as F
import transformers
from learning import assert_learned
from recipe_checks import (
    QUICK_MASKED_PREDICTION,
    build,
    count,
    load_fixture,
    on_meta,
    perturb,
    train_recipe,
    two_waveforms,
    value,
)
from s3prl.upstream.wavlm.modules import MultiheadAttention
from s3prl.upstream.wavlm.WavLM import WavLM
from s3prl.upstream.wavlm.WavLM import WavLMConfig as MicrosoftConfig
from scipy.stats import binomtest, kstest
from torch import Tensor, nn

from pretrain.config import ConfigError, compose_recipe, run_config, typed_method
from pretrain.data.augment.augmenter import Augmenter, open_augmenter
from pretrain.data.manifest import write_manifest
from pretrain.errors import UserError
from pretrain.method import Example
from pretrain.models.position_bias import RelativePositionBias, buckets
from pretrain.models.speech_config import SpeechEncoderConfig
from pretrain.models.speech_encoder import ConvOutput, SpeechEncoder
from pretrain.objectives.collate import Stacked, frame_labels
from pretrain.objectives.masked_prediction import DICTIONARY_SPECIALS
from pretrain.objectives.masked_units import make_batch
from pretrain.registry import load_method
from pretrain.weights.interop import speech_encoder as interop
from recipes.wavlm.method import WavLMConfig, WavLMMethod
from recipes.wavlm.reference_steps import REFERENCE_STEPS

FAIRSEQS_HUBERT = Path(__file__).parents[1] / "hubert" / "fixtures"
UNLIKELY = 1e-3  # of tests with fixed seeds


def small_encoder(large: bool, **changes: Any) -> SpeechEncoder:
    """Conv 32, Transformer 3 x 48, every parameter off its initial value, norms as in Base or Large."""
    values: dict[str, Any] = {
        "extractor_mode": "layer_norm" if large else "default",
        "conv_feature_layers": [[32, 10, 5], *[[32, 3, 2]] * 4, *[[32, 2, 2]] * 2],
        "conv_bias": False,
        "encoder_layers": 3,
        "encoder_embed_dim": 48,
        "encoder_ffn_embed_dim": 96,
        "encoder_attention_heads": 4,
        "layer_norm_first": large,
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
        "pos_enc_type": "gated_bias",
        "num_buckets": 32,
        "max_distance": 60,
    }
    torch.manual_seed(0)
    encoder = SpeechEncoder(SpeechEncoderConfig(**(values | changes)))
    perturb(encoder)
    with torch.no_grad():
        encoder.encoder.relative_attention_bias.weight.normal_()
        for layer in encoder.encoder.layers:
            layer.self_attn.grep_a.normal_()
            layer.self_attn.grep_linear.weight.normal_()
    return encoder


def transformers_model(encoder: SpeechEncoder) -> nn.Module:
    """`transformers.WavLMModel` with our weights."""
    values = interop.config_to_huggingface(encoder.to_config(), position_bias=True)
    model = transformers.WavLMModel(transformers.WavLMConfig(**values))
    model.load_state_dict(interop.state_to_huggingface(encoder.state_dict(), encoder.to_config()))
    return model


def microsoft_model(encoder: SpeechEncoder) -> nn.Module:
    """Microsoft's `WavLM`, in the copy that s3prl ships, with our weights."""
    model = WavLM(MicrosoftConfig(interop.config_to_fairseq(encoder.to_config(), position_bias=True)[0]))
    model.load_state_dict(interop.state_to_fairseq(encoder.state_dict(), encoder.to_config()))
    return model


def transformers_states(model: nn.Module, waveforms: Tensor, lengths: Tensor) -> list[Tensor]:
    mask = (torch.arange(waveforms.shape[1]) < lengths[:, None]).long()
    output = model(waveforms, attention_mask=mask, output_hidden_states=True)
    # The final norm of a model with its norms first is not in the list.
    return [*output.hidden_states[:-1], output.last_hidden_state]


def microsoft_states(model: nn.Module, waveforms: Tensor, lengths: Tensor) -> list[Tensor]:
    padding = torch.arange(waveforms.shape[1]) >= lengths[:, None]
    inputs: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda layer, given, output: inputs.append(given[0].transpose(0, 1)))
        for layer in model.encoder.layers
    ]
    last = model.extract_features(waveforms, padding_mask=padding)[0]
    for hook in hooks:
        hook.remove()
    return [*inputs, last]


PEERS = {
    "transformers": (transformers_model, transformers_states, "conv", interop.state_to_huggingface),
    "microsoft": (microsoft_model, microsoft_states, "fold", interop.state_to_fairseq),
}


@pytest.mark.parametrize("large", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("peer", PEERS)
def test_hidden_states_and_gradients_of_the_official_models(peer: str, large: bool) -> None:
    """All states of a padded batch, and the gradient of every parameter; each peer counts padded frames its own way."""
    make, states_of, rule, translate = PEERS[peer]
    encoder = small_encoder(large, frame_length_rule=rule).train()
    theirs = make(encoder).train()
    waveforms, lengths = two_waveforms()
    states, counts = encoder(waveforms, lengths)
    expected = states_of(theirs, waveforms, lengths)
    assert len(states) == len(expected) == 4
    real = torch.arange(states[0].shape[1]) < counts[0][:, None]
    for state, reference in zip(states, expected, strict=True):
        assert (state[real] - reference[real]).abs().max() <= 1e-4 * reference[real].abs().max()
    direction = torch.randn(states[-1].shape, generator=torch.Generator().manual_seed(1)) * real.unsqueeze(2)
    for last in (states[-1], expected[-1]):
        (last * direction).sum().backward()
    # No mask is drawn here, so the mask embedding gets no gradient from either.
    own = {name: p.new_zeros(p.shape) if p.grad is None else p.grad for name, p in encoder.named_parameters()}
    gradients = translate(own, encoder.to_config())
    references = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    largest = max(float(gradient.norm()) for gradient in references.values())
    assert any("grep_a" in name or "gru_rel_pos_const" in name for name in references)
    assert any("relative_attention_bias" in name or "rel_attn_embed" in name for name in references)
    for name, reference in references.items():
        # Below this the exact gradient is zero (key biases) and what is found is rounding.
        if reference.norm() > 1e-6 * largest:
            assert (gradients[name] - reference).norm() <= 1e-3 * reference.norm(), name


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(320, 800), (320, 1280), (32, 60)])
def test_buckets_and_biases_are_microsofts(num_buckets: int, max_distance: int) -> None:
    options = {"has_relative_attention_bias": True, "num_buckets": num_buckets, "max_distance": max_distance}
    official = MultiheadAttention(24, 3, self_attention=True, gru_rel_pos=True, **options)
    distances = torch.arange(-3000, 3001)
    found = buckets(distances, num_buckets, max_distance)
    assert torch.equal(found, official._relative_positions_bucket(distances))
    # Every bucket is used but that of a key 0 frames behind the query.
    assert found.unique().tolist() == [n for n in range(num_buckets) if n != num_buckets // 2]
    ours = RelativePositionBias(num_buckets, 3, max_distance)
    ours.load_state_dict(official.relative_attention_bias.state_dict())
    assert torch.equal(ours(117), official.compute_bias(117, 117))


def test_the_bias_is_there_when_the_first_layer_is_dropped() -> None:
    """In microsoft's code the layers above a dropped first layer have none."""
    encoder, other = small_encoder(False).train(), small_encoder(False, encoder_layers=2).train()
    state = {key: tensor for key, tensor in encoder.state_dict().items() if not key.startswith("encoder.layers.0.")}
    for number in (1, 2):
        state = {key.replace(f"encoder.layers.{number}.", f"encoder.layers.{number - 1}."): state[key] for key in state}
    other.load_state_dict(state)
    encoder.encoder.skipped = [True, False, False]
    waveforms, lengths = two_waveforms()
    torch.testing.assert_close(encoder(waveforms, lengths)[0][-1], other(waveforms, lengths)[0][-1])


def test_a_truncated_encoder_keeps_the_bias() -> None:
    encoder = small_encoder(True).eval()
    waveforms, lengths = two_waveforms()
    with torch.no_grad():
        whole, cut = encoder(waveforms, lengths)[0], encoder.truncated(1)(waveforms, lengths)[0]
    torch.testing.assert_close(cut[1], whole[1])


@pytest.mark.parametrize("name", ["hubert_tiny_postln", "hubert_tiny_preln_2dict"])
def test_the_loss_is_huberts_on_the_same_frames(name: str) -> None:
    """fairseq's HuBERT has computed logits, losses and hits from these last hidden states, labels and masks."""
    facts, tensors = load_fixture(FAIRSEQS_HUBERT, name)
    model, sets = facts["config"], range(len(facts["classes"]))
    values = compose_tiny() | {key: model[key] for key in ("final_dim", "untie_final_proj", "logit_temp")}
    kept = {key: model[key] for key in ("encoder_embed_dim", "layer_norm_first")}
    values["encoder"] |= kept | {"conv_pos_groups": 4}
    values |= {"num_classes": [classes - DICTIONARY_SPECIALS for classes in facts["classes"]]}
    values |= {"label_rates_hz": [int(model["label_rate"])] * len(sets), "pred_nomask_weight": 0.5}
    method = WavLMMethod(typed_method(WavLMConfig, values))
    head = {key: tensors[f"state.{key}"] for key in ("final_proj.weight", "final_proj.bias", "label_embs_concat")}
    assert not method.load_state_dict(head, strict=False).unexpected_keys
    mask, padding = tensors["in.mask_indices"].numpy(), tensors["out.frame_padding_mask"].numpy()
    rate, frames = int(model["label_rate"]), mask.shape[1]
    lines = [tensors[f"in.target_{i}"].numpy() - DICTIONARY_SPECIALS for i in sets]
    labels = [[frame_labels(row, rate, 0, 320, frames) for row in line] for line in lines]
    stacked = Stacked(tensors["in.wav"], (~tensors["in.padding_mask"]).sum(1), torch.arange(len(mask)), padded=True)
    batch = make_batch(stacked, labels=np.array(labels), mask=mask, valid=~padding, scores_unmasked=True)
    last = tensors[f"out.masked.hidden_{model['encoder_layers']}"]
    if model["layer_norm_first"]:
        norm = (tensors[f"state.encoder.layer_norm.{name}"] for name in ("weight", "bias"))
        last = F.layer_norm(last, last.shape[2:], *norm)
    output = method.prediction(batch, ConvOutput(torch.zeros(1), torch.zeros(1), None), last)
    scalars = facts["scalars"]
    for kind, letter in (("masked", "m"), ("unmasked", "u")):
        summed = sum(scalars[f"loss_{letter}_{i}"] for i in sets)
        assert value(output, f"loss_{kind}") == pytest.approx(summed / scalars["count_m_0"], rel=1e-4)
    expected = sum(scalars[f"loss_m_{i}"] + 0.5 * scalars[f"loss_u_{i}"] for i in sets)
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)


def compose_tiny() -> dict[str, Any]:
    return compose_recipe("wavlm_tiny")["method"]


@pytest.fixture(scope="module")
def tiny() -> WavLMMethod:
    method = build("wavlm_tiny")
    assert isinstance(method, WavLMMethod)
    return method


def example(row: int, samples: int) -> Example:
    rng = np.random.default_rng(row)
    waveform = torch.from_numpy(0.1 * rng.standard_normal(samples, dtype=np.float32))
    labels = (7 * row + np.arange((samples - 400) // 160 + 1)) % 50
    return Example(waveform, row, 0, {"labels_0": labels}, rng)


def test_without_biases_it_is_hubert(tiny: WavLMMethod) -> None:
    hubert = load_method("hubert").Method
    encoder = asdict(tiny.config.encoder) | {"pos_enc_type": "abs"}
    other = hubert(typed_method(hubert.Config, asdict(tiny.config) | {"name": "hubert", "encoder": encoder}))
    state = {key: tensor for key, tensor in tiny.state_dict().items() if key in other.state_dict()}
    other.load_state_dict(state)
    batch = tiny.collator(tiny.config)([example(0, 32_000), example(1, 20_000)])
    table = tiny.encoder.encoder.relative_attention_bias.weight
    with torch.no_grad():
        kept = table.clone()
        table.normal_(std=3.0, generator=torch.Generator().manual_seed(0))
        biased = tiny(batch).total(batch)
        table.zero_()
        plain = tiny(batch).total(batch)
        table.copy_(kept)
    expected = other(batch).total(batch).item()
    assert plain.item() == pytest.approx(expected, rel=1e-5)
    assert abs(biased.item() - expected) > 1e-4 * expected


def test_the_peer_computes_our_loss_from_our_weights(tiny: WavLMMethod) -> None:
    peer = REFERENCE_STEPS["transformers"](tiny.config).train()
    state = tiny.state_dict()
    encoder = {key.removeprefix("encoder."): tensor for key, tensor in state.items() if key.startswith("encoder.")}
    peer.model.load_state_dict(interop.state_to_huggingface(encoder, tiny.encoder.to_config()))
    head = {key: tensor for key, tensor in state.items() if not key.startswith("encoder.")}
    assert peer.load_state_dict(head, strict=False).unexpected_keys == []
    batch = tiny.collator(tiny.config)([example(0, 24_000), example(1, 24_000)])
    torch.testing.assert_close(peer(batch), tiny(batch).total(batch), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("recipe", "encoder", "with_heads"),
    # The paper's 94.70 M and SUPERB's 316.62 M count the heads for 500 + 4 classes; 315.45 M is Large without them.
    [("wavlm_base", 94_381_936, 94_707_824), ("wavlm_large", 315_453_120, 316_627_392)],
)
def test_published_sizes(recipe: str, encoder: int, with_heads: int) -> None:
    method = on_meta(recipe)
    assert (count(method.encoder), count(method)) == (encoder, with_heads)


def test_an_encoder_without_the_bias_is_refused() -> None:
    values = compose_tiny()
    values["encoder"]["pos_enc_type"] = "abs"
    with pytest.raises(ConfigError, match=r"method\.encoder\.pos_enc_type: abs; WavLM is HuBERT with"):
        typed_method(WavLMConfig, values)
    values["encoder"] |= {"pos_enc_type": "gated_bias", "num_buckets": 30}
    with pytest.raises(UserError, match=r"method\.encoder\.num_buckets.*: 30 buckets .* give a multiple of 4"):
        typed_method(WavLMConfig, values)
    values["encoder"] |= {"num_buckets": 320, "max_distance": 80}
    with pytest.raises(UserError, match=r"320 buckets for distances up to 80 frames do not go together"):
        typed_method(WavLMConfig, values)


SAMPLES, LEVELS = 400, (0.1, 0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def published_mixing(tmp_path_factory: pytest.TempPathFactory) -> Augmenter:
    """The augmentation of wavlm_base_plus, its noise a file of ones: no sign changes in what it adds."""
    folder = tmp_path_factory.mktemp("noise")
    soundfile.write(folder / "a.wav", np.full(1000, 0.5, np.float32), 16_000, subtype="FLOAT")
    write_manifest(folder / "train.tsv", folder, [("a.wav", 1000)])
    values = compose_recipe("wavlm_base_plus", ["data.dir=somewhere"])
    augmenter = open_augmenter(run_config(values).augment, str(folder), None, None)  # type: ignore[arg-type]
    assert augmenter is not None
    return augmenter


def test_what_is_mixed_is_as_published(published_mixing: Augmenter) -> None:
    """A fifth of the utterances: a tenth of them with noise at -5 to 20 dB, the others with speech at -5 to 5 dB.

    What is added covers at most half of an utterance, so that the primary speaker is always the longer part. Each
    stage by itself is tested in tests/test_augment.py.
    """
    rng = np.random.default_rng(0)
    # Random signs at one level: ratios can be read off any sample.
    clean = [(level * rng.choice([-1.0, 1.0], SAMPLES)).astype(np.float32) for level in LEVELS]
    ratios: dict[str, list[float]] = {"speech": [], "noise": []}
    lengths, epochs = [], 1500
    for epoch in range(epochs):
        rows = [
            Example(torch.from_numpy(w), i, 0, {}, np.random.default_rng([7, epoch, i])) for i, w in enumerate(clean)
        ]
        for row, altered in enumerate(published_mixing(rows, [])):
            added = altered.waveform.numpy().astype(np.float64) - clean[row]
            places = np.flatnonzero(added)
            # The sign of fewer samples may not change by chance.
            if len(places) >= 20:
                lengths.append(len(places))
                kind = "noise" if (added[places] > 0).all() else "speech"
                ratios[kind].append(20 * math.log10(LEVELS[row] / np.abs(added[places]).mean()))
    # 181 of the 201 lengths from 0 to 200 are 20 or more.
    share = 181 / 201
    assert binomtest(len(ratios["speech"]), len(LEVELS) * epochs, 0.2 * 0.9 * share).pvalue > UNLIKELY
    assert binomtest(len(ratios["noise"]), len(LEVELS) * epochs, 0.2 * 0.1 * share).pvalue > UNLIKELY
    for kind, (low, high) in {"speech": (-5.0, 5.0), "noise": (-5.0, 20.0)}.items():
        assert kstest(ratios[kind], "uniform", (low, high - low)).pvalue > UNLIKELY
    assert max(lengths) <= SAMPLES // 2
    assert kstest(np.array(lengths) + rng.random(len(lengths)), "uniform", (20, 181)).pvalue > UNLIKELY


def test_the_labels_stay_those_of_the_clean_utterance(published_mixing: Augmenter, tiny: WavLMMethod) -> None:
    collator = tiny.collator(tiny.config)
    altered = 0
    for seed in range(8):
        rows = [[example(4 * seed + row, 8_000) for row in range(4)] for _ in range(2)]
        plain, mixed = collator(rows[0]), collator(published_mixing(rows[1], []))
        altered += int((plain.waveforms != mixed.waveforms).any(1).sum())
        assert plain.extras.keys() == mixed.extras.keys()
        assert all(torch.equal(tensor, mixed.extras[name]) for name, tensor in plain.extras.items())
    assert altered > 0


def test_it_learns_more_than_how_often_each_label_comes(learning_seed: int, tmp_path: Path) -> None:
    """Seconds of training on mixed speech: a smaller network, fewer clusters, and spans of 2 frames."""
    network = "method.encoder={encoder_embed_dim:64,encoder_ffn_embed_dim:128,encoder_layers:2,conv_feature_layers:"
    last = train_recipe(
        "wavlm_tiny",
        tmp_path,
        learning_seed,
        network + "[[32,10,5],[32,3,2],[32,3,2],[32,3,2],[32,3,2],[32,2,2],[32,2,2]]}",
        "method={final_dim:32,mask_length:2,mask_prob:0.3,num_classes:[16]}",
        "batch={seconds_per_micro_batch:8,micro_batches_per_step:1}",
        "crop.max_seconds=2.0",
        "optimizer.lr=8e-3",
        "schedule={warmup_updates:20,total_updates:160}",
    )
    # A predictor of the marginal distribution of these very frames would reach its entropy, and no less.
    marginal = math.log(last["validation/labels_perplexity"])
    assert_learned(last["validation/loss_masked"], below=marginal)
    assert_learned(last["validation/predictions_perplexity"], above=2)


@pytest.mark.slow
def test_the_tiny_network_learns(learning_seed: int, tmp_path: Path) -> None:
    last = train_recipe("wavlm_tiny", tmp_path, learning_seed, *QUICK_MASKED_PREDICTION)
    assert_learned(last["validation/loss_masked"], below=math.log(last["validation/labels_perplexity"]))
    assert_learned(last["validation/predictions_perplexity"], above=4)
