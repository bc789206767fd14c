"""Discrete BERT: RoBERTa against transformers, masks as a distribution, tokens from waveforms, sizes, learning."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from learning import assert_learned
from recipe_checks import (
    count,
    hidden_states,
    loss_per_unit,
    on_meta,
    train_recipe,
    two_waveforms,
    value,
)
from torch import Tensor

from pretrain.config import ConfigError, compose_recipe
from pretrain.data.labels import LabelError
from pretrain.labelling.tokens.dictionary import TokenDictionary
from pretrain.method import Batch, Example, TargetInfo
from pretrain.objectives.collate import silent_waveforms
from pretrain.registry import load_method
from pretrain.weights.export import write_native
from pretrain.weights.interop.types import TrainedMethod
from recipes.discrete_bert import interop
from recipes.discrete_bert.encoder import BOS, EOS, PAD, SPECIALS, UNK
from recipes.discrete_bert.masking import TokenMask
from recipes.discrete_bert.method import TOKENS, DiscreteBertCollator, DiscreteBertMethod
from recipes.discrete_bert.reference_steps import PAIRS, small, transformers_roberta

PUBLISHED = TokenMask(0.5, 10, 10.0, 0.1, 0.1)
SAMPLES = (24_000, 16_079)


def example(collator: DiscreteBertCollator, samples: int, row: int = 0, start: int = 0) -> Example:
    """An utterance of `samples`, from `start` on, with tokens at random (class 0 is <unk>)."""
    rng = np.random.default_rng(row)
    labels = rng.integers(0, PAIRS + 1, size=(start + samples) // 160)
    return Example(torch.zeros(()).expand(samples), row, start, {TOKENS: labels}, rng)


@pytest.fixture(scope="module")
def method() -> DiscreteBertMethod:
    return small()


@pytest.fixture(scope="module")
def batch(method: DiscreteBertMethod) -> Batch:
    """Two rows of unlike lengths."""
    collator = method.collator(method.config)
    return collator([example(collator, samples, row) for row, samples in enumerate(SAMPLES)])


def test_hidden_states_loss_and_gradients_equal_transformers(method: DiscreteBertMethod, batch: Batch) -> None:
    theirs, tokens = transformers_roberta(method), batch.extras["tokens"]
    assert batch.padded
    assert (tokens != PAD).sum(1).tolist() == batch.extras["counts"].tolist() == [150, 100]
    labels = torch.full(tokens.shape, -100)
    labels.view(-1)[batch.extras["positions"]] = batch.extras["targets"]
    valid = tokens != PAD
    output = theirs(input_ids=tokens, attention_mask=valid.long(), labels=labels, output_hidden_states=True)
    ours = method.encoder.context(tokens, padded=True)
    assert len(ours) == len(output.hidden_states) == 3
    for our_state, their_state in zip(ours, output.hidden_states, strict=True):
        scale = their_state.abs().max()
        assert (our_state[valid] - their_state[valid]).abs().max() <= 1e-5 * scale
    alone = method.encoder.context(tokens[1:, : int(batch.extras["counts"][1])], padded=False)[-1]
    torch.testing.assert_close(alone[0], ours[-1][1][valid[1]], rtol=1e-4, atol=1e-5)

    method.zero_grad()
    step = method(batch)
    assert loss_per_unit(step, batch) == pytest.approx(output.loss.item(), rel=1e-5)
    assert value(step, "perplexity_bits") == pytest.approx(output.loss.item() / math.log(2), rel=1e-5)
    right = (output.logits.argmax(-1) == labels)[labels >= 0].float().mean()
    assert value(step, "accuracy_masked") == pytest.approx(right.item(), rel=1e-5)
    (step.loss / batch.sample_size).backward()
    output.loss.backward()
    layer = theirs.roberta.encoder.layer[0]
    query_key_value = [getattr(layer.attention.self, name).weight.grad for name in ("query", "key", "value")]
    for gradient, reference in (
        (method.encoder.embed_tokens.weight.grad, theirs.roberta.embeddings.word_embeddings.weight.grad),
        (method.encoder.embed_positions.weight.grad, theirs.roberta.embeddings.position_embeddings.weight.grad),
        (method.encoder.layers[0].self_attn.qkv_proj.weight.grad, torch.cat(query_key_value)),
        (method.encoder.layers[1].fc1.bias.grad, theirs.roberta.encoder.layer[1].intermediate.dense.bias.grad),
        (method.lm_head.dense.weight.grad, theirs.lm_head.dense.weight.grad),
        (method.lm_head.bias.grad, theirs.lm_head.bias.grad),
    ):
        assert (gradient - reference).abs().max() <= 1e-4 * reference.abs().max()


def test_the_tokenizer_is_not_trained(method: DiscreteBertMethod, batch: Batch) -> None:
    trained = [parameter for group in method.parameter_groups() for parameter in group["params"]]
    frozen = list(method.encoder.tokenizer.parameters())
    assert frozen
    assert len(trained) + len(frozen) == len(list(method.parameters()))
    assert not {id(p) for p in trained} & {id(p) for p in frozen}
    method.train()
    assert not any(module.training for module in method.encoder.tokenizer.modules())
    # The names under which checkpoints have it are its own.
    names = [name for name in method.encoder.state_dict() if name.startswith("tokenizer.")]
    assert names == [f"tokenizer.{name}" for name in method.encoder.tokenizer.network.state_dict()]
    # Training reads no audio: the waveforms are one zero.
    assert batch.waveforms.untyped_storage().nbytes() == 4


def runs(selected: np.ndarray) -> np.ndarray:
    """Lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], selected.astype(int), [0]])))
    return edges[1::2] - edges[::2]


