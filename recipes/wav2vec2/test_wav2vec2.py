"""wav2vec 2.0 against fairseq's numbers and transformers' class: logits, terms, accuracy, states, gradients, sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from learning import assert_learned
from recipe_checks import (
    build,
    count,
    group,
    load_fixture,
    loss_per_unit,
    method_state,
    on_meta,
    perturb,
    train_recipe,
    value,
)
from torch import Tensor
from transformers.models.wav2vec2 import modeling_wav2vec2 as theirs

from pretrain.config import ConfigError, compose_recipe, typed
from pretrain.method import Batch, Example, Progress
from pretrain.objectives.collate import Stacked
from pretrain.quantizers import gumbel
from pretrain.weights.interop.speech_encoder import state_to_fairseq
from pretrain.weights.interop.types import TrainedMethod
from recipes.wav2vec2 import interop
from recipes.wav2vec2.method import Wav2Vec2Config, Wav2Vec2Method, make_batch
from recipes.wav2vec2.reference_steps import TransformersWav2Vec2

FIXTURES = Path(__file__).parent / "fixtures"


class Official:
    """fairseq's numbers of one pass, "train" or "eval", and our method with fairseq's weights on fairseq's batch."""

    def __init__(self, mode: str) -> None:
        facts, tensors = load_fixture(FIXTURES, "wav2vec2_tiny")
        self.mode, self.facts, self.tensors, self.scalars = mode, facts, tensors, facts["scalars"][mode]
        self.method = self._method().train(mode == "train")
        self.batch = self._batch()
        self.valid = ~tensors["out.frame_padding_mask"]

    def _method(self) -> Wav2Vec2Method:
        model, criterion = self.facts["config"], self.facts["criterion"]
        imported = interop.from_pt({"cfg": {"model": model, "task": {}}, "model": group(self.tensors, "state")})
        fields = ("final_dim", "latent_vars", "latent_groups", "latent_temp", "num_negatives", "logit_temp")
        values = {
            "name": "wav2vec2",
            "encoder": imported.encoder_config,
            **{key: model[key] for key in (*fields, "dropout_features")},
            "latent_dim": model["final_dim"],
            "mask_prob": 0.65,
            "mask_length": 10,
            "mask_min_spans": 2,
            "diversity_weight": criterion["loss_weights"][0],
            "feature_penalty_weight": criterion["loss_weights"][1],
        }
        method = Wav2Vec2Method(typed(Wav2Vec2Config, values))
        method.load_state_dict(method_state(imported))
        method.quantizer.temperature = gumbel.temperature_at(self.facts["quantizer_num_updates"], *model["latent_temp"])
        return method

    def _batch(self) -> Batch:
        mask = self.tensors["in.mask_indices"].numpy()
        masked = int(mask[0].sum())
        # fairseq's indices run over the masked frames of all rows.
        flat = self.tensors["in.negative_indices"].view(len(mask), masked, -1)
        negatives = flat - masked * torch.arange(len(mask))[:, None, None]
        assert negatives.min() >= 0
        assert negatives.max() < masked
        lengths = (~self.tensors["in.padding_mask"]).sum(1)
        return make_batch(
            Stacked(self.tensors["in.wav"], lengths, torch.arange(len(mask)), padded=True),
            mask=mask,
            negatives=negatives.numpy(),
        )


@pytest.fixture(scope="module", params=["train", "eval"])
def official(request: pytest.FixtureRequest) -> Official:
    return Official(request.param)


