"""DeCoAR's loss written out slice by slice, what a slice may depend on, sizes and settings, and that it learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learning import assert_learned
from recipe_checks import (
    build,
    collate,
    count,
    loss_per_unit,
    on_meta,
    perturb,
    train_recipe,
    two_waveforms,
    value,
)
from torch import Tensor, nn

from pretrain.config import ConfigError
from pretrain.method import Batch
from recipes.decoar.method import DecoarMethod, nearer_end


def written_out(method: DecoarMethod, batch: Batch) -> tuple[Tensor, Tensor]:
    """The official loss, absolute errors summed over a slice, and zero's: mean over the slices of unpadded rows."""
    size, head, losses, zeros = method.config.slice_size, method.head, [], []
    width = method.config.reconstruction_dim
    for waveform, length in zip(batch.waveforms, batch.lengths.tolist(), strict=True):
        x, _ = method.encoder.front_end(waveform[None, :length], None)
        ahead = method.encoder.post_extract_proj(x)
        behind = ahead.flip(1)
        for forward_lstm, backward_lstm in zip(
            method.encoder.forward_lstms, method.encoder.backward_lstms, strict=True
        ):
            ahead, behind = forward_lstm(ahead)[0], backward_lstm(behind)[0]
        behind = behind.flip(1)
        for t in range(x.shape[1] - size):
            ends = torch.cat([ahead[0, t], behind[0, t + size]])
            errors, truth = [], []
            for i in range(size + 1):
                rows = slice(i * width, (i + 1) * width)
                hidden = (head.proj1.weight[rows] @ ends + head.proj1.bias[rows]).clamp(min=0)
                errors.append((hidden @ head.weight2[i] + head.bias2[i] - x[0, t + i]).abs().sum())
                truth.append(x[0, t + i].abs().sum())
            losses.append(sum(errors))
            zeros.append(sum(truth))
    assert len(losses) == batch.sample_size
    return torch.stack(losses).mean(), torch.stack(zeros).mean()


def test_loss_and_gradients_are_the_formulas_on_a_padded_batch() -> None:
    method = build("decoar_tiny", "method.encoder.hidden_size=8", "method.reconstruction_dim=6").train()
    perturb(method)
    batch = collate(method, *two_waveforms(6_000, 4_321))
    assert batch.padded
    output, (expected, zero) = method(batch), written_out(method, batch)
    elements = (method.config.slice_size + 1) * 80
    assert loss_per_unit(output, batch) * elements == pytest.approx(expected.item(), rel=1e-5)
    assert value(output, "error_of_mean") * elements == pytest.approx(zero.item(), rel=1e-5)
    assert output.loss.item() * elements == pytest.approx(batch.sample_size * expected.item(), rel=1e-5)
    named = dict(method.named_parameters())
    names = [
        "head.weight2",
        "head.proj1.weight",
        "encoder.forward_lstms.0.weight_hh_l0",
        "encoder.backward_lstms.1.weight_ih_l0",
        "encoder.post_extract_proj.weight",
    ]
    parameters = [named[name] for name in names]
    ours = torch.autograd.grad(output.loss * elements / batch.sample_size, parameters)
    theirs = torch.autograd.grad(expected, parameters)
    for name, gradient, reference in zip(names, ours, theirs, strict=True):
        assert reference.norm() > 0, name
        assert (gradient - reference).norm() <= 1e-3 * reference.norm(), name


def test_a_slice_is_predicted_from_its_ends_and_what_lies_beyond() -> None:
    method = build("decoar_tiny").eval()
    perturb(method)
    x, start = torch.randn(1, 60, 80), 20
    with torch.no_grad():
        before = method.predict(x, None)
        assert before.shape == (1, 43, 18, 80)
        inside = x.clone()
        inside[:, start + 1 : start + 17] = torch.randn(1, 16, 80)
        assert torch.equal(method.predict(inside, None)[0, start], before[0, start])
        for heard in (start, start + 17):
            other = x.clone()
            other[:, heard] += 1
            assert not torch.equal(method.predict(other, None)[0, start], before[0, start])


