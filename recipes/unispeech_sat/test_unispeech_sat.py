"""UniSpeech-SAT against the official code's numbers, transformers, HuBERT and closed forms."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from learning import assert_learned
from recipe_checks import (
    QUICK_MASKED_PREDICTION,
    build,
    count,
    group,
    load_fixture,
    method_state,
    on_meta,
    perturb,
    train_recipe,
    two_waveforms,
    value,
)

from pretrain.config import ConfigError, compose_recipe, typed_method
from pretrain.method import Batch, Example, Progress
from pretrain.models.speech_config import SpeechEncoderConfig
from pretrain.models.speech_encoder import SpeechEncoder
from pretrain.objectives.collate import Stacked, frame_labels
from pretrain.objectives.masked_prediction import DICTIONARY_SPECIALS
from pretrain.objectives.masked_units import make_batch
from pretrain.quantizers import gumbel
from pretrain.registry import load_method
from pretrain.weights.interop import speech_encoder as encoder_interop
from recipes.unispeech_sat import interop
from recipes.unispeech_sat.contrast import instance_logits, utterance_contrast
from recipes.unispeech_sat.method import UniSpeechSatConfig, UniSpeechSatMethod
from recipes.unispeech_sat.reference_steps import REFERENCE_STEPS

FIXTURES = Path(__file__).parent / "fixtures"


class Official:
    """One fixture: the numbers of the official code, and our method with its weights on its batch."""

    def __init__(self, name: str) -> None:
        self.facts, self.tensors = load_fixture(FIXTURES, name)
        self.scalars: dict[str, float] = self.facts["scalars"]
        self.method = self._method()
        self.batch = self._batch()

    def _method(self) -> UniSpeechSatMethod:
        model, criterion = self.facts["config"], self.facts["criterion"]
        cfg = {"model": {**model, "_name": "unispeech_sat"}, "task": {"normalize": False}}
        imported = interop.from_pt({"cfg": cfg, "model": group(self.tensors, "state")})
        same = ("final_dim", "untie_final_proj", "logit_temp", "mask_prob", "mask_length")
        same += ("utterance_contrastive_layer", "cross_sample_instances", "latent_vars", "latent_groups", "latent_temp")
        values = compose_recipe("unispeech_sat_tiny")["method"] | {
            **{key: model[key] for key in same if key in model},
            "encoder": imported.encoder_config,
            "num_classes": [classes - DICTIONARY_SPECIALS for classes in self.facts["classes"]],
            "label_rates_hz": [model["label_rate"]],
            "pred_nomask_weight": criterion["pred_nomask_weight"],
            "latent_dim": model["final_dim"],
        }
        names = ("feature_penalty_weight", "utterance_contrastive_weight", "", "diversity_weight")
        values |= {name: weight for name, weight in zip(names, criterion["loss_weights"], strict=True) if name}
        method = UniSpeechSatMethod(typed_method(UniSpeechSatConfig, values))
        method.load_state_dict(method_state(imported))
        method.before_step(Progress(self.facts["quantizer_num_updates"], 2000, 0))
        return method.train()

    def _batch(self) -> Batch:
        mask, rate = self.tensors["in.mask_indices"].numpy(), self.facts["config"]["label_rate"]
        lines = self.tensors["in.target_0"].numpy() - DICTIONARY_SPECIALS
        batch = make_batch(
            Stacked(self.tensors["in.wav"], torch.tensor(self.facts["lengths"]), torch.arange(len(mask)), padded=True),
            labels=np.stack([[frame_labels(line, rate, 0, 320, mask.shape[1]) for line in lines]]),
            mask=mask,
            valid=~self.tensors["out.frame_padding_mask"].numpy(),
            scores_unmasked=self.method.config.pred_nomask_weight > 0,
        )
        # Rows hold all frames' first candidates, then all frames' second ones.
        drawn = self.tensors["in.instance_idxs"].view(len(mask), -1, int(mask[0].sum()))
        batch.extras["instances"] = drawn.transpose(1, 2).flatten(0, 1)
        return batch


@pytest.fixture(scope="module", params=["unispeech_sat_postln", "unispeech_sat_preln"])
def official(request: pytest.FixtureRequest) -> Official:
    return Official(request.param)


@pytest.fixture
def given_noise(official: Official, monkeypatch: pytest.MonkeyPatch) -> None:
    """The official code's Gumbel noise in the place of ours."""
    noise = official.tensors["in.gumbel_noise"]
    monkeypatch.setattr(gumbel, "gumbel_noise", lambda logits: noise.view_as(logits))