@pytest.fixture(autouse=True)
def given_noise(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """fairseq's Gumbel noise in the place of ours, for the tests that ask for it."""
    if "official" in request.fixturenames:
        noise = load_fixture(FIXTURES, "wav2vec2_tiny")[1]["in.gumbel_noise"]
        monkeypatch.setattr(gumbel, "gumbel_noise", lambda logits: noise.view_as(logits))


def test_masked_hidden_states_and_frames(official: Official) -> None:
    batch, encoder = official.batch, official.method.encoder
    features = encoder.features(batch.waveforms, batch.lengths)
    assert torch.equal(features.frame_lengths, official.valid.sum(1))
    states = encoder.context(features.projected, features.frame_lengths, batch.extras["mask"])
    for index, state in enumerate(states):
        reference = official.tensors[f"out.masked.hidden_{index}"]
        torch.testing.assert_close(state[official.valid], reference[official.valid], rtol=0, atol=5e-5)


def test_codes_and_logits(official: Official) -> None:
    method, batch = official.method, official.batch
    features, predictions = method.predict(batch)
    quantized = method.quantize(features, batch.extras["masked_positions"])
    reference = official.tensors[f"out.{official.mode}.quantized"].flatten(0, 1)
    torch.testing.assert_close(quantized.vectors, reference, rtol=0, atol=5e-5)
    if official.mode == "train":
        assert torch.equal(quantized.codes.flatten(), official.tensors["out.train.codes"])
    logits = method.logits(predictions, quantized, batch.extras["negatives"])
    expected = official.tensors[f"out.{official.mode}.logits"].permute(1, 2, 0)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)
    assert torch.isinf(logits).sum() == official.scalars["negatives_dropped_by_peer"]


def test_loss_terms_and_accuracy(official: Official) -> None:
    scalars, output = official.scalars, official.method(official.batch)
    units = scalars["sample_size"]
    assert official.batch.sample_size == units
    assert output.total(official.batch).item() == pytest.approx(scalars["loss_sum"], rel=1e-5)
    terms = {"loss_contrastive": "loss_0", "loss_diversity": "loss_1", "loss_features": "loss_2"}
    for ours, peer in terms.items():
        assert value(output, ours) == pytest.approx(scalars[peer] / units, rel=1e-5), ours
    assert value(output, "accuracy") == pytest.approx(scalars["correct"] / scalars["count"], rel=1e-6)
    for name, peer in (("prob_perplexity", "prob_perplexity"), ("temperature", "temp")):
        assert value(output, name) == pytest.approx(scalars[peer], rel=1e-5)
    shares = [output.metrics[f"codes_{index}"].counts / units for index in range(2)]
    code_perplexity = sum(float(torch.special.entr(share).sum().exp()) for share in shares)
    assert code_perplexity == pytest.approx(scalars["code_perplexity"], rel=1e-5)


def test_gradients_in_full_and_by_norm(official: Official) -> None:
    if official.mode == "eval":
        pytest.skip("the gradients are those of the training pass")
    method = official.method
    method.zero_grad()
    (method(official.batch).total(official.batch) / official.batch.sample_size).backward()
    encoder = {name: p.grad for name, p in method.encoder.named_parameters()}
    gradients = state_to_fairseq(encoder, method.encoder.to_config())
    gradients |= {name: p.grad for name, p in method.named_parameters() if not name.startswith("encoder.")}
    for name, expected in group(official.tensors, "grad").items():
        assert (gradients[name] - expected).norm() <= 1e-3 * expected.norm(), name
    norms, total = official.facts["grad_norms"], official.scalars["grad_total_norm"]
    assert gradients.keys() == norms.keys()
    for name, norm in norms.items():
        # Below this the exact gradient is zero (key biases) and what is stored is rounding.
        if norm > 1e-5 * total:
            assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-3), name
    assert torch.nn.utils.get_total_norm(list(gradients.values())).item() == pytest.approx(total, rel=1e-4)


SMALL_LL60K = (
    "method.encoder.extractor_mode=layer_norm",
    "method.encoder.conv_bias=true",
    "method.encoder.layer_norm_first=true",
)


def small(large: bool) -> Wav2Vec2Method:
    """The tiny network in the form of Base or of LL60k, all parameters off their initial values; transformers has no
    penalty on the features.
    """
    method = build("wav2vec2_tiny", "method.feature_penalty_weight=0", *(SMALL_LL60K if large else ()))
    perturb(method)
    return method


