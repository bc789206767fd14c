"""HuBERT against what fairseq computed: logits, every loss term, accuracy, hidden states, gradients, sizes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import assert_learned
from recipe_checks import (
    loss_per_unit,
    method_state,
    train_recipe,
)
from safetensors.torch import load_file
from torch import Tensor

from pretrain.config import compose_recipe, typed
from pretrain.losses.masked_prediction import prediction_loss
from pretrain.method import Batch, Example, StepOutput
from pretrain.objectives.collate import Stacked, frame_labels
from pretrain.objectives.masked_prediction import DICTIONARY_SPECIALS
from pretrain.objectives.masked_units import make_batch
from pretrain.weights.interop.speech_encoder import state_to_fairseq
from recipes.hubert import interop
from recipes.hubert.method import HubertConfig, HubertMethod

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ["hubert_tiny_postln", "hubert_tiny_preln_2dict"]


class Official:
    """One fixture: fairseq's numbers, and our method with fairseq's weights on fairseq's batch."""

    def __init__(self, name: str) -> None:
        self.facts: dict[str, Any] = json.loads((FIXTURES / f"{name}.json").read_text())
        self.tensors = load_file(FIXTURES / f"{name}.safetensors")
        self.scalars: dict[str, float] = self.facts["scalars"]
        self.label_sets = len(self.facts["classes"])
        self.method = self._method()
        self.batch = self._batch()

    def _method(self) -> HubertMethod:
        model, criterion = self.facts["config"], self.facts["criterion"]
        state = {key.removeprefix("state."): v for key, v in self.tensors.items() if key.startswith("state.")}
        imported = interop.from_pt({"cfg": {"model": model, "task": {"normalize": False}}, "model": state})
        values = {
            "name": "hubert",
            "encoder": imported.encoder_config,
            "num_classes": [classes - DICTIONARY_SPECIALS for classes in self.facts["classes"]],
            "label_rates_hz": [int(model["label_rate"])] * self.label_sets,
            **{key: model[key] for key in ("final_dim", "untie_final_proj", "logit_temp")},
            "mask_prob": 0.8,
            "mask_length": 10,
            "mask_min_spans": 2,
            **{key: criterion[key] for key in ("pred_masked_weight", "pred_nomask_weight")},
            "feature_penalty_weight": criterion["loss_weights"][0],
        }
        method = HubertMethod(typed(HubertConfig, values))
        method.load_state_dict(method_state(imported))
        return method.train()

    def _batch(self) -> Batch:
        mask = self.tensors["in.mask_indices"].numpy()
        rate, stride = int(self.facts["config"]["label_rate"]), 320
        lines = [self.tensors[f"in.target_{i}"].numpy() - DICTIONARY_SPECIALS for i in range(self.label_sets)]
        labels = [[frame_labels(row, rate, 0, stride, mask.shape[1]) for row in line] for line in lines]
        lengths = (~self.tensors["in.padding_mask"]).sum(1)
        return make_batch(
            Stacked(self.tensors["in.wav"], lengths, torch.arange(len(mask)), padded=True),
            labels=np.array(labels),
            mask=mask,
            valid=~self.tensors["out.frame_padding_mask"].numpy(),
            scores_unmasked=self.method.config.pred_nomask_weight > 0,
        )

    def hidden_states(self) -> list[Tensor]:
        """Of the masked, pre-training pass."""
        mask = self.batch.extras["mask"]
        features = self.method.encoder.features(self.batch.waveforms, self.batch.lengths, mask.shape[1])
        return self.method.encoder.context(features.projected, features.frame_lengths, mask)


@pytest.fixture(scope="module", params=NAMES)
def official(request: pytest.FixtureRequest) -> Official:
    return Official(request.param)


@pytest.fixture(scope="module")
def output(official: Official) -> StepOutput:
    """Our forward, with the gradients of loss / sample_size left on the parameters."""
    output = official.method(official.batch)
    (output.total(official.batch) / official.batch.sample_size).backward()
    return output


def metric(output: StepOutput, name: str) -> float:
    ratio = output.metrics[name]
    return float(ratio.total) / float(ratio.weight)


