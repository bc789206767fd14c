"""UniSpeech against transformers, closed forms and its own promises."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from learning import assert_learned
from recipe_checks import (
    build,
    count,
    loss_per_unit,
    on_meta,
    perturb,
    train_recipe,
    value,
)
from torch import Tensor
from transformers import UniSpeechForPreTraining

from pretrain.config import ConfigError, compose_recipe, typed
from pretrain.method import Batch, Example, StepOutput, TargetInfo
from pretrain.quantizers import gumbel
from pretrain.weights.interop.files import write_huggingface
from pretrain.weights.interop.types import TrainedMethod
from recipes.unispeech import ctc, interop
from recipes.unispeech.method import TRANSCRIPT, UniSpeechConfig, UniSpeechMethod

SYMBOLS = [f"p{index}" for index in range(9)]
NARROW = (
    "method.encoder={encoder_embed_dim:64,encoder_ffn_embed_dim:128,encoder_layers:2}",
    "method.encoder.conv_feature_layers=[[32,10,5],[32,3,2],[32,3,2],[32,3,2],[32,3,2],[32,2,2],[32,2,2]]",
)


def fitted(config: UniSpeechConfig, symbols: list[str]) -> UniSpeechConfig:
    """The configuration of a run whose transcripts have these symbols."""
    return UniSpeechMethod.fit_to_targets(config, {TRANSCRIPT: TargetInfo(len(symbols), names=tuple(symbols))})


def initial(*overrides: str, seed: int = 0) -> UniSpeechMethod:
    """unispeech_tiny with a dictionary of nine symbols, as it is before training."""
    values = compose_recipe("unispeech_tiny", list(overrides))["method"]
    torch.manual_seed(seed)
    return UniSpeechMethod(fitted(typed(UniSpeechConfig, values, "method"), SYMBOLS))


def small(*overrides: str) -> UniSpeechMethod:
    """The same with every parameter off its initial value, so that biases and norms matter."""
    method = initial(*overrides)
    perturb(method)
    return method


def example(row: int, samples: int, symbols: int | None) -> Example:
    rng = np.random.default_rng(row)
    waveform = torch.from_numpy(0.1 * rng.standard_normal(samples, dtype=np.float32))
    transcript = None if symbols is None else rng.integers(len(SYMBOLS), size=symbols)
    return Example(waveform, row, 0, {TRANSCRIPT: transcript}, rng)


def mixed_batch(method: UniSpeechMethod) -> Batch:
    """Three rows of two lengths, the second without a transcript."""
    examples = [example(0, 24_000, 11), example(1, 16_000, None), example(2, 16_000, 5)]
    return method.collator(method.config)(examples)


# The published form, with frames counted as transformers does.
LIKE_TRANSFORMERS = (
    "method.encoder.frame_length_rule=conv",
    "method.encoder.extractor_mode=layer_norm",
    "method.encoder.layer_norm_first=true",
    "method.encoder.normalize=true",
)


@pytest.fixture
def theirs(tmp_path: Path) -> tuple[UniSpeechMethod, UniSpeechForPreTraining]:
    """Our method, and transformers' class with its weights."""
    method = small(*LIKE_TRANSFORMERS)
    state = dict(method.state_dict())
    config = compose_recipe("unispeech_tiny", list(LIKE_TRANSFORMERS))["method"]
    write_huggingface(tmp_path / "hf", interop.to_huggingface(TrainedMethod("unispeech", config, state)))
    model, info = UniSpeechForPreTraining.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())
    return method.eval(), model.eval()