def test_figures_of_the_unseen_frames_leave_the_ends_out() -> None:
    method = build("decoar_tiny").eval()
    waveforms, lengths = two_waveforms()
    batch = collate(method, waveforms[:1], lengths[:1])
    with torch.no_grad():
        output = method(batch)
        features, _ = method.encoder.front_end(batch.waveforms, None)
        predictions = method.predict(features, None)
    size, errors, copies = method.config.slice_size, [], []
    for t in range(features.shape[1] - size):
        for i in range(1, size):
            nearer = t if i <= size // 2 else t + size
            errors.append((predictions[0, t, i] - features[0, t + i]).abs().mean())
            copies.append((features[0, nearer] - features[0, t + i]).abs().mean())
    assert value(output, "error_unseen") == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)
    assert value(output, "error_unseen_of_copy") == pytest.approx(torch.stack(copies).mean().item(), rel=1e-5)


def test_the_nearer_end_of_an_odd_slice() -> None:
    slices = torch.arange(5.0).view(1, 1, 5, 1)
    assert nearer_end(slices).flatten().tolist() == [0, 0, 4, 4, 4]


def test_a_row_shorter_than_a_slice_counts_nothing() -> None:
    method = build("decoar_tiny").eval()
    waveforms, _ = two_waveforms(4_000, 1_000)
    both = collate(method, waveforms, torch.tensor([4_000, 1_000]))
    alone = collate(method, waveforms[:1], torch.tensor([4_000]))
    assert both.sample_size == alone.sample_size == 1 + (4_000 - 400) // 160 - 17
    assert method(both).loss.item() == pytest.approx(method(alone).loss.item(), rel=1e-5)


def test_parameter_counts() -> None:
    method = on_meta("decoar_layers")
    assert count(method.encoder) == count(on_meta("decoar").encoder) == 67_257_344
    assert count(method) == 86_879_648


def test_the_last_layer_alone_is_the_last_of_all() -> None:
    method = build("decoar_tiny").eval()
    last = build("decoar_tiny", "method.encoder.layers=last").eval()
    last.load_state_dict(method.state_dict())
    inputs = two_waveforms()
    with torch.no_grad():
        (states, _), (only, _) = method.encoder(*inputs), last.encoder(*inputs)
    assert (len(states), len(only)) == (2, 1)
    assert torch.equal(states[-1], only[0])
    assert last.encoder.hidden_sizes == [128]
    batch = collate(method, *inputs)
    assert torch.equal(method(batch).loss, last(batch).loss)


@pytest.mark.parametrize(
    ("override", "message"),
    [("method.slice_size=1", "slice_size"), ("method.encoder.layers=first", r"encoder\.layers: 'first'")],
)
def test_settings_that_cannot_be(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("decoar_tiny", override)


def test_heads_start_as_separate_linear_layers() -> None:
    head = build("decoar_tiny").head
    layer = nn.Linear(head.weight2.shape[1], 80)
    assert head.weight2.abs().max().item() == pytest.approx(layer.weight.abs().max().item(), rel=0.02)


def test_figures_show_the_middle_of_slices() -> None:
    method = build("decoar_tiny").eval()
    with torch.no_grad():
        figures = method.figures(collate(method, *two_waveforms()))
    assert [axis.get_title() for axis in figures["middle_of_slice"].axes] == ["true", "predicted"]


def test_it_learns_more_than_to_copy_the_nearer_end(learning_seed: int, tmp_path: Path) -> None:
    scores = train_recipe(
        "decoar_tiny",
        tmp_path,
        learning_seed,
        "schedule.total_updates=80",
        "trainer={validate_every:80,save_every:80,max_validation_batches:2}",
    )
    assert_learned(scores["validation/loss"], below=scores["validation/error_of_mean"])
    assert_learned(scores["validation/error_unseen"], below=scores["validation/error_unseen_of_copy"])
