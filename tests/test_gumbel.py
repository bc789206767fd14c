"""The Gumbel quantizer: against torch's straight-through softmax, its schedule, its bounds and official anchors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.errors import UserError
from pretrain.quantizers import gumbel
from pretrain.quantizers.gumbel import GumbelVectorQuantizer, gumbel_noise, prob_perplexity, temperature_at


def quantizer(**options: object) -> GumbelVectorQuantizer:
    torch.manual_seed(0)
    module = GumbelVectorQuantizer(dim=12, num_vars=7, groups=3, vq_dim=15, **options)
    module.temperature = 0.8
    return module


@pytest.mark.parametrize("options", [{}, {"combine_groups": True}, {"depth": 2, "activation": "relu"}])
def test_training_is_torchs_straight_through_softmax(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = quantizer(**options)
    x, weights = torch.randn(20, 12), torch.randn(20, 15)
    quantized = module(x, torch.zeros(20, 3, 7))
    (quantized.vectors * weights).sum().backward()
    ours = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    logits = module.weight_proj(x).view(20, 3, 7)
    # Noise of zero: exp(-exp(0)) has the Gumbel quantile 0.
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.fill_(1.0))
    hard = F.gumbel_softmax(logits, tau=0.8, hard=True)
    monkeypatch.undo()
    books = module.vars.view(-1, 7, 5).expand(3, -1, -1)
    vectors = torch.einsum("ngv,gve->nge", hard, books).flatten(1)
    (vectors * weights).sum().backward()
    torch.testing.assert_close(quantized.vectors, vectors)
    assert torch.equal(quantized.codes, hard.argmax(-1))
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, msg=name)
        assert parameter.grad.abs().sum() > 0, name


def test_noise_decides_in_training_and_not_in_evaluation() -> None:
    module = quantizer()
    x = torch.randn(500, 12)
    torch.manual_seed(1)
    first, second = module(x), module(x)
    assert not torch.equal(first.codes, second.codes)
    torch.manual_seed(1)
    assert torch.equal(module(x).codes, first.codes)
    module.eval()
    likeliest = module.weight_proj(x).view(-1, 3, 7).argmax(-1)
    assert torch.equal(module(x).codes, likeliest)
    # What is reported leaves the noise out in both modes.
    expected = torch.stack([torch.bincount(likeliest[:, group], minlength=7) for group in range(3)]).float()
    assert torch.equal(first.counts, expected)
    assert torch.equal(module(x).counts, expected)


def test_equal_entries_are_bitwise_equal_vectors() -> None:
    quantized = quantizer()(torch.randn(3000, 12))
    vectors, entries = quantized.vectors.detach(), quantized.entries()
    for number in entries.unique()[:50]:
        chosen = vectors[entries == number]
        assert torch.equal(chosen, chosen[:1].expand_as(chosen))
    assert len(entries.unique()) == len(quantized.codes.unique(dim=0)) == len(vectors.unique(dim=0))


def test_gumbel_noise_has_the_moments_of_its_distribution() -> None:
    torch.manual_seed(0)
    noise = gumbel_noise(torch.empty(400_000, dtype=torch.float64))
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    # An exponential draw of 0 would give infinity: frames would then have no gradient.
    assert torch.isfinite(noise).all()


def test_perplexity_runs_from_one_code_per_group_to_all_of_them() -> None:
    one = torch.zeros(50, 2, 320)
    one[..., 3] = 1e4
    assert prob_perplexity(one).item() == pytest.approx(2.0, abs=1e-3)
    assert prob_perplexity(torch.zeros(50, 2, 320)).item() == pytest.approx(640, rel=1e-4)
    # Every frame sure of another entry: as diverse as being unsure, since the mean over frames counts.
    spread = 1e4 * F.one_hot(torch.arange(320), 320).float().unsqueeze(1).expand(-1, 2, -1)
    assert prob_perplexity(spread).item() == pytest.approx(640, rel=1e-3)


def test_gradients_of_the_perplexity_are_free_of_noise() -> None:
    module = quantizer()
    x = torch.randn(30, 12)
    grads = []
    for _ in range(2):
        module.zero_grad()
        module(x).prob_perplexity.backward()
        grads.append(module.weight_proj.weight.grad.clone())
        assert module.vars.grad is None
    assert torch.equal(*grads)
    assert grads[0].abs().sum() > 0


def test_the_temperature_follows_the_published_schedule() -> None:
    base, large = (2.0, 0.5, 0.999995), (2.0, 0.1, 0.999995)
    assert temperature_at(0, *base) == 2.0
    assert temperature_at(22_200, *base) == pytest.approx(1.7899, abs=1e-4)
    assert temperature_at(277_258, *base) > temperature_at(277_259, *base) == 0.5
    assert temperature_at(599_144, *large) > temperature_at(599_145, *large) == 0.1


def test_published_sizes_and_names() -> None:
    with torch.device("meta"):
        base = GumbelVectorQuantizer(512, 320, 2, 256)
        vq_wav2vec = GumbelVectorQuantizer(512, 320, 2, 512, depth=2)
        combined = GumbelVectorQuantizer(512, 320, 2, 512, combine_groups=True, depth=2)
    assert sum(p.numel() for p in base.parameters()) == 410_240
    assert {name: tuple(p.shape) for name, p in base.named_parameters()} == {
        "vars": (1, 640, 128),
        "weight_proj.weight": (640, 512),
        "weight_proj.bias": (640,),
    }
    assert {name: tuple(p.shape) for name, p in vq_wav2vec.named_parameters()} == {
        "vars": (1, 640, 256),
        "weight_proj.0.0.weight": (1024, 512),
        "weight_proj.0.0.bias": (1024,),
        "weight_proj.1.weight": (640, 1024),
        "weight_proj.1.bias": (640,),
    }
    assert combined.vars.shape == (1, 320, 256)


def test_at_first_vq_wav2vecs_softmax_is_uniform_and_wav2vec2s_is_not() -> None:
    torch.manual_seed(0)
    x = F.layer_norm(torch.randn(400, 512), (512,))
    # Reference figures: about 639 of 640; far below, because of projections from N(0, 1).
    assert GumbelVectorQuantizer(512, 320, 2, 512, depth=2)(x).prob_perplexity.item() > 630
    assert GumbelVectorQuantizer(512, 320, 2, 256)(x).prob_perplexity.item() < 600


def test_it_computes_in_float32_under_bf16_autocast() -> None:
    module = quantizer().eval()
    x = torch.randn(50, 12)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(x)
    exact = module(x)
    assert mixed.vectors.dtype == mixed.prob_perplexity.dtype == torch.float32
    assert torch.equal(mixed.vectors, exact.vectors)
    with pytest.raises(UserError, match="vq_dim: 15 does not divide into 2 groups"):
        GumbelVectorQuantizer(12, 7, 2, 15)
    assert gumbel.ACTIVATIONS.keys() == {"gelu", "relu"}