def test_states_of_the_masked_pass_are_the_official_ones(official: Official) -> None:
    method, batch = official.method, official.batch
    assert batch.padded
    states = method.encode(batch)[1]
    extracted = states[method.config.utterance_contrastive_layer]
    if method.layer_norm_for_extract is not None:
        extracted = method.layer_norm_for_extract(extracted)
    real = ~official.tensors["out.frame_padding_mask"]
    for ours, name in ((states[-1], "hidden_last"), (extracted, "extracted")):
        reference = official.tensors[f"out.masked.{name}"]
        assert (ours - reference)[real].abs().max() <= 1e-4 * reference[real].abs().max()


@pytest.mark.usefixtures("given_noise")
def test_every_term_of_the_loss_is_the_official_one(official: Official) -> None:
    scalars, batch = official.scalars, official.batch
    output = official.method(batch)
    units, masked = scalars["sample_size"], len(batch.extras["masked_positions"])
    assert batch.sample_size == units
    assert output.total(batch).item() == pytest.approx(scalars["loss"], rel=1e-5)
    config = official.method.config
    assert value(output, "loss_masked") == pytest.approx(scalars["loss_m_0"] / masked, rel=1e-5)
    assert value(output, "loss_features") == pytest.approx(scalars["loss_features_pen"] / units, rel=1e-5)
    spoken = scalars["loss_loss_spk_m"] / units / config.utterance_contrastive_weight
    assert value(output, "loss_contrastive") == pytest.approx(spoken, rel=1e-5)
    diversity = scalars["loss_prob_perplexity"] / units / config.diversity_weight
    assert value(output, "loss_diversity") == pytest.approx(diversity, rel=1e-5)
    assert value(output, "mean_targets") == pytest.approx(scalars["mean_targets"], rel=1e-6)
    assert value(output, "contrastive_accuracy") == pytest.approx(scalars["contrastive_acc"], rel=1e-6)
    assert value(output, "prob_perplexity") == pytest.approx(scalars["prob_perplexity"], rel=1e-5)
    assert value(output, "temperature") == pytest.approx(scalars["temp"], rel=1e-6)
    shares = [output.metrics[f"codes_{index}"].counts / masked for index in range(config.latent_groups)]
    perplexity = sum(float(torch.special.entr(share).sum().exp()) for share in shares)
    assert perplexity == pytest.approx(scalars["code_perplexity"], rel=1e-5)


@pytest.mark.usefixtures("given_noise")
def test_gradients_are_the_official_ones(official: Official) -> None:
    method, batch = official.method, official.batch
    method.zero_grad(set_to_none=True)
    method(batch).total(batch).backward()
    gradients = {name: parameter.grad for name, parameter in method.named_parameters()}
    encoder = {key.removeprefix("encoder."): g for key, g in gradients.items() if key.startswith("encoder.")}
    ours = encoder_interop.state_to_fairseq(encoder, method.encoder.to_config())
    ours |= {key: g for key, g in gradients.items() if not key.startswith("encoder.")}
    ours |= {f"encoder.{key}": g for key, g in ours.items() if key.startswith("layer_norm_for_extract")}
    norms = official.facts["grad_norms"]
    assert {"spk_proj.weight", "quantizer.vars", "quantizer.weight_proj.weight", "mask_emb"} <= norms.keys()
    largest = max(norms.values())
    for name, norm in norms.items():
        # Below this the exact gradient is zero (key biases) and what is found is rounding.
        if norm > 1e-6 * largest:
            assert float(ours[name].norm()) == pytest.approx(norm, rel=1e-3), name
    for name, reference in group(official.tensors, "grad").items():
        assert (ours[name] - reference).norm() <= 1e-3 * reference.norm(), name