def test_masks_are_spans_of_normal_length() -> None:
    rng, length = np.random.default_rng(0), 1500
    rows = [PUBLISHED.select(rng, length) for _ in range(300)]
    # 5 % of the tokens start a span of max(0, round(N(10, 10))), 10.83 on average: 1 - (1 - 10.83 / T) ^ (T / 20).
    sizes = np.maximum(0, np.rint(np.random.default_rng(1).normal(10, 10, 10**6)))
    expected = 1 - math.exp(-0.05 * sizes.mean())
    assert np.mean(rows) == pytest.approx(expected, abs=0.01)
    # Few enough spans to stand alone: their lengths are the normal's, of which the empty ones are not seen.
    sparse = TokenMask(0.002, 10, 10.0, 0.1, 0.1)
    lengths = np.concatenate([runs(sparse.select(rng, 100_000)) for _ in range(150)])
    assert lengths.mean() == pytest.approx(sizes[sizes > 0].mean(), rel=0.05)
    assert lengths.std() == pytest.approx(sizes[sizes > 0].std(), rel=0.05)
    fixed = TokenMask(0.002, 10, 0.0, 0.1, 0.1)
    assert np.median(runs(fixed.select(rng, 100_000))) == 10


def test_every_token_can_be_selected() -> None:
    """<s> and </s> too, as in fairseq; the first least, since a span only reaches to the right."""
    rng = np.random.default_rng(0)
    share = np.mean([PUBLISHED.select(rng, 60) for _ in range(3000)], axis=0)
    assert share.min() > 0
    assert share.argmin() == 0
    assert share[0] == pytest.approx(0.05 * 0.829, abs=0.02)


def test_what_stands_in_the_place_of_selected_tokens() -> None:
    rng, vocab_size = np.random.default_rng(0), 40
    tokens = rng.integers(UNK, vocab_size - 1, size=200_000)
    selected = PUBLISHED.select(rng, len(tokens))
    hidden = PUBLISHED.hide(rng, tokens, selected, vocab_size)
    assert np.array_equal(hidden[~selected], tokens[~selected])
    masked, same = hidden[selected] == vocab_size - 1, hidden[selected] == tokens[selected]
    kinds = vocab_size - SPECIALS
    assert masked.mean() == pytest.approx(0.8 + 0.1 / kinds, abs=0.01)
    assert same.mean() == pytest.approx(0.1 + 0.1 / kinds, abs=0.01)
    drawn = hidden[selected][~masked & ~same]
    assert drawn.min() == SPECIALS
    counts = np.bincount(drawn, minlength=vocab_size)[SPECIALS:-1]
    assert counts.min() > 0.7 * counts.mean()


