"""BEST-RQ against speechbrain's code and against nearest neighbours, closed forms and torch's loss; what it hears."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from learning import assert_learned
from recipe_checks import collate, count, load_fixture, on_meta, perturb, train_recipe, two_waveforms, value
from safetensors.torch import load_file
from scipy.stats import binomtest, kstest
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from pretrain.config import ConfigError, compose_recipe, typed_method
from pretrain.features.front_end import FbankConfig, FixedNormalizationConfig
from pretrain.method import Counts
from recipes.best_rq.encoder import BestRqEncoder
from recipes.best_rq.interop import from_pt
from recipes.best_rq.masks import BlocksConfig, SpansConfig, hidden_frames, whole
from recipes.best_rq.method import BestRqConfig, BestRqMethod
from recipes.best_rq.quantizer import RandomProjectionQuantizer

FIXTURES = Path(__file__).parent / "fixtures"
UNLIKELY = 1e-3  # of tests with fixed seeds
LEFT_CONTEXT = 3
BINS = 40  # of the tiny recipe


@pytest.fixture(scope="module")
def config() -> BestRqConfig:
    """That of the tiny recipe."""
    return typed_method(BestRqConfig, compose_recipe("best_rq_tiny")["method"])


def streaming(config: BestRqConfig) -> BestRqConfig:
    """The same, hearing nothing later and little before."""
    front_end = FbankConfig("fbank", 1, FixedNormalizationConfig("fixed", [-6.0], [4.0]), BINS, "povey", 20.0, 0)
    return replace(config, encoder=replace(config.encoder, front_end=front_end, left_context=LEFT_CONTEXT))


def moved(config: BestRqConfig) -> BestRqMethod:
    """A network with every parameter off its initial value."""
    torch.manual_seed(0)
    method = BestRqMethod(config)
    perturb(method)
    return method


def test_the_quantizer_is_drawn_as_the_paper_says() -> None:
    torch.manual_seed(0)
    quantizer = RandomProjectionQuantizer(320, 8192, 16)
    assert not list(quantizer.parameters())
    assert quantizer.state_dict().keys() == {"projection", "codebook"}
    bound = math.sqrt(6 / (320 + 16))
    assert kstest(quantizer.projection.flatten() / (2 * bound) + 0.5, "uniform").pvalue > UNLIKELY
    assert torch.allclose(quantizer.codebook.norm(dim=1), torch.ones(8192))
    # The squared cosine with any direction of a vector that is uniform on the sphere is Beta(1/2, 15/2).
    assert kstest(quantizer.codebook[:, 3].square(), "beta", args=(0.5, 7.5)).pvalue > UNLIKELY


def test_codes_are_nearest_neighbours() -> None:
    """In closed form in double precision, by scikit-learn and by faiss; near ties may go either way."""
    torch.manual_seed(1)
    quantizer = RandomProjectionQuantizer(320, 2048, 16)
    features = torch.randn(300, 320)
    codes = quantizer(features)
    assert codes.unique().numel() > 200
    projected = features.double() @ quantizer.projection.double()
    unit = projected / projected.square().sum(1, keepdim=True).sqrt()
    distances = torch.cdist(unit, quantizer.codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    chosen = distances.gather(1, codes[:, None])[:, 0]
    assert (chosen - distances.min(1).values).max() < 1e-6
    assert (codes == distances.argmin(1)).float().mean() > 0.99
    codebook, queries = quantizer.codebook.numpy(), unit.float().numpy()
    neighbours = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(codebook).kneighbors(queries)[1][:, 0]
    index = faiss.IndexFlatL2(16)
    index.add(codebook)
    for theirs in (neighbours, index.search(queries, 1)[1][:, 0]):
        assert (codes.numpy() == theirs).mean() > 0.99


def test_codes_do_not_depend_on_the_precision_of_the_run() -> None:
    torch.manual_seed(1)
    quantizer, features = RandomProjectionQuantizer(320, 8192, 16), torch.randn(100, 320)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(features), quantizer.float()(features))


def test_the_step_of_speechbrain() -> None:
    """Targets, hidden states, logits, loss and gradients of its modules in its training script, from its weights."""
    facts, tensors = load_fixture(FIXTURES, "speechbrain_tiny")
    theirs = {key.removeprefix("model."): tensor for key, tensor in tensors.items() if key.startswith("model.")}
    imported = from_pt(theirs)
    encoder = BestRqEncoder.from_config(imported.encoder_config).eval()
    encoder.load_state_dict(imported.encoder_state)
    features, masked = tensors["features"], tensors["masked_frames"]
    quantizer = RandomProjectionQuantizer(64, 32, 8)
    quantizer.load_state_dict({"projection": tensors["quantizer.P"], "codebook": tensors["quantizer.CB"]})
    positions = masked[::4] // 4
    codes = quantizer(features.reshape(-1, 64)).view(2, -1)[:, positions]
    assert torch.equal(codes, tensors["targets"])
    heard = features.clone()
    heard[:, masked] = tensors["noise"]
    states = encoder.context(heard, None)
    expected = [tensors["hidden.0"], tensors["hidden.1"], tensors["output"]]
    for ours, reference in zip(states, expected, strict=True):
        assert (ours - reference).abs().max() <= 1e-4 * reference.abs().max()
    logits = (states[-1] @ tensors["linear.w.weight"].T + tensors["linear.w.bias"])[:, positions]
    assert (logits - tensors["logits"]).abs().max() <= 1e-4 * tensors["logits"].abs().max()
    loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    assert loss.item() == pytest.approx(facts["scalars"]["loss"], rel=1e-5)
    loss.backward()
    parameters = dict(encoder.named_parameters())
    checked = 0
    for key, reference in tensors.items():
        if key.startswith("grad."):
            name, from_theirs = our_gradient(theirs, key.removeprefix("grad."), reference)
            own = parameters[name].grad
            assert own is not None
            assert (own - from_theirs).norm() <= 1e-3 * from_theirs.norm(), key
            checked += 1
    assert checked == 6


def our_gradient(theirs: dict[str, Tensor], key: str, gradient: Tensor) -> tuple[str, Tensor]:
    """The name and gradient of our parameter for that of theirs.

    A weight that is scaled on import by s has a gradient that is scaled by 1 / s.
    """
    zeros = {name: torch.zeros_like(tensor) for name, tensor in theirs.items()}
    moved_state = from_pt(zeros | {key: gradient}).encoder_state
    ones = from_pt(zeros | {key: torch.ones_like(gradient)}).encoder_state
    name = next(name for name, tensor in ones.items() if tensor.any())
    return name, moved_state[name] / ones[name].square()


@pytest.mark.parametrize("kind", ["whole", "streaming"])
def test_loss_is_torchs_cross_entropy_of_the_rows_alone(config: BestRqConfig, kind: str) -> None:
    """A padded batch beside its rows, each alone; in training too, since nothing is normalised over the batch."""
    method = moved(streaming(config) if kind == "streaming" else config).train()
    batch = collate(method, *two_waveforms())
    assert batch.padded
    features, counts = method.encoder.features(batch.waveforms, batch.lengths)
    width, total, right, codes = features.shape[1] // 4, torch.zeros(()), 0, []
    states, _ = method.encoder(batch.waveforms, batch.lengths)
    for row, length in enumerate(batch.lengths.tolist()):
        alone, _ = method.encoder.features(batch.waveforms[row : row + 1, :length], None)
        assert counts is not None
        assert alone.shape[1] == 4 * int(counts[row])
        for state, single in zip(states, method.encoder.context(alone, None), strict=True):
            torch.testing.assert_close(state[row, : int(counts[row])], single[0], rtol=1e-4, atol=2e-5)
        inside = batch.extras["masked_frames"] // (4 * width) == row
        heard = alone[0].clone()
        heard[batch.extras["masked_frames"][inside] % (4 * width)] = batch.extras["noise"][inside]
        masked = batch.extras["masked_positions"]
        masked = masked[masked // width == row] % width
        targets = nearest(method.quantizer, alone.reshape(-1, 4 * BINS)[masked])
        logits = method.final_proj(method.encoder.context(heard[None], None)[-1][0, masked])
        total = total + F.cross_entropy(logits, targets, reduction="sum")
        right += int((logits.argmax(1) == targets).sum())
        codes.append(targets)
    output = method(batch)
    assert batch.sample_size == sum(map(len, codes)) > 20
    assert output.loss.item() == pytest.approx(total.item(), rel=1e-4)
    assert value(output, "accuracy_masked") == pytest.approx(right / batch.sample_size)
    used = output.metrics["codes_0"]
    assert isinstance(used, Counts)
    assert torch.equal(used.counts, torch.cat(codes).bincount(minlength=16).float())
    names = ["final_proj.weight", "encoder.subsampling.convs.0.weight", "encoder.layers.1.self_attn.linear_pos.weight"]
    wanted = [dict(method.named_parameters())[name] for name in names]
    gradients = zip(names, torch.autograd.grad(output.loss, wanted), torch.autograd.grad(total, wanted), strict=True)
    for name, ours, theirs in gradients:
        assert theirs.norm() > 0, name
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm(), name


def nearest(quantizer: RandomProjectionQuantizer, features: Tensor) -> Tensor:
    """Codes by the distances themselves."""
    unit = F.normalize(features @ quantizer.projection, dim=1)
    return (quantizer.codebook - unit[:, None]).square().sum(2).argmin(1)


def test_training_leaves_the_quantizer_as_it_is(config: BestRqConfig) -> None:
    method = moved(config).train()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    optimizer = torch.optim.AdamW(method.parameter_groups(), lr=0.1, weight_decay=0.5)
    batch = collate(method, *two_waveforms(8000, 6000))
    for _ in range(2):
        optimizer.zero_grad()
        method(batch).total(batch).backward()
        optimizer.step()
    same = {name for name, tensor in method.state_dict().items() if torch.equal(tensor, before[name])}
    assert same == {"quantizer.projection", "quantizer.codebook"}


def test_the_encoder_hears_noise_where_frames_are_hidden(config: BestRqConfig) -> None:
    """What was there changes the targets and nothing else."""
    method = moved(config).eval()
    batch = collate(method, *two_waveforms())
    features, positions = method.encoder.features(batch.waveforms, batch.lengths)
    other = features.clone()
    other.view(-1, BINS)[batch.extras["masked_frames"]] += 1.0
    states = [method.last_state(x, positions, batch) for x in (features, other)]
    assert torch.equal(*states)
    codes = [method.codes(x)[batch.extras["masked_positions"]] for x in (features, other)]
    assert (codes[0] != codes[1]).float().mean() > 0.1


def test_every_frame_starts_a_span_by_itself() -> None:
    """Against the closed form; a span of one frame shows the starts themselves."""
    rows, frames = 4000, 120
    starts = np.array([SpansConfig("spans", 0.03, 1).draw(np.random.default_rng(i), frames) for i in range(rows)])
    assert binomtest(int(starts.sum()), starts.size, 0.03).pvalue > UNLIKELY
    assert np.corrcoef(starts[:, 50], starts[:, 51])[0, 1] == pytest.approx(0.0, abs=0.05)
    spans = SpansConfig("spans", 0.03, 12)
    masks = np.array([spans.draw(np.random.default_rng(i), frames) for i in range(rows)])
    for frame in (0, 5, 11, 60, 119):
        hidden = 1 - 0.97 ** min(frame + 1, 12)
        assert binomtest(int(masks[:, frame].sum()), rows, hidden).pvalue > UNLIKELY, frame
    assert spans.share == pytest.approx(1 - 0.97**12)
    edges = np.diff(np.pad(masks, ((0, 0), (1, 1))).astype(int))
    lengths = (np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1])[np.nonzero(edges == -1)[1] < frames]
    assert lengths.min() == 12


def test_blocks_lie_side_by_side_and_their_number_is_given() -> None:
    blocks = BlocksConfig("blocks", 0.15, 4)
    masks = np.array([blocks.draw(np.random.default_rng(i), 110) for i in range(3000)])
    grouped = masks[:, :108].reshape(3000, 27, 4)
    assert (grouped.all(2) == grouped.any(2)).all()
    assert not masks[:, 108:].any()
    # 0.15 * 110 = 16.5 blocks.
    assert set(grouped[:, :, 0].sum(1)) == {16, 17}
    assert grouped.mean() == pytest.approx(16.5 / 27, abs=0.003)
    assert grouped[:, 13].mean() == pytest.approx(16.5 / 27, abs=0.03)
    assert blocks.share == pytest.approx(0.6)


def test_every_utterance_has_a_position_that_is_hidden_whole() -> None:
    rare = SpansConfig("spans", 1e-4, 40)
    for frames in (8, 24, 200):
        for seed in range(50):
            mask = hidden_frames(np.random.default_rng(seed), rare, frames, 4)
            assert mask.shape == (frames,)
            assert whole(mask, 4).any()
            # A span of 40 or what leaves a position, beside which one of a few frames at the end may have been drawn.
            assert min(40, frames - 4) <= mask.sum() < frames


def test_the_collator_puts_noise_into_hidden_frames(config: BestRqConfig) -> None:
    method = moved(replace(config, mask=SpansConfig("spans", 0.06, 8)))
    waveforms, lengths = torch.zeros(40, 64_000), torch.tensor([64_000, 32_000] * 20)
    batch = collate(method, waveforms, lengths)
    # 401 and 201 frames, of which whole fours count.
    mask = torch.zeros(40 * 400, dtype=torch.bool)
    mask[batch.extras["masked_frames"]] = True
    mask = mask.view(40, 100, 4)
    assert not mask[1::2, 50:].any()
    assert torch.equal(mask.all(2).flatten().nonzero().flatten(), batch.extras["masked_positions"])
    assert batch.sample_size == len(batch.extras["masked_positions"])
    noise = batch.extras["noise"]
    assert noise.shape == (int(mask.sum()), BINS)
    assert noise.dtype == torch.float32
    assert kstest(noise[::7].flatten(), "norm", args=(0, 0.1)).pvalue > UNLIKELY
    share = 1 - 0.94**8
    assert mask[::2, 2:].float().mean() == pytest.approx(share, abs=0.04)


def test_a_streaming_encoder_hears_no_more_than_it_may(config: BestRqConfig) -> None:
    """A sample of the future changes no state, nor does one behind the left context; their neighbours within do."""
    encoder = moved(streaming(config)).encoder.eval()
    waveform = 0.1 * torch.randn(1, 40_000, generator=torch.Generator().manual_seed(0))
    kernel, layers = config.encoder.depthwise_conv_kernel_size, config.encoder.encoder_layers
    position = 40
    # Frames 4 p to 4 p + 3 of 160 samples, windows of 400: 240 samples beyond the position's own 640.
    end = 160 * (4 * position + 3) + 400
    # Every layer reaches LEFT_CONTEXT + kernel - 1 positions back, the two convolutions three frames.
    start = 160 * (4 * (position - layers * (LEFT_CONTEXT + kernel - 1)) - 3)
    assert 400 < start < end < 40_000

    def changed(sample: int) -> bool:
        """Whether another value of `sample` changes the states of `position`."""
        other = waveform.clone()
        other[0, sample] += 3.0
        with torch.no_grad():
            pairs = zip(encoder(waveform, None)[0], encoder(other, None)[0], strict=True)
        return any(not torch.equal(one[0, position], two[0, position]) for one, two in pairs)

    assert not changed(end)
    assert not changed(end + 5000)
    assert changed(end - 1)
    assert not changed(start - 1)
    assert not changed(start - 300)
    # The window's edge is nearly zero; a little further inside it counts.
    assert changed(start + 200)
    later = waveform.clone()
    later[0, end:] = 0.0
    with torch.no_grad():
        cut, _ = encoder(later[:, :end], None)
        longer, _ = encoder(waveform, None)
    for short, long in zip(cut, longer, strict=True):
        torch.testing.assert_close(short[0], long[0, : position + 1], rtol=1e-5, atol=1e-6)


def test_a_whole_encoder_hears_everything(config: BestRqConfig) -> None:
    encoder = moved(config).encoder.eval()
    waveform = 0.1 * torch.randn(1, 40_000, generator=torch.Generator().manual_seed(0))
    features, _ = encoder.features(waveform, None)
    later, earlier = features.clone(), features.clone()
    later[0, -1] += 1.0
    earlier[0, 0] += 1.0
    with torch.no_grad():
        states = [encoder.context(x, None)[-1][0, 30] for x in (features, later, earlier)]
    assert not torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_parameter_counts() -> None:
    """Base: the counts of speechbrain's modules; the paper's: 0.6 billion."""
    base = on_meta("best_rq_base")
    assert isinstance(base, BestRqMethod)
    encoder = base.encoder
    assert count(encoder.layers) + count(encoder.layer_norm) == 88_883_328
    assert count(encoder.subsampling.proj) == 369_216
    assert count(encoder.subsampling.convs) + count(encoder.subsampling.norms) == 49_696
    assert count(base) - count(encoder) == 576 * 8192 + 8192
    assert base.quantizer.projection.shape == (320, 16)
    assert base.quantizer.codebook.shape == (8192, 16)
    large = on_meta("best_rq")
    assert round(count(large.encoder) / 1e9, 1) == 0.6
    assert count(on_meta("best_rq_streaming").encoder) == count(large.encoder)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_truncated_encoder_has_the_same_lower_states(config: BestRqConfig, layer: int) -> None:
    encoder = moved(config).encoder.eval()
    inputs = two_waveforms(8000, 6000)
    with torch.no_grad():
        states, lower = encoder(*inputs)[0], encoder.truncated(layer)(*inputs)[0]
    assert len(lower) == layer + 2
    assert all(torch.equal(a, b) for a, b in zip(lower[: layer + 1], states, strict=False))


def test_settings_that_cannot_be(config: BestRqConfig) -> None:
    encoder = config.encoder
    with pytest.raises(ConfigError, match=r"mask: .* prob"):
        SpansConfig("spans", 0.0, 4)
    with pytest.raises(ConfigError, match="hide every frame"):
        BlocksConfig("blocks", 0.25, 4)
    with pytest.raises(ConfigError, match=r"activation: unknown 'relu'; use gelu or swish"):
        replace(encoder, activation="relu")
    with pytest.raises(ConfigError, match=r"depthwise_conv_kernel_size: 8; .*odd"):
        replace(encoder, depthwise_conv_kernel_size=8)
    assert replace(encoder, depthwise_conv_kernel_size=8, left_context=2).left_context == 2
    with pytest.raises(ConfigError, match=r"conv_channels: \[8\]; give two widths"):
        replace(encoder, conv_channels=[8])
    with pytest.raises(ConfigError, match=r"encoder_embed_dim: 64 must be"):
        replace(encoder, encoder_attention_heads=5)
    with pytest.raises(ConfigError, match="take a multiple of 4"):
        replace(encoder, front_end=replace(encoder.front_end, bins=42))
    with pytest.raises(ConfigError, match="noise_std"):
        replace(config, noise_std=-0.1)


def test_the_figure_shows_units(config: BestRqConfig) -> None:
    method = moved(config).eval()
    with torch.no_grad():
        figures = method.figures(collate(method, *two_waveforms(20_000, 10_000)))
    assert figures.keys() == {"units"}
    assert [axis.get_ylabel() for axis in figures["units"].axes] == ["mel band", "unit"]


def test_it_learns_more_than_how_often_each_code_comes(learning_seed: int, tmp_path: Path) -> None:
    """Who hears nothing is left with the perplexity of the validation's own codes, if with their shares at all."""
    scores = train_recipe(
        "best_rq_tiny",
        tmp_path,
        learning_seed,
        "schedule={warmup_updates:20,total_updates:80}",
        "trainer={validate_every:80,save_every:40}",
    )
    assert_learned(math.exp(scores["validation/loss"]), below=scores["validation/codes_0_perplexity"])
    checkpoints = sorted((tmp_path / "best_rq_tiny" / "checkpoints").iterdir())
    first, last = (load_file(step / "model.safetensors") for step in (checkpoints[0], checkpoints[-1]))
    assert checkpoints[0] != checkpoints[-1]
    assert {name for name in first if torch.equal(first[name], last[name])} == {
        "quantizer.projection",
        "quantizer.codebook",
    }
