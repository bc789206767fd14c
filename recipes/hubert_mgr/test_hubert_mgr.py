"""HuBERT-MGR beside HuBERT on the same weights, its domains beside what augmentation did, its reversed gradient."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from learning import assert_learned
from recipe_checks import build, count, on_meta, perturb, value, write_checkpoint, write_exports
from torch import Tensor

from pretrain.config import ConfigError
from pretrain.data.augment.augmenter import open_augmenter
from pretrain.data.augment.options import AugmentConfig, Noise, Reverberation, WhiteNoise
from pretrain.data.manifest import Manifest, write_manifest
from pretrain.method import Batch, Example
from pretrain.upstream import Upstream
from pretrain.weights.export import ExportConfig, export
from pretrain.weights.read import initialise
from recipes.hubert_mgr.method import HubertMGRMethod

NO_DROPOUT = ["method.encoder.feature_grad_mult=1.0"]
RATE = 16_000


def labelled(waveform: Tensor, row: int, *stages: str) -> Example:
    labels = np.random.default_rng(row).integers(0, 50, len(waveform) // 160)
    return Example(waveform, row, 0, {"labels_0": labels}, np.random.default_rng([0, row]), altered_by=stages)


def batch_of(method: HubertMGRMethod, *lengths: int) -> Batch:
    """Rows of noise, of which every second one counts as altered by white noise."""
    generator = torch.Generator().manual_seed(0)
    rows = enumerate(torch.randn(length, generator=generator) for length in lengths)
    examples = [labelled(waveform, row, *["white_noise"] * (row % 2)) for row, waveform in rows]
    return method.collator(method.config)(examples)


def tiny(*overrides: str) -> HubertMGRMethod:
    method = build("hubert_mgr_tiny", *NO_DROPOUT, *overrides)
    assert isinstance(method, HubertMGRMethod)
    perturb(method)
    return method


def encoder_gradients(method: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in method.named_parameters()
        if name.startswith("encoder.")
    }


def test_without_the_reversal_it_is_hubert() -> None:
    """Loss, metrics and all gradients of the encoder and of the heads that both have."""
    ours, hubert = tiny("method.reversal_weight=0"), build("hubert_tiny", *NO_DROPOUT)
    hubert.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith("domain_classifier.")})
    batch = batch_of(ours, 2 * RATE, 24_000)
    outputs = [method(batch) for method in (ours, hubert)]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert outputs[0].mean is not None
    assert torch.equal(outputs[0].mean, outputs[1].mean)
    for name in outputs[1].metrics:
        if name.startswith(("loss", "accuracy")):
            assert value(outputs[0], name) == value(outputs[1], name)
    for output in outputs:
        output.total(batch).backward()
    for name, gradient in encoder_gradients(hubert).items():
        torch.testing.assert_close(encoder_gradients(ours)[name], gradient)
    torch.testing.assert_close(ours.final_proj.weight.grad, hubert.final_proj.weight.grad)


def test_the_encoder_gets_the_reversed_gradient_and_the_classifier_its_own() -> None:
    """Beside the cross-entropy of the classifier on the mean of each row's frames, written out with torch."""
    method = tiny("method.reversal_weight=0.3", "method.domains=[[noise],[white_noise]]")
    batch = batch_of(method, 2 * RATE, 24_000, 2 * RATE)
    assert batch.extras["domains"].tolist() == [0, 2, 0]
    assert batch.other_sizes == {"domains": 3}
    output = method(batch)
    output.other_losses["domains"].backward()
    found, classifier = encoder_gradients(method), method.domain_classifier
    own = [parameter.grad.clone() for parameter in classifier.parameters() if parameter.grad is not None]

    method.zero_grad()
    features, states = method.encode(batch)
    assert features.frame_lengths is not None
    rows = zip(states[-1], features.frame_lengths.tolist(), strict=True)
    means = torch.stack([row[:frames].mean(0) for row, frames in rows])
    first, _, last = classifier
    scores = last(F.relu(first(means)))
    plain = -torch.log_softmax(scores, 1)[torch.arange(3), batch.extras["domains"]].sum()
    plain.backward()
    assert output.other_losses["domains"].item() == pytest.approx(plain.item(), rel=1e-5)
    assert value(output, "loss_domain") == pytest.approx(plain.item() / 3, rel=1e-5)
    right = (scores.argmax(1) == batch.extras["domains"]).float().mean().item()
    assert value(output, "accuracy_domain") == pytest.approx(right)
    for name, gradient in encoder_gradients(method).items():
        torch.testing.assert_close(found[name], -0.3 * gradient, rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(own, classifier.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.grad, rtol=1e-4, atol=1e-6)
    assert max(gradient.abs().max() for gradient in found.values()) > 1e-4


def test_frames_of_padding_change_no_domain() -> None:
    method = tiny().eval()
    hidden, frames = torch.randn(2, 99, 96, generator=torch.Generator().manual_seed(0)), [99, 60]
    together = method.domain_logits(hidden, torch.tensor(frames))
    for row, count_of_row in enumerate(frames):
        alone = method.domain_logits(hidden[row : row + 1, :count_of_row], None)
        torch.testing.assert_close(alone, together[row : row + 1])


def test_domains_are_what_augmentation_did(tmp_path: Path) -> None:
    """Each kind of distortion leaves its own mark on an impulse: nothing, a file of ones, a late echo, or noise."""
    import soundfile

    impulse = torch.zeros(2000)
    impulse[0] = 1.0
    for name, content in (("noise", np.ones(500)), ("rirs", np.eye(1, 400, 0)[0] + 0.5 * np.eye(1, 400, 300)[0])):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "a.wav", content.astype(np.float32), RATE, subtype="FLOAT")
        write_manifest(tmp_path / name / "train.tsv", tmp_path / name, [("a.wav", len(content))])
    stages = AugmentConfig(
        exclusive=True,
        noise=Noise(0.225, [10.0, 19.0]),
        white_noise=WhiteNoise(0.3, [10.0, 19.0]),
        reverberation=Reverberation(0.225),
    )
    speech = Manifest.read(tmp_path / "noise" / "train.tsv")
    augmenter = open_augmenter(stages, str(tmp_path / "noise"), str(tmp_path / "rirs"), speech)
    assert augmenter is not None
    method = build("hubert_base_robust_mgr", "method.encoder.encoder_layers=1")
    examples = augmenter([labelled(impulse.clone(), row) for row in range(800)], [])
    domains = method.collator(method.config)(examples).extras["domains"].tolist()
    for example, domain in zip(examples, domains, strict=True):
        added = (example.waveform - impulse).numpy()
        if domain == 0:
            assert not added.any()
        elif domain == 1:
            assert added.std() < 1e-6 < added[0]
        elif domain == 2:
            assert 0.5 < added.std() / np.abs(added).mean() / math.sqrt(math.pi / 2) < 1.5
            assert added[1:].std() > 0.5 * added.std() > 0
        else:
            assert np.abs(added[1:]).argmax() + 1 == 300
    shares = np.bincount(domains, minlength=4) / len(domains)
    # Three standard deviations of 800 draws.
    np.testing.assert_allclose(shares, [0.25, 0.225, 0.3, 0.225], atol=0.05)