def test_the_loss_of_rows_with_unlike_numbers_of_frames_pair_by_pair() -> None:
    """Written out in loops; the official code has no such batches."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
    predictions, targets = (torch.randn(8, 4, generator=generator) for _ in range(2))
    instances = torch.randint(8, (8, 6), generator=generator)
    logits = instance_logits(predictions, targets, instances, 0.1)
    found = utterance_contrast(logits, rows, instances)
    costs, hits, same = [], [], []
    for frame in range(8):
        for candidate, together in [(frame, True)] + [(i, rows[i] == rows[frame]) for i in instances[frame].tolist()]:
            cosine = F.cosine_similarity(predictions[frame], targets[candidate], dim=0).item() / 0.1
            costs.append(math.log1p(math.exp(-cosine if together else cosine)))
            hits.append((cosine >= 0) == bool(together))
            same.append(bool(together))
    assert found.loss.item() == pytest.approx(np.mean(costs), rel=1e-5)
    assert found.accuracy.item() == pytest.approx(np.mean(hits))
    assert found.share.item() == pytest.approx(np.mean(same))
    # A predictor that is sure of the own target and gives all others one probability, the best one.
    others = np.array(same).reshape(8, 7)[:, 1:].ravel()
    entropy = F.binary_cross_entropy(torch.full((48,), others.mean()), torch.tensor(others).float())
    assert found.loss_of_share.item() == pytest.approx(entropy.item() * 6 / 7, rel=1e-5)
    assert found.chance.item() == pytest.approx((8 + max(others.sum(), (~others).sum())) / 56)


def small_encoder(large: bool) -> SpeechEncoder:
    """Conv 32, Transformer 3 x 48, every parameter off its initial value, norms as in Base or Large."""
    values = compose_recipe("unispeech_sat_tiny")["method"]["encoder"] | {
        "extractor_mode": "layer_norm" if large else "default",
        "conv_feature_layers": [[32, 10, 5], *[[32, 3, 2]] * 4, *[[32, 2, 2]] * 2],
        "encoder_embed_dim": 48,
        "encoder_ffn_embed_dim": 96,
        "layer_norm_first": large,
        "conv_pos": 16,
        "conv_pos_groups": 4,
        "frame_length_rule": "conv",
    }
    torch.manual_seed(0)
    encoder = SpeechEncoder(SpeechEncoderConfig(**values))
    perturb(encoder)
    return encoder


@pytest.mark.parametrize("large", [False, True], ids=["post-norm", "pre-norm"])
def test_hidden_states_and_gradients_of_transformers(large: bool) -> None:
    """All states of a padded batch, and the gradient of every parameter."""
    encoder = small_encoder(large).train()
    values = encoder_interop.config_to_huggingface(encoder.to_config())
    theirs = transformers.UniSpeechSatModel(transformers.UniSpeechSatConfig(**values)).train()
    theirs.load_state_dict(encoder_interop.state_to_huggingface(encoder.state_dict(), encoder.to_config()))
    waveforms, lengths = two_waveforms()
    states, counts = encoder(waveforms, lengths)
    mask = (torch.arange(waveforms.shape[1]) < lengths[:, None]).long()
    output = theirs(waveforms, attention_mask=mask, output_hidden_states=True)
    # The final norm of a model with its norms first is not in the list.
    expected = [*output.hidden_states[:-1], output.last_hidden_state]
    assert len(states) == len(expected) == 4
    real = torch.arange(states[0].shape[1]) < counts[0][:, None]
    for state, reference in zip(states, expected, strict=True):
        assert (state[real] - reference[real]).abs().max() <= 1e-4 * reference[real].abs().max()
    direction = torch.randn(states[-1].shape, generator=torch.Generator().manual_seed(1)) * real.unsqueeze(2)
    for last in (states[-1], expected[-1]):
        (last * direction).sum().backward()
    # No mask is drawn here, so the mask embedding gets no gradient from either.
    own = {name: p.new_zeros(p.shape) if p.grad is None else p.grad for name, p in encoder.named_parameters()}
    gradients = encoder_interop.state_to_huggingface(own, encoder.to_config())
    references = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    largest = max(float(gradient.norm()) for gradient in references.values())
    for name, reference in references.items():
        if reference.norm() > 1e-6 * largest:
            assert (gradients[name] - reference).norm() <= 1e-3 * reference.norm(), name


@pytest.fixture(scope="module")
def tiny() -> UniSpeechSatMethod:
    method = build("unispeech_sat_tiny")
    assert isinstance(method, UniSpeechSatMethod)
    return method


def example(row: int, samples: int, epoch: int = 0) -> Example:
    rng = np.random.default_rng(row)
    waveform = torch.from_numpy(0.1 * rng.standard_normal(samples, dtype=np.float32))
    labels = (7 * row + np.arange((samples - 400) // 160 + 1)) % 50
    return Example(waveform, row, 0, {"labels_0": labels}, np.random.default_rng([0, epoch, row]))


def padded_batch(method: UniSpeechSatMethod, epoch: int = 0) -> Batch:
    return method.collator(method.config)(
        [example(0, 32_000, epoch), example(1, 20_000, epoch), example(2, 9_000, epoch)]
    )


def test_masked_prediction_is_huberts(tiny: UniSpeechSatMethod) -> None:
    """With the weights of the other losses at zero: the loss, masks and labels of the same batch in HuBERT."""
    hubert = load_method("hubert").Method
    names = hubert.Config.__dataclass_fields__
    values = {key: setting for key, setting in asdict(tiny.config).items() if key in names} | {"name": "hubert"}
    other = hubert(typed_method(hubert.Config, values))
    other.load_state_dict({key: tensor for key, tensor in tiny.state_dict().items() if key in other.state_dict()})
    batch = padded_batch(tiny)
    theirs = other.collator(other.config)([example(0, 32_000), example(1, 20_000), example(2, 9_000)])
    assert all(torch.equal(tensor, batch.extras[name]) for name, tensor in theirs.extras.items())
    ours, expected = tiny(batch), other(theirs)
    assert torch.equal(ours.loss, expected.loss)
    assert set(expected.metrics) <= set(ours.metrics)
    added = value(ours, "loss_contrastive") + tiny.config.diversity_weight * value(ours, "loss_diversity")
    assert ours.mean.item() == pytest.approx(expected.mean.item() + added, rel=1e-5)


def test_instances_come_from_all_real_masked_frames_but_the_own(tiny: UniSpeechSatMethod) -> None:
    batch = padded_batch(tiny)
    assert batch.padded
    instances, scored = batch.extras["instances"], len(batch.extras["masked_positions"])
    assert instances.shape == (scored, tiny.config.cross_sample_instances)
    assert set(instances.unique().tolist()) == set(range(scored))
    assert not (instances == torch.arange(scored)[:, None]).any()
    # From the rows' own generators: the same again, and others in another epoch.
    assert torch.equal(padded_batch(tiny).extras["instances"], instances)
    assert not torch.equal(padded_batch(tiny, epoch=1).extras["instances"], instances)
    # Frames of other rows come as often as there are any: all three rows have equally many masked ones.
    batches = [padded_batch(tiny, epoch).extras for epoch in range(20)]
    rows = [extras["masked_positions"] // extras["mask"].shape[1] for extras in batches]
    other = [(of[extras["instances"]] != of[:, None]).float() for of, extras in zip(rows, batches, strict=True)]
    expected = [2 * len(of) / 3 / (len(of) - 1) for of in rows]
    for of in rows:
        assert len(torch.bincount(of).unique()) == 1
    assert np.mean([share.mean() for share in other]) == pytest.approx(np.mean(expected), abs=0.02)


def test_the_temperature_falls_and_the_contrast_ends(tiny: UniSpeechSatMethod) -> None:
    batch = padded_batch(tiny)
    config = asdict(tiny.config) | {"utterance_contrastive_updates": 5, "latent_temp": [2.0, 0.5, 0.9]}
    method = UniSpeechSatMethod(typed_method(UniSpeechSatConfig, config)).train()
    method.load_state_dict(tiny.state_dict())
    spk_proj = []
    for update, temperature in ((0, 2.0), (4, 2 * 0.9**4), (5, 2 * 0.9**5), (50, 0.5)):
        method.zero_grad()
        method.before_step(Progress(update, 100, 0))
        output = method(batch)
        output.total(batch).backward()
        assert value(output, "temperature") == pytest.approx(temperature)
        assert value(output, "loss_contrastive") > 0
        spk_proj.append(float(method.spk_proj.weight.grad.norm()))
        assert method.final_proj.weight.grad.norm() > 0
    assert min(spk_proj[:2]) > 0
    assert spk_proj[2:] == [0, 0]


def test_the_contrast_teaches_the_layers_up_to_its_own(tiny: UniSpeechSatMethod) -> None:
    batch, layers = padded_batch(tiny), tiny.encoder.encoder.layers
    tiny.train().zero_grad()
    state = tiny.encode(batch)[1][tiny.config.utterance_contrastive_layer]
    tiny.contrast(state, batch)[0].loss.backward()
    assert [layer.fc1.weight.grad is not None for layer in layers] == [True, True, False]
    assert tiny.quantizer.weight_proj.weight.grad.norm() > 0
    assert tiny.quantizer.vars.grad.norm() > 0
    tiny.zero_grad()


@pytest.mark.parametrize("large", [False, True], ids=["post-norm", "pre-norm"])
def test_the_peer_computes_our_loss_from_our_weights(large: bool) -> None:
    method = build("unispeech_sat_tiny", f"method.encoder.layer_norm_first={large}").train()
    peer = REFERENCE_STEPS["transformers"](method.config).train()
    state = dict(method.state_dict())
    encoder = {key.removeprefix("encoder."): tensor for key, tensor in state.items() if key.startswith("encoder.")}
    peer.model.load_state_dict(encoder_interop.state_to_huggingface(encoder, method.encoder.to_config()))
    head = {key: tensor for key, tensor in state.items() if not key.startswith("encoder.")}
    head["quantizer.codevectors"] = head.pop("quantizer.vars")
    loaded = peer.load_state_dict(head, strict=False)
    assert not loaded.unexpected_keys
    assert all(key.startswith("model.") for key in loaded.missing_keys)
    batch = method.collator(method.config)([example(0, 24_000), example(1, 24_000)])
    losses = []
    for module in (peer, method):
        torch.manual_seed(7)  # the same Gumbel noise
        losses.append(module(batch) if module is peer else module(batch).total(batch))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("recipe", "encoder", "contrast"),
    # Projection, codebook, its logits and its projection; Large has a norm more. SUPERB's 94.68 M and 316.61 M count
    # the heads of masked prediction for 500 + 4 classes, and none of the contrast.
    [
        ("unispeech_sat_base", 94_371_712, 196_864 + 81_920 + 492_160 + 65_792),
        ("unispeech_sat_base_plus", 94_371_712, 836_736),
        ("unispeech_sat_large", 315_435_136, 787_200 + 245_760 + 656_000 + 590_592 + 2_048),
    ],
)
def test_published_sizes(recipe: str, encoder: int, contrast: int) -> None:
    method = on_meta(recipe)
    assert count(method.encoder) == encoder
    heads = count(method.final_proj) + method.label_embs_concat.numel()
    assert count(method) == encoder + heads + contrast
    assert round((encoder + heads) / 1e6, 1) == (316.6 if recipe.endswith("large") else 94.7)


def changed(**changes: Any) -> UniSpeechSatConfig:
    values = compose_recipe("unispeech_sat_tiny")["method"]
    encoder = values["encoder"] | changes.pop("encoder", {})
    return typed_method(UniSpeechSatConfig, values | changes | {"encoder": encoder})


def test_values_that_do_not_go_together_are_refused() -> None:
    for changes, message in (
        ({"utterance_contrastive_layer": 3}, r"utterance_contrastive_layer: 3 is no layer below the last of 3; give 1"),
        ({"utterance_contrastive_layer": 0}, r"utterance_contrastive_layer: 0 must be at least 1"),
        ({"cross_sample_instances": 0}, r"cross_sample_instances: 0 must be at least 1"),
        ({"latent_dim": 63}, r"latent_dim: 63 does not divide into 2 groups"),
        ({"latent_temp": [2.0, 0.5]}, r"latent_temp: \[2.0, 0.5\]; state start, end and decay"),
        ({"encoder": {"layer_type": "conformer", "pos_enc_type": "rope"}}, r"layer_type: conformer; UniSpeech-SAT's"),
    ):
        with pytest.raises(ConfigError, match=message):
            changed(**changes)


NARROW = "method.encoder={encoder_embed_dim:64,encoder_ffn_embed_dim:128,encoder_layers:2,conv_feature_layers:"
NARROW += "[[32,10,5],[32,3,2],[32,3,2],[32,3,2],[32,3,2],[32,2,2],[32,2,2]]}"


def test_it_learns_more_than_how_often_each_label_comes(learning_seed: int, tmp_path: Path) -> None:
    """Seconds of training on mixed speech: a smaller network, fewer clusters, and spans of 2 frames."""
    last = train_recipe(
        "unispeech_sat_tiny",
        tmp_path,
        learning_seed,
        NARROW,
        "method={final_dim:32,mask_length:2,mask_prob:0.3,num_classes:[16]}",
        "method={utterance_contrastive_layer:1,latent_vars:16,latent_dim:32,latent_temp:[2.0,0.5,0.98]}",
        "batch={seconds_per_micro_batch:8,micro_batches_per_step:1}",
        "crop.max_seconds=2.0",
        "optimizer.lr=8e-3",
        "schedule={warmup_updates:20,total_updates:130}",
        "trainer.validate_every=130",
    )
    # A predictor of the marginal distribution of these very frames would reach its entropy, and no less.
    assert_learned(last["validation/loss_masked"], below=math.log(last["validation/labels_perplexity"]))
    assert_learned(last["validation/predictions_perplexity"], above=2)
    # Two groups; if each kept a single code, this would be 2.
    assert_learned(last["validation/prob_perplexity"], above=2.5)


VOICES_HZ = (200, 500, 1200, 3000)


def voice(seed: int, row: int) -> Example:
    """0.4 s of one of four voices, which sound as a tone each, louder or softer, in noise; labels mean nothing."""
    rng = np.random.default_rng([seed, row])
    tone = np.sin(2 * np.pi * VOICES_HZ[row % len(VOICES_HZ)] * np.arange(6_400) / 16_000)
    waveform = (0.15 + 0.3 * rng.random()) * tone + 0.02 * rng.standard_normal(len(tone))
    return Example(torch.from_numpy(waveform.astype(np.float32)), row, 0, {"labels_0": rng.integers(4, size=20)}, rng)


def test_it_learns_to_tell_voices_apart(learning_seed: int) -> None:
    """The speakers of the sample take longer than a test has; four voices show that the contrast teaches the layer."""
    method = build(
        "unispeech_sat_tiny",
        "method.encoder={encoder_embed_dim:48,encoder_ffn_embed_dim:96,encoder_layers:2,extractor_mode:layer_norm}",
        "method.encoder.conv_feature_layers=[[24,10,5],[24,3,2],[24,3,2],[24,3,2],[24,3,2],[24,2,2],[24,2,2]]",
        "method.encoder={conv_pos:8,conv_pos_groups:4}",
        "method={final_dim:32,mask_length:2,mask_prob:0.4,num_classes:[4],label_rates_hz:[50]}",
        "method={utterance_contrastive_layer:1,utterance_contrastive_weight:5.0,diversity_weight:0.5}",
        "method={latent_vars:16,latent_dim:32,cross_sample_instances:20}",
        seed=learning_seed,
    ).train()
    assert isinstance(method, UniSpeechSatMethod)
    method.quantizer.temperature = 0.7
    optimizer = torch.optim.AdamW(method.parameters(), lr=4e-3)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min(1.0, (update + 1) / 20))
    collator, voices = method.collator(method.config), len(VOICES_HZ)
    for step in range(110):
        batch = collator([voice(learning_seed, voices * step + row) for row in range(voices)])
        optimizer.zero_grad()
        (method(batch).total(batch) / batch.sample_size).backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), 5.0)
        optimizer.step()
        warmup.step()
    unheard = collator([voice(learning_seed, 100_000 + row) for row in range(voices)])
    with torch.no_grad():
        output = method.eval()(unheard)
    # What a predictor pays that knows how often two frames are of one utterance, and not which.
    assert_learned(value(output, "loss_contrastive"), below=value(output, "loss_contrastive_of_share"))


@pytest.mark.slow
def test_the_tiny_network_learns(learning_seed: int, tmp_path: Path) -> None:
    last = train_recipe("unispeech_sat_tiny", tmp_path, learning_seed, *QUICK_MASKED_PREDICTION)
    assert_learned(last["validation/loss_masked"], below=math.log(last["validation/labels_perplexity"]))
    assert_learned(last["validation/predictions_perplexity"], above=4)
    assert_learned(last["validation/prob_perplexity"], above=4)
