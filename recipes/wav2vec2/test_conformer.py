"""wav2vec 2.0 with conformer layers against transformers' pre-training class and s3prl's client, and its sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import s3prl_compat  # noqa: F401  (must come before s3prl)
import torch
from learning import assert_learned
from recipe_checks import (
    assert_same_states,
    build,
    count,
    on_meta,
    perturb,
    train_recipe,
    two_waveforms,
    value,
    write_exports,
)
from s3prl.nn import S3PRLUpstream
from transformers import AutoModelForPreTraining
from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as theirs

from pretrain import Upstream
from pretrain.models.batch_norm import BatchNorm
from pretrain.quantizers import gumbel
from pretrain.weights.interop.files import read_huggingface, read_torch
from recipes.wav2vec2 import interop
from recipes.wav2vec2.method import Wav2Vec2Method
from recipes.wav2vec2.test_wav2vec2 import example, trained, transformers_loss, with_noise

POSITIONS = ("rel_pos", "rope")


def small(pos_enc_type: str) -> Wav2Vec2Method:
    """The tiny network, every tensor off its initial value; transformers has no penalty on the features."""
    position = f"method.encoder.pos_enc_type={pos_enc_type}"
    method = build(
        "wav2vec2_conformer_tiny", "method.feature_penalty_weight=0", "method.diversity_weight=0.1", position
    )
    perturb(method)
    for module in method.modules():
        if isinstance(module, BatchNorm):
            module.running_mean.normal_(0.0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    return method


@pytest.fixture(scope="module", params=POSITIONS)
def exports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint and its three exports, by format."""
    folder = tmp_path_factory.mktemp(request.param)
    return write_exports(folder, small(request.param))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pos_enc_type", POSITIONS)
def test_loss_equals_transformers(pos_enc_type: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same masks, negatives and Gumbel noise; in training the batch norm sees the padding of the second row in both."""
    method = small(pos_enc_type).train(training)
    method.quantizer.temperature = 1.3
    exported = interop.to_huggingface(trained(method))
    values = exported.config | {"apply_spec_augment": True, "layerdrop": 0.0}
    model = theirs.Wav2Vec2ConformerForPreTraining(theirs.Wav2Vec2ConformerConfig(**values)).train(training)
    model.load_state_dict(exported.tensors)
    model.set_gumbel_temperature(1.3)
    batch = method.collator(method.config)([example(0, 24_000), example(1, 14_400)])
    assert batch.padded
    # transformers' class does not normalise waveforms.
    method.encoder.config.normalize = False
    mask = batch.extras["mask"]
    noise = gumbel.gumbel_noise(torch.empty(*mask.shape, method.config.latent_groups, method.config.latent_vars))
    monkeypatch.setattr(gumbel, "gumbel_noise", lambda logits: noise[mask])
    monkeypatch.setattr(theirs.nn.functional, "gumbel_softmax", with_noise(noise.flatten(0, 2)))
    output, peer = method(batch), transformers_loss(model, batch, attend=True)
    units = batch.sample_size
    assert value(output, "loss_contrastive") == pytest.approx(peer.contrastive_loss.item() / units, rel=1e-4)
    if not training:
        return  # transformers reports the perplexity of hard codes there
    assert output.total(batch).item() == pytest.approx(peer.loss.item(), rel=1e-4)
    output.total(batch).backward()
    peer.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    ours = {name: torch.zeros(()) if p.grad is None else p.grad for name, p in method.named_parameters()}
    renamed = interop.to_huggingface(trained(method, ours)).tensors
    total = torch.nn.utils.get_total_norm(list(gradients.values()))
    for name, gradient in gradients.items():
        assert (renamed[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-5 * total, name


def test_equals_s3prl(exports: dict[str, Path]) -> None:
    ours = Upstream("wav2vec2", str(exports["native"]))
    theirs = S3PRLUpstream("wav2vec2_local", str(exports["s3prl"]))
    waveforms, lengths = two_waveforms()
    for samples in (27_200, 16_079, 800, 100):
        assert_same_states(ours, theirs, waveforms[:1, :samples], torch.tensor([samples]))
    assert_same_states(ours, theirs, waveforms, lengths)
    weights = read_torch(exports["s3prl"])["model_weight"]
    loaded = theirs.upstream.model.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in loaded.items())


def test_every_layout_reads_back(exports: dict[str, Path]) -> None:
    first = Upstream("wav2vec2", str(exports["checkpoint"]))
    waveforms, lengths = two_waveforms()
    for form in ("native", "s3prl", "huggingface"):
        assert_same_states(Upstream("wav2vec2", str(exports[form])), first, waveforms, lengths, rtol=0.0)
    for imported in (
        interop.from_pt(read_torch(exports["s3prl"])),
        interop.from_huggingface(read_huggingface(exports["huggingface"])),
    ):
        assert imported.head_state.keys() == {
            "quantizer.vars",
            *(
                f"{name}.{part}"
                for name in ("quantizer.weight_proj", "project_q", "final_proj")
                for part in ("weight", "bias")
            ),
        }


def test_transformers_loads_the_directory(exports: dict[str, Path]) -> None:
    model, report = AutoModelForPreTraining.from_pretrained(exports["huggingface"], output_loading_info=True)
    assert isinstance(model, theirs.Wav2Vec2ConformerForPreTraining)
    assert not any(report.values())


@pytest.mark.parametrize(
    ("recipe", "official"),
    # Counted on the official class, heads included.
    [("wav2vec2_conformer_relpos", 620_510_976), ("wav2vec2_conformer_rope", 595_296_000)],
)
def test_sizes_but_for_the_unused_convolution(recipe: str, official: int) -> None:
    kernel, gains, biases = 1024 * 64 * 128, 128, 1024
    assert count(on_meta(recipe)) == official - (kernel + gains + biases)


@pytest.mark.slow
def test_it_learns(learning_seed: int, tmp_path: Path) -> None:
    figures = train_recipe("wav2vec2_conformer_tiny", tmp_path, learning_seed)
    assert_learned(figures["validation/accuracy"], above=2.5 * figures["validation/chance"])
    assert_learned(figures["validation/prob_perplexity"], above=30)