def test_it_continues_from_hubert_with_its_heads(tmp_path: Path) -> None:
    """From a run of ours, and from HuBERT's file in s3prl's form; the classifier alone is new."""
    hubert = build("hubert_tiny")
    perturb(hubert)
    step = write_checkpoint(tmp_path / "run", hubert)
    export(ExportConfig(str(step), str(tmp_path / "hubert.pt"), "s3prl"))
    for source in (tmp_path / "run", tmp_path / "hubert.pt"):
        method = build("hubert_mgr_tiny")
        fresh = {k: v.clone() for k, v in method.state_dict().items() if k.startswith("domain_classifier.")}
        done = initialise(method, str(source), "keep")
        state = method.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in hubert.state_dict().items())
        assert all(torch.equal(state[key], tensor) for key, tensor in fresh.items())
        assert done[-1] == "head: 3 tensors kept"


def test_its_files_are_huberts(tmp_path: Path) -> None:
    """s3prl's upstream of that name is a HuBERT; transformers has it as a HubertModel. The states are equal."""
    method = tiny().eval()
    paths = write_exports(tmp_path, method)
    wavs, lengths = torch.randn(2, RATE, generator=torch.Generator().manual_seed(1)), torch.tensor([RATE, RATE])
    with torch.no_grad():
        expected, _ = method.encoder(wavs, lengths)
        theirs = transformers.HubertModel.from_pretrained(paths["huggingface"]).eval()(wavs, output_hidden_states=True)
        for form in ("native", "s3prl", "huggingface"):
            states, _ = Upstream("hubert_mgr_tiny", path_or_url=str(paths[form])).eval()(wavs, lengths)
            for state, other in zip(states, expected, strict=True):  # an Upstream has s3prl's one frame more
                torch.testing.assert_close(state[:, : other.shape[1]], other)
    for state, other in zip(expected, theirs.hidden_states, strict=True):
        torch.testing.assert_close(state, other, rtol=1e-4, atol=1e-5)