def test_a_batch_holds_the_tokens_of_its_crops(method: DiscreteBertMethod) -> None:
    collator = replace(method.collator(method.config), token_mask=replace(PUBLISHED, mask_prob=0.0))
    assert not collator.reads_audio
    assert (collator.stride_samples, collator.receptive_field_samples) == (160, 465)
    examples = [example(collator, 16_000), example(collator, 8_000, row=1, start=4_800)]
    batch = collator(examples)
    assert batch.lengths.tolist() == [16_000, 8_000]
    assert batch.sample_size == 0
    whole, later = (example.targets[TOKENS] for example in examples)
    expected = [[BOS, *(whole[:98] + UNK), EOS], [BOS, *(later[30:78] + UNK), EOS]]
    for row, tokens in zip(batch.extras["tokens"].tolist(), expected, strict=True):
        assert row == [*tokens, *[PAD] * (100 - len(tokens))]
    assert silent_waveforms(examples)[0].shape == batch.waveforms.shape == (2, 16_000)
    with pytest.raises(ConfigError, match=r"crop\.max_seconds: a row of 300 tokens exceeds .* \(256\)"):
        collator([example(collator, 48_000)])


def test_the_share_that_is_masked_is_reported(method: DiscreteBertMethod, batch: Batch) -> None:
    step = method(batch)
    assert value(step, "masked_share") == batch.sample_size / int((batch.extras["tokens"] != PAD).sum())
    assert (
        int(step.metrics["labels"].counts.sum()) == int(step.metrics["predictions"].counts.sum()) == batch.sample_size
    )


def test_waveforms_become_tokens(method: DiscreteBertMethod) -> None:
    waveforms, lengths = two_waveforms()
    tokens, counts = method.encoder.tokens(waveforms, lengths)
    # 170 is 27,200 / 160, but there are 168 frames; 16,079 / 160 is 100.49.
    assert counts.tolist() == [168 + 2, 100 + 2]
    codes, _ = method.encoder.tokenizer.network.codes(waveforms, None)
    table = method.encoder.token_of_number
    for row, length in ((0, 168), (1, 100)):
        inner = [int(table[first * 8 + second]) for first, second in codes[row, :length].tolist()]
        assert tokens[row].tolist() == [BOS, *inner, EOS, *[PAD] * (168 - length)]
    assert (tokens == UNK).any()
    without, _ = method.encoder.tokens(waveforms[:1], None)
    assert torch.equal(without, tokens[:1])


def test_long_strings_are_seen_in_pieces() -> None:
    method = small(max_positions=60)
    waveforms, lengths = two_waveforms()
    states, state_lengths = hidden_states(method.encoder, waveforms, lengths)
    tokens, counts = method.encoder.tokens(waveforms, lengths)
    assert torch.equal(state_lengths[0], counts)
    assert [tuple(state.shape) for state in states] == [(2, 170, 64)] * 3
    # The second row is over before the third piece, where nothing of it is seen; it stays finite.
    assert all(torch.isfinite(state).all() for state in states)
    piece = method.encoder.context(tokens[:1, 60:120], padded=False)[-1]
    torch.testing.assert_close(states[-1][:1, 60:120], piece, rtol=1e-4, atol=1e-5)


def token_directory(folder: Path, method: DiscreteBertMethod) -> TargetInfo:
    """A token directory, but for its labels, that holds the tokenizer of `method` and a dictionary."""
    write_native("wav2vec", method.encoder.tokenizer.network, folder / "tokenizer")
    counts = np.zeros(64, dtype=np.int64)
    counts[[9, 3, 17]] = [5, 50, 7]
    dictionary = TokenDictionary.from_counts(counts, 2, 8)
    dictionary.write(folder)
    return TargetInfo(dictionary.num_classes, 100, folder)