def normalized(batch: Batch) -> Tensor:
    """The waveforms as transformers' feature extractor hands them over, but with fairseq's 1e-5."""
    rows = [F.layer_norm(w[:n], (int(n),)) for w, n in zip(batch.waveforms, batch.lengths, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def their_terms(
    model: UniSpeechForPreTraining, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor, Tensor]:
    """CTC and contrastive sums and the number of hits, from transformers' states and logits and the paper's formulas.

    The class computes states, quantized states and CTC logits, but no loss.
    """
    extras = batch.extras
    monkeypatch.setattr(torch, "bernoulli", lambda matrix: extras["replaced"].T.float())
    monkeypatch.setattr(model.unispeech, "_mask_hidden_states", lambda x, **_: masked(x, model, extras["mask"]))
    head: list[Tensor] = []
    handle = model.ctc_proj.register_forward_hook(lambda module, inputs, output: head.append(output))
    attention_mask = torch.arange(batch.waveforms.shape[1]) < batch.lengths[:, None]
    output = model(normalized(batch), attention_mask=attention_mask.long())
    handle.remove()
    log_probs = head[0][extras["labelled_rows"]].log_softmax(-1).transpose(0, 1)
    lengths = (extras["labelled_frames"], extras["target_lengths"])
    spoken = F.ctc_loss(log_probs, extras["targets"], *lengths, reduction="sum")
    contrastive, hits = torch.zeros(()), torch.zeros(())
    quantized = output.projected_quantized_states
    for row, chosen in enumerate(extras["mask"]):
        frames = torch.nonzero(chosen).flatten()
        for frame, negatives in zip(frames, extras["negatives"][row], strict=True):
            positive, others = quantized[row, frame], quantized[row, negatives]
            logits = model.compute_contrastive_logits(
                positive[None],
                others,
                output.projected_states[row, frame][None],
                model.config.contrastive_logits_temperature,
            )
            logits[1:][(others == positive).all(-1)] = -torch.inf
            contrastive = contrastive - logits.log_softmax(0)[0]
            hits += logits[0] > logits[1:].max()
    return spoken, contrastive, hits


def masked(x: Tensor, model: UniSpeechForPreTraining, mask: Tensor) -> Tensor:
    return torch.where(mask.unsqueeze(2), model.unispeech.masked_spec_embed, x)


def test_equals_transformers_as_far_as_that_goes(
    theirs: tuple[UniSpeechMethod, UniSpeechForPreTraining], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, model = theirs
    batch = mixed_batch(method)
    assert batch.padded
    spoken, contrastive, hits = their_terms(model, batch, monkeypatch)
    output = method(batch)
    assert value(output, "loss_ctc") * len(batch.extras["targets"]) == pytest.approx(spoken.item(), rel=1e-5)
    assert value(output, "loss_contrastive") * batch.sample_size == pytest.approx(contrastive.item(), rel=1e-5)
    assert value(output, "accuracy") * batch.sample_size == pytest.approx(hits.item())
    diversity = value(output, "loss_diversity") * batch.sample_size
    expected = 0.5 * spoken + 0.5 * (contrastive + method.config.diversity_weight * diversity)
    assert output.total(batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_equal_those_through_transformers(
    theirs: tuple[UniSpeechMethod, UniSpeechForPreTraining], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, model = theirs
    method.config.diversity_weight = 0.0  # in evaluation mode transformers' perplexity has no gradient
    batch = mixed_batch(method)
    spoken, contrastive, _ = their_terms(model, batch, monkeypatch)
    (0.5 * spoken + 0.5 * contrastive).backward()
    method(batch).total(batch).backward()
    encoder, base = method.encoder, model.unispeech
    pairs = [
        (method.ctc_proj.weight, model.ctc_proj.weight),
        (method.final_proj.weight, model.project_hid.weight),
        (method.project_q.bias, model.project_q.bias),
        (method.quantizer.vars, model.quantizer.codevectors),
        (encoder.mask_emb, base.masked_spec_embed),
        (encoder.encoder.layers[1].fc1.weight, base.encoder.layers[1].feed_forward.intermediate_dense.weight),
        (encoder.post_extract_proj.weight, base.feature_projection.projection.weight),
        (encoder.feature_extractor.conv_layers[2].conv.bias, base.feature_extractor.conv_layers[2].conv.bias),
    ]
    for ours, other in pairs:
        assert (ours.grad - other.grad).norm() <= 1e-4 * other.grad.norm()


def test_the_two_draws_of_a_frame_have_noise_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    method = small().train()
    shapes = []
    draw = gumbel.gumbel_noise
    monkeypatch.setattr(gumbel, "gumbel_noise", lambda like: shapes.append(like.shape) or draw(like))
    batch = mixed_batch(method)
    states = method.states(batch)
    rows, frames = batch.extras["mask"].shape
    groups = (method.config.latent_groups, method.config.latent_vars)
    assert shapes == [(batch.sample_size, *groups), (rows * frames, *groups)]
    again = states.all_entries.flatten()[batch.extras["masked_positions"]]
    assert 0 < (states.chosen.entries() == again).float().mean() < 1


def test_replaced_frames_are_quantized_ones_for_the_ctc_head() -> None:
    method = small().eval()
    batch = mixed_batch(method)
    rows = batch.extras["labelled_rows"]
    states = method.states(batch)
    nothing, everything = torch.zeros_like(batch.extras["replaced"]), torch.ones_like(batch.extras["replaced"])
    assert torch.allclose(method.ctc_logits(states, nothing, rows), method.ctc_proj(states.context[rows]))
    assert torch.allclose(method.ctc_logits(states, everything, rows), method.ctc_proj(states.all_targets[rows]))


def test_the_collator_draws_from_real_frames_and_leaves_out_what_ctc_cannot_read() -> None:
    method = small()
    long = example(3, 16_000, 60)
    examples = [example(0, 24_000, 11), example(1, 16_000, None), example(2, 16_000, 5), long]
    extras = method.collator(method.config)(examples).extras
    assert extras["labelled_rows"].tolist() == [0, 2]
    assert extras["target_lengths"].tolist() == [11, 5]
    expected = np.concatenate([examples[row].targets[TRANSCRIPT] for row in (0, 2)]) + 4
    assert extras["targets"].tolist() == expected.tolist()
    assert int(extras["too_long"]) == 1
    # fairseq's rule of folded samples: 16,000 of 24,000 samples in 74 frames.
    valid = [
        74,
        math.ceil(16_000 / (24_000 // 74)),
        math.ceil(16_000 / (24_000 // 74)),
        math.ceil(16_000 / (24_000 // 74)),
    ]
    drawn: list[np.ndarray] = []
    for row, real in enumerate(valid):
        own = torch.nonzero(extras["mask"][row]).flatten()
        negatives = extras["negatives"][row]
        assert negatives.max() < real
        assert not (negatives == own[:, None]).any()
        drawn.append(negatives.numpy())
        assert not extras["mask"][row, real:].any()
    # From everywhere: unmasked frames are distractors too.
    assert set(drawn[0].ravel()) - set(torch.nonzero(extras["mask"][0]).flatten().tolist())
    share = torch.stack([method.collator(method.config)(examples).extras["replaced"] for _ in range(20)]).float().mean()
    assert share == pytest.approx(method.config.replace_prob, abs=0.03)


def test_a_batch_without_transcripts_still_gives_every_parameter_a_gradient() -> None:
    method = small().train()
    batch = method.collator(method.config)([example(0, 20_000, None), example(1, 20_000, None)])
    output = method(batch)
    output.total(batch).backward()
    assert value(output, "labelled_share") == 0
    assert all(p.grad is not None for p in method.parameters())
    assert not method.ctc_proj.weight.grad.any()


def test_without_ctc_it_needs_no_transcripts() -> None:
    method = small("method.ctc_weight=0").train()
    assert not UniSpeechMethod.targets(method.config)
    assert method.ctc_proj is None
    batch = mixed_batch(method)
    output: StepOutput = method(batch)
    expected = value(output, "loss_contrastive") + method.config.diversity_weight * value(output, "loss_diversity")
    assert loss_per_unit(output, batch) == pytest.approx(expected, rel=1e-5)


def test_errors_are_edit_distances_of_the_best_path() -> None:
    # Classes: blank 0, then 4, 5, 6. The path says 4 4 - 5 6 6; the reference 4 6: one insertion.
    path = torch.tensor([[4, 4, 0, 5, 6, 6], [0, 0, 5, 0, 5, 4]])
    logits = F.one_hot(path, 8).float()
    frames, targets = torch.tensor([6, 5]), torch.tensor([4, 6, 5, 5, 4])
    # The second path, five frames of it, says 5 5; its reference 5 5 4: one deletion.
    assert ctc.symbol_errors(logits, frames, targets, torch.tensor([2, 3])) == 2
    assert ctc.shortest_alignment(torch.tensor([5, 5, 4])) == 4


@pytest.mark.parametrize("recipe", ["unispeech", "unispeech_multilingual"])
def test_published_sizes(recipe: str) -> None:
    method = on_meta(recipe)
    head = method.ctc_proj
    assert head.out_features == len(ctc.SPECIAL_SYMBOLS)
    # Reference sheet: 317,390,848 and 1,025 per class.
    assert count(method) == 317_390_848 + 1_025 * head.out_features


def test_a_share_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.ctc_weight"):
        build("unispeech_tiny", "method.ctc_weight=1.0")


def test_it_learns_to_tell_frames_apart(learning_seed: int, tmp_path: Path) -> None:
    last = train_recipe(
        "unispeech_tiny",
        tmp_path,
        learning_seed,
        *NARROW,
        # CTC has half of the loss: with half of the recipe's weight the diversity term is as strong as in wav2vec 2.0.
        "method={mask_length:2,mask_prob:0.3,latent_vars:16,replace_prob:0,diversity_weight:0.01}",
        "batch.seconds_per_micro_batch=10",
        "schedule={warmup_updates:20,total_updates:160}",
    )
    assert_learned(last["validation/accuracy"], above=3 * last["validation/chance"])
    # Two groups; if each kept a single code, this would be 2.
    assert_learned(last["validation/prob_perplexity"], above=2.5)


def tones(seed: int, row: int) -> Example:
    """An utterance of three symbols of 0.12 s, each of which sounds as a tone of its own."""
    rng = np.random.default_rng([seed, row])
    # No symbol follows itself: nothing in the sound would tell one long tone from two.
    transcript = (rng.integers(3) + np.cumsum(rng.integers(1, 3, size=3))) % 3
    time = np.arange(1_920) / 16_000
    waveform = np.concatenate([0.3 * np.sin(2 * np.pi * (300, 900, 2_400)[symbol] * time) for symbol in transcript])
    waveform += 0.01 * rng.standard_normal(len(waveform))
    return Example(torch.from_numpy(waveform.astype(np.float32)), row, 0, {TRANSCRIPT: transcript}, rng)


def test_it_learns_to_read_tones(learning_seed: int) -> None:
    """The sample takes longer than a test has; a language of three tones shows that the head learns to read."""
    settings = ("method.mask_prob=0.1", "method.ctc_weight=0.9", "method.replace_prob=0.1")
    method = initial(*settings, *NARROW, seed=learning_seed).train()
    method.quantizer.temperature = 0.5
    optimizer = torch.optim.AdamW(method.parameters(), lr=4e-3)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min(1.0, (update + 1) / 20))
    collator = method.collator(method.config)
    for step in range(200):
        batch = collator([tones(learning_seed, 16 * step + row) for row in range(16)])
        optimizer.zero_grad()
        (method(batch).total(batch) / batch.sample_size).backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), 5.0)
        optimizer.step()
        warmup.step()
    unheard = collator([tones(learning_seed, 100_000 + row) for row in range(32)])
    with torch.no_grad():
        output = method.eval()(unheard)
    # Over all transcripts the best constant answer, any two different symbols, has an error rate of 5/9, and an empty
    # answer of 1.
    assert_learned(value(output, "symbol_error_rate"), below=0.5)