def test_the_batch_scores_as_many_frames(official: Official) -> None:
    assert official.batch.sample_size == official.scalars["sample_size"]
    assert official.batch.extras["masked_positions"].numel() == official.scalars["count_m_0"]
    assert official.batch.extras["unmasked_positions"].numel() == official.scalars["count_u_0"]


def test_masked_hidden_states(official: Official) -> None:
    states = official.hidden_states()
    count = len(states) - 1
    # With the norm first our last state is normed, and fairseq's raw output of the last layer is not kept.
    compared = count if official.facts["config"]["layer_norm_first"] else count + 1
    valid = ~official.tensors["out.frame_padding_mask"]
    for index in range(compared):
        reference = official.tensors[f"out.masked.hidden_{index}"]
        torch.testing.assert_close(states[index][valid], reference[valid], rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", ["masked", "unmasked"])
def test_logits_and_loss_of_each_label_set(official: Official, kind: str) -> None:
    extras = official.batch.extras
    hidden = official.hidden_states()[-1].flatten(0, 1)[extras[f"{kind}_positions"]]
    for index, logits in enumerate(official.method.logits(hidden)):
        targets = extras[f"{kind}_labels"][index] + DICTIONARY_SPECIALS
        reference = official.tensors[f"out.logit_{kind[0]}_{index}"]
        # fairseq puts the target into column 0 and hides it in its own column.
        expected = reference[:, 1:].clone()
        expected[torch.arange(len(targets)), targets] = reference[:, 0]
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)
        loss, correct = prediction_loss(logits, targets)
        assert loss.item() == pytest.approx(official.scalars[f"loss_{kind[0]}_{index}"], rel=1e-5)
        assert correct.item() == official.scalars[f"correct_{kind[0]}_{index}"]


def test_loss_terms_and_accuracy(official: Official, output: StepOutput) -> None:
    scalars, sets = official.scalars, range(official.label_sets)
    assert output.total(official.batch).item() == pytest.approx(scalars["loss_sum"], rel=1e-5)
    units, masked = scalars["sample_size"], scalars["count_m_0"]
    assert loss_per_unit(output, official.batch) == pytest.approx(scalars["loss_per_sample"], rel=1e-5)
    assert metric(output, "loss_features") == pytest.approx(scalars["loss_features_pen"] / units, rel=1e-5)
    assert metric(output, "loss_masked") == pytest.approx(sum(scalars[f"loss_m_{i}"] for i in sets) / masked, rel=1e-5)
    unmasked = sum(scalars[f"loss_u_{i}"] for i in sets) / masked
    assert metric(output, "loss_unmasked") == pytest.approx(unmasked, rel=1e-5)
    for kind, letter in (("masked", "m"), ("unmasked", "u")):
        for index in sets:
            name = f"accuracy_{kind}_{index}" if official.label_sets > 1 else f"accuracy_{kind}"
            share = scalars[f"correct_{letter}_{index}"] / scalars[f"count_{letter}_{index}"]
            assert metric(output, name) == pytest.approx(share, rel=1e-6)


def test_gradients_in_full_and_by_norm(official: Official, output: StepOutput) -> None:
    method = official.method
    encoder = {name: p.grad for name, p in method.encoder.named_parameters()}
    gradients = state_to_fairseq(encoder, method.encoder.to_config())
    gradients |= {name: p.grad for name, p in method.named_parameters() if not name.startswith("encoder.")}
    full = {key.removeprefix("grad."): v for key, v in official.tensors.items() if key.startswith("grad.")}
    for name, expected in full.items():
        assert (gradients[name] - expected).norm() <= 1e-3 * expected.norm(), name
    norms, total = official.facts["grad_norms"], official.scalars["grad_total_norm"]
    assert gradients.keys() == norms.keys()
    for name, norm in norms.items():
        # Below this the exact gradient is zero (key biases) and what is stored is rounding.
        if norm > 1e-5 * total:
            assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-3), name
    ours = torch.nn.utils.get_total_norm(list(gradients.values())).item()
    assert ours == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize(
    ("recipe", "with_heads"),
    # Reference sheet, section 2.2: fairseq's models counted with 500 + 4 classes (104 for the first iteration).
    [
        ("hubert_base", 94_697_600),
        ("hubert_base_iter1", 94_595_200),
        ("hubert_large_ll60k", 316_609_408),
        ("hubert_xlarge_ll60k", 964_321_664),
    ],
)
def test_published_sizes(recipe: str, with_heads: int) -> None:
    with torch.device("meta"):
        method = HubertMethod(typed(HubertConfig, compose_recipe(recipe)["method"]))
    assert sum(p.numel() for p in method.parameters()) == with_heads