def trained(method: Wav2Vec2Method, state: dict[str, Tensor] | None = None) -> TrainedMethod:
    """The method as a checkpoint, or other tensors under its names."""
    return TrainedMethod("wav2vec2", asdict(method.config), method.state_dict() if state is None else state)


def example(row: int, samples: int) -> Example:
    rng = np.random.default_rng(row)
    return Example(torch.from_numpy(0.1 * rng.standard_normal(samples, dtype=np.float32)), row, 0, {}, rng)


def transformers_loss(model: theirs.Wav2Vec2ForPreTraining, batch: Batch, attend: bool) -> theirs.ModelOutput:
    """Their forward on our masks and negatives, which they index over the frames of all rows."""
    mask, negatives = batch.extras["mask"], batch.extras["negatives"]
    frames = torch.stack([torch.nonzero(row).squeeze(1) for row in mask])
    indices = torch.zeros(*mask.shape, negatives.shape[2], dtype=torch.int64)
    for row, line in enumerate(negatives):
        indices[row, frames[row]] = frames[row][line] + row * mask.shape[1]
    attention = (torch.arange(batch.waveforms.shape[1]) < batch.lengths[:, None]).long() if attend else None
    return model(
        batch.waveforms,
        attention_mask=attention,
        mask_time_indices=mask,
        sampled_negative_indices=indices,
        output_hidden_states=True,
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_equals_transformers(large: bool, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    method = small(large).train(training)
    method.quantizer.temperature = 1.3
    exported = interop.to_huggingface(trained(method))
    values = exported.config | {"apply_spec_augment": True, "layerdrop": 0.0}
    model = transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config(**values)).train(training)
    model.load_state_dict(exported.tensors)
    model.set_gumbel_temperature(1.3)
    # A row of 0.9 s is padding from its 44th frame on; with group norm transformers is used without attention masks.
    batch = method.collator(method.config)([example(0, 24_000), example(1, 14_400 if large else 24_000)])
    assert batch.padded == large
    mask = batch.extras["mask"]
    noise = gumbel.gumbel_noise(torch.empty(*mask.shape, method.config.latent_groups, method.config.latent_vars))
    monkeypatch.setattr(gumbel, "gumbel_noise", lambda logits: noise[mask])
    monkeypatch.setattr(theirs.nn.functional, "gumbel_softmax", with_noise(noise.flatten(0, 2)))
    output, peer = method(batch), transformers_loss(model, batch, attend=large)
    units = batch.sample_size
    assert value(output, "loss_contrastive") == pytest.approx(peer.contrastive_loss.item() / units, rel=1e-4)
    features = method.encoder.features(batch.waveforms, batch.lengths_if_padded)
    states = method.encoder.context(features.projected, features.frame_lengths, mask)
    real = [mask.shape[1]] * 2 if features.frame_lengths is None else features.frame_lengths.tolist()
    valid = torch.arange(mask.shape[1]) < torch.tensor(real)[:, None]
    for ours, reference in zip(states[:-1], peer.hidden_states[:-1], strict=True):
        assert (ours - reference)[valid].abs().max() <= 1e-4 * reference[valid].abs().max()
    if not training:
        return  # transformers reports the perplexity of hard codes there
    # Their logarithm has no 1e-7 inside.
    assert value(output, "prob_perplexity") == pytest.approx(peer.codevector_perplexity.item(), rel=1e-4)
    assert value(output, "loss_diversity") * units == pytest.approx(
        method.config.diversity_weight * peer.diversity_loss.item(), rel=1e-4
    )
    assert output.total(batch).item() == pytest.approx(peer.loss.item(), rel=1e-4)
    output.total(batch).backward()
    peer.loss.backward()
    ours = interop.to_huggingface(trained(method, {name: p.grad for name, p in method.named_parameters()})).tensors
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ours.keys() == gradients.keys()
    total = torch.nn.utils.get_total_norm(list(gradients.values()))
    for name, gradient in gradients.items():
        if gradient.norm() > 1e-5 * total:
            assert (ours[name] - gradient).norm() <= 1e-3 * gradient.norm(), name


def with_noise(noise: Tensor) -> Callable[..., Tensor]:
    """`F.gumbel_softmax`, on given noise."""

    def gumbel_softmax(logits: Tensor, tau: float, hard: bool) -> Tensor:
        assert hard
        soft = ((logits + noise) / tau).softmax(-1)
        return F.one_hot(soft.argmax(-1), soft.shape[-1]) - soft.detach() + soft

    return gumbel_softmax


@pytest.mark.parametrize(
    ("recipe", "with_heads"),
    # Counted on the official classes; SUPERB's table gives 95.04 M and 317.38 M.
    [
        ("wav2vec2_base_960", 95_044_608),
        ("wav2vec2_large_960", 317_380_864),
        ("wav2vec2_large_ll60k", 317_390_592),
        ("wav2vec2_large_lv60_cv_swbd_fsh", 317_390_592),
        ("xlsr_53", 317_390_592),
        ("xls_r_300m", 317_390_592),
        ("xls_r_1b", 965_514_752),
        ("xls_r_2b", 2_162_932_352),
    ],
)
def test_published_sizes(recipe: str, with_heads: int) -> None:
    assert count(on_meta(recipe)) == with_heads


def test_the_rate_of_the_large_model_is_the_papers() -> None:
    values = compose_recipe("wav2vec2_large_ll60k")
    assert (values["optimizer"]["lr"], values["schedule"]["total_updates"]) == (3.0e-4, 600_000)


def test_the_collator_masks_real_frames_and_draws_from_the_masked_ones() -> None:
    method = build("wav2vec2_tiny")
    batch = method.collator(method.config)([example(0, 48_000), example(1, 30_000)])
    mask, negatives = batch.extras["mask"], batch.extras["negatives"]
    assert batch.padded
    real = (30_000 - 400) // 320 + 1
    assert not mask[1, real:].any()
    counts = mask.sum(1).tolist()
    assert counts[0] == counts[1]
    assert batch.sample_size == 2 * counts[0] == len(batch.extras["masked_positions"])
    assert torch.equal(batch.extras["masked_positions"], torch.nonzero(mask.flatten()).squeeze(1))
    assert negatives.shape == (2, counts[0], method.config.num_negatives)
    assert negatives.min() == 0
    assert negatives.max() == counts[0] - 1
    assert not (negatives == torch.arange(counts[0])[:, None]).any()
    assert not torch.equal(negatives[0], negatives[1])
    again = method.collator(method.config)([example(0, 48_000), example(1, 30_000)])
    assert all(torch.equal(again.extras[name], batch.extras[name]) for name in batch.extras)


def test_what_lies_in_the_padding_changes_nothing() -> None:
    method = small(large=True).eval()
    batch = method.collator(method.config)([example(0, 48_000), example(1, 30_000)])
    longer = replace(
        batch,
        waveforms=F.pad(batch.waveforms, (0, 3_200)),
        extras=batch.extras | {"mask": F.pad(batch.extras["mask"], (0, 10))},
    )
    frames = batch.extras["mask"].shape[1]
    positions = batch.extras["masked_positions"]
    longer.extras["masked_positions"] = positions + 10 * (positions // frames)
    with torch.no_grad():
        first, second = method(batch), method(longer)
    for name in ("loss_contrastive", "loss_diversity", "accuracy", "prob_perplexity"):
        assert value(first, name) == pytest.approx(value(second, name), rel=1e-5), name


def test_a_batch_twice_costs_as_much_per_frame() -> None:
    method = build("wav2vec2_tiny").eval()
    collate = method.collator(method.config)
    once, twice = collate([example(0, 32_000)]), collate([example(0, 32_000), example(0, 32_000)])
    with torch.no_grad():
        first, second = method(once), method(twice)
    assert twice.sample_size == 2 * once.sample_size
    assert loss_per_unit(first, once) == pytest.approx(loss_per_unit(second, twice), rel=1e-5)
    for name in ("loss_contrastive", "loss_diversity", "loss_features"):
        assert value(first, name) == pytest.approx(value(second, name), rel=1e-5), name


def test_before_training_the_loss_is_near_that_of_a_uniform_guess() -> None:
    method = build("wav2vec2_tiny")
    with torch.no_grad():
        output = method(method.collator(method.config)([example(row, 32_000) for row in range(4)]))
    assert value(output, "loss_contrastive") == pytest.approx(math.log(51), abs=0.3)
    assert value(output, "chance") == pytest.approx(1 / 51, rel=0.5)


def test_temperature_and_layerdrop_follow_the_update() -> None:
    method = build("wav2vec2_tiny", "method.encoder.encoder_layerdrop=0.5", "method.latent_temp=[2.0,0.5,0.99]")
    method.before_step(Progress(update=100, total_updates=300, seed=1))
    assert method.quantizer.temperature == pytest.approx(2 * 0.99**100)
    method.before_step(Progress(update=299, total_updates=300, seed=1))
    assert method.quantizer.temperature == 0.5


def test_the_picture_of_a_validation_batch() -> None:
    method = build("wav2vec2_tiny").eval()
    with torch.no_grad():
        figures = method.figures(method.collator(method.config)([example(0, 32_000)]))
    assert figures.keys() == {"similarity"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.latent_temp=[2.0,0.5]", "state start, end and decay"),
        ("method.latent_dim=65", "65 does not divide into 2 groups"),
        ("method.num_negatives=0", "a contrast needs one"),
    ],
)
def test_impossible_configurations_say_why(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("wav2vec2_tiny", override)


def test_the_benchmarks_peer_computes_our_loss_from_our_weights() -> None:
    # Without the diversity, which transformers computes from hard codes in evaluation.
    method = build("wav2vec2_tiny", "method.diversity_weight=0", "method.feature_penalty_weight=10").eval()
    peer = TransformersWav2Vec2(method.config).eval()
    peer.model.load_state_dict(interop.to_huggingface(trained(method)).tensors)
    batch = method.collator(method.config)([example(0, 24_000), example(1, 24_000)])
    torch.testing.assert_close(peer(batch), method(batch).total(batch), rtol=1e-4, atol=0)


def test_it_learns_to_tell_the_target_from_distractors(learning_seed: int, tmp_path: Path) -> None:
    """Seconds of training: a smaller network and codebook, and spans of 2 frames, which leave more context than 5."""
    network = "method.encoder={encoder_embed_dim:64,encoder_ffn_embed_dim:128,encoder_layers:2,conv_feature_layers:"
    last = train_recipe(
        "wav2vec2_tiny",
        tmp_path,
        learning_seed,
        network + "[[32,10,5],[32,3,2],[32,3,2],[32,3,2],[32,3,2],[32,2,2],[32,2,2]]}",
        "method={mask_length:2,mask_prob:0.3,latent_vars:16,latent_temp:[2.0,0.5,0.98]}",
        "batch={seconds_per_micro_batch:8,micro_batches_per_step:1}",
        "crop.max_seconds=2.0",
        "optimizer.lr=3e-3",
        "schedule={warmup_updates:20,total_updates:120}",
    )
    # Guessing among the distractors that remain, and the loss of equal logits over all of them.
    assert_learned(last["validation/accuracy"], above=4 * last["validation/chance"])
    assert_learned(last["validation/loss_contrastive"], below=math.log(51))
    # Many codes are in use, so the targets differ and a hit means something; of one code a group this would be 2.
    assert_learned(last["validation/prob_perplexity"], above=5)
    assert_learned(last["validation/chance"], below=2 / 51)


@pytest.mark.slow
def test_the_tiny_recipe_as_it_is_learns(learning_seed: int, tmp_path: Path) -> None:
    last = train_recipe("wav2vec2_tiny", tmp_path, learning_seed)
    assert_learned(last["validation/accuracy"], above=4 * last["validation/chance"])
    assert_learned(last["validation/loss_contrastive"], below=math.log(51))