def test_parameter_counts() -> None:
    method = on_meta("hubert_base_robust_mgr")
    assert count(method.encoder) == count(on_meta("hubert_base").encoder) == 94_371_712
    assert count(method) - count(on_meta("hubert_base")) == 768 * 256 + 256 + 256 * 4 + 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.domains=[]", r"method\.domains: a domain without stages"),
        ("method.domains=[[noise],[]]", r"method\.domains: a domain without stages"),
        ("method.domains=[[nois]]", r"method\.domains: 'nois' is no stage of augment; known: reverberation, mixing"),
        ("method.domains=[[noise],[noise]]", r"names a stage twice"),
        ("method.reversal_weight=-0.1", r"method\.reversal_weight: -0\.1 is negative"),
    ],
)
def test_settings_that_cannot_be(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("hubert_mgr_tiny", override)


def test_a_stage_of_no_domain_is_named() -> None:
    method = tiny()
    with pytest.raises(ConfigError, match=r"augment\.mixing: alters utterances, but method\.domains does not name it"):
        method.collator(method.config)([labelled(torch.randn(RATE), 0, "mixing")])
    # Utterances that no stage has altered are clean, as all are in validation.
    assert method.collator(method.config)([labelled(torch.randn(RATE), 0)]).extras["domains"].tolist() == [0]


def tones(count: int, seed: int) -> list[Example]:
    """Half a second of a tone with overtones each, every second one under white noise of about its power."""
    rng, time, examples = np.random.default_rng(seed), np.arange(8000) / RATE, []
    for row in range(count):
        pitch = rng.uniform(100, 400)
        tone = sum(0.1 / k * np.sin(2 * np.pi * pitch * k * time + rng.uniform(0, 6)) for k in range(1, 8))
        noise = 0.1 * rng.standard_normal(8000) * (row % 2)
        examples.append(
            labelled(torch.from_numpy((tone + noise).astype(np.float32)), row, *["white_noise"] * (row % 2))
        )
    return examples


def test_the_classifier_learns_to_tell_noise(learning_seed: int) -> None:
    """From the states of an untrained encoder: what is to be hidden is there."""
    network = "method.encoder={encoder_embed_dim:32,encoder_ffn_embed_dim:64,encoder_layers:2,conv_pos:16,"
    convs = "conv_feature_layers:[[32,10,5],[32,3,2],[32,3,2],[32,3,2],[32,3,2],[32,2,2],[32,2,2]]}"
    method = build("hubert_mgr_tiny", network + convs, seed=learning_seed)
    assert isinstance(method, HubertMGRMethod)
    collator = method.collator(method.config)
    train, test = (collator(tones(count, seed)) for count, seed in ((256, learning_seed), (64, learning_seed + 100)))
    with torch.no_grad():
        hidden, held_out = (method.encode(batch)[1][-1] for batch in (train, test))
    optimizer = torch.optim.Adam(method.domain_classifier.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(method.domain_logits(hidden, None), train.extras["domains"]).backward()
        optimizer.step()
    right = method.domain_logits(held_out, None).argmax(1) == test.extras["domains"]
    # Half of them are clean.
    assert_learned(right.float().mean().item(), above=0.5)