def test_a_run_takes_tokenizer_and_dictionary_from_the_labels(tmp_path: Path) -> None:
    source, fresh = small(), small("gumbel")
    info = token_directory(tmp_path, source)
    config = DiscreteBertMethod.fit_to_targets(fresh.config, {TOKENS: info})
    # <s>, <pad>, </s>, <unk>, three pairs, <mask>.
    assert config.encoder.vocab_size == 8
    (spec,) = DiscreteBertMethod.targets(config)
    assert (spec.name, spec.kind, spec.num_classes) == (TOKENS, "frames", info.num_classes)
    method = DiscreteBertMethod(config)
    method.begin({TOKENS: info})
    table = method.encoder.token_of_number
    assert {number: int(table[number]) for number in (3, 17, 9, 0)} == {3: 4, 17: 5, 9: 6, 0: UNK}
    waveforms, lengths = two_waveforms()
    theirs = source.encoder.tokenizer.network.codes(waveforms, lengths)[0]
    assert torch.equal(method.encoder.tokenizer.network.codes(waveforms, lengths)[0], theirs)
    again = method.encoder.from_config(method.encoder.to_config())
    again.load_state_dict(method.encoder.state_dict())
    method.begin({TOKENS: info})
    table[[3, 17]] = table[[17, 3]]
    with pytest.raises(LabelError, match="is not the dictionary that init_from was trained with"):
        method.begin({TOKENS: info})
    elsewhere = TargetInfo(20, 100, tmp_path / "elsewhere")
    with pytest.raises(LabelError, match="holds labels but no tokens"):
        DiscreteBertMethod.fit_to_targets(fresh.config, {TOKENS: elsewhere})
    assert spec.source is not None
    assert spec.source.command.format(dir="speech").endswith("data.dir=speech")


def test_sizes() -> None:
    """The published 123.6 M count the embeddings twice, as RoBERTa's file holds them; without it they are 105.8 M."""
    method = on_meta("vq_wav2vec_kmeans_roberta")
    config, tokenizer = method.config.encoder, count(method.encoder.tokenizer)
    assert (config.vocab_size, config.max_positions, tokenizer) == (23_150, 3_072, 29_868_032)
    roberta = count(method) - tokenizer
    assert roberta == 105_811_310
    assert count(method.encoder) == tokenizer + roberta - count(method.lm_head) == 135_064_064
    state = interop.bert_state(TrainedMethod("discrete_bert", asdict(method.config), method.state_dict()))
    tensors = sum(tensor.numel() for key, tensor in state.items() if not key.endswith("version"))
    assert tensors == roberta + config.vocab_size * config.encoder_embed_dim == 123_590_510


def test_the_recipe_quantizes_as_vq_wav2vec_does() -> None:
    ours = compose_recipe("vq_wav2vec_kmeans_roberta")["method"]["encoder"]["tokenizer"]
    assert ours["method"] == "wav2vec"
    with torch.device("meta"):
        # Built, since a recipe that inherits names options of another quantizer, which are null.
        encoders = [
            load_method("wav2vec").Encoder.from_config(config)
            for config in (ours["encoder"], compose_recipe("vq_wav2vec_kmeans")["method"]["encoder"])
        ]
    assert encoders[0].to_config() == encoders[1].to_config()


def test_activation_checkpointing_change_nothing(method: DiscreteBertMethod, batch: Batch) -> None:
    gradients: list[Tensor] = []
    for checkpoint_activations in (False, True):
        method.encoder.layers.checkpointing = checkpoint_activations
        method.zero_grad()
        method(batch).loss.backward()
        gradients.append(method.encoder.layers[0].fc1.weight.grad.clone())
    method.encoder.layers.checkpointing = False
    torch.testing.assert_close(*gradients)
    assert F.mse_loss(gradients[0], torch.zeros_like(gradients[0])) > 0


def test_it_learns_more_than_how_often_tokens_come(learning_seed: int, tmp_path: Path) -> None:
    """Spans of two tokens: of the published ten a small network learns little in so short a time."""
    last = train_recipe(
        "discrete_bert_tiny",
        tmp_path,
        learning_seed,
        "method={mask_prob:0.2,mask_multiple_length:2,mask_stdev:0}",
        "optimizer.lr=4e-3",
        "schedule.total_updates=300",
        "trainer={validate_every:300,save_every:300}",
    )
    unigram = math.log(last["validation/labels_perplexity"])
    assert_learned(unigram, above=2.5)
    assert_learned(last["validation/loss"], below=unigram)
    # The commonest token, silence, is less than a fifth of them.
    assert_learned(last["validation/accuracy_masked"], above=0.2)