def tiny_method() -> HubertMethod:
    torch.manual_seed(0)
    return HubertMethod(typed(HubertConfig, compose_recipe("hubert_tiny")["method"]))


def example(row: int, samples: int, start: int = 0) -> Example:
    rng = np.random.default_rng(row)
    waveform = torch.from_numpy(0.1 * rng.standard_normal(samples, dtype=np.float32))
    # Label l of row r is 7 r + l modulo the classes: a label tells which frame it was cut for.
    labels = (7 * row + np.arange((start + samples - 400) // 160 + 1)) % 50
    return Example(waveform, row, start, {"labels_0": labels}, rng)


def test_before_training_the_loss_is_that_of_a_uniform_guess() -> None:
    method = tiny_method()
    with torch.no_grad():
        output = method(method.collator(method.config)([example(row, 32_000) for row in range(4)]))
    # The label embeddings are drawn from U(0, 1), so cosines over 0.1 differ by about 1 before training.
    assert metric(output, "loss_masked") == pytest.approx(math.log(50 + DICTIONARY_SPECIALS), abs=1.0)


def test_the_collator_cuts_the_labels_of_the_scored_frames() -> None:
    method = tiny_method()
    batch = method.collator(method.config)([example(0, 32_000), example(1, 32_000, start=6_400)])
    assert not batch.padded
    mask = batch.extras["mask"]
    for kind, chosen in (("masked", mask), ("unmasked", ~mask)):
        rows, frames = torch.nonzero(chosen, as_tuple=True)
        assert torch.equal(batch.extras[f"{kind}_positions"], rows * mask.shape[1] + frames)
        # 100 labels a second: two per frame, and 40 before a crop that starts at 0.4 s.
        assert torch.equal(batch.extras[f"{kind}_labels"][0], (7 * rows + 40 * rows + 2 * frames) % 50)
    assert batch.sample_size == int(mask.sum())


def test_padding_is_never_scored() -> None:
    method = tiny_method()
    batch = method.collator(method.config)([example(0, 32_000), example(1, 20_000)])
    assert batch.padded
    assert not batch.waveforms[1, 20_000:].any()
    mask = batch.extras["mask"]
    # fairseq's rule: a frame is real as soon as one sample of its share of the row is.
    real = math.ceil(20_000 / (32_000 // mask.shape[1]))
    assert not mask[1, real:].any()
    scored = torch.cat([batch.extras["masked_positions"], batch.extras["unmasked_positions"]])
    assert sorted(scored.tolist()) == list(range(mask.shape[1] + real))
    assert mask[0].sum() == mask[1].sum()


def test_it_learns_more_than_how_often_each_label_comes(learning_seed: int, tmp_path: Path) -> None:
    """Seconds of training: a smaller network, fewer clusters, and spans of 2 frames, which leave more context."""
    network = "method.encoder={encoder_embed_dim:64,encoder_ffn_embed_dim:128,encoder_layers:2,conv_feature_layers:"
    last = train_recipe(
        "hubert_tiny",
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
def test_the_demos_recipe_learns(learning_seed: int, tmp_path: Path) -> None:
    """Not `hubert_tiny`: with the long spans of Base its loss ends only a tenth below that of the marginal."""
    shorter = ("schedule.total_updates=500", "trainer={validate_every:500,save_every:500}")
    last = train_recipe("hubert_demo", tmp_path, learning_seed, *shorter)
    assert_learned(last["validation/loss_masked"], below=math.log(last["validation/labels_perplexity"]))
    assert_learned(last["validation/predictions_perplexity"], above=4)
