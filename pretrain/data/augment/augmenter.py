"""Augmentation of the training waveforms of one micro-batch: what is drawn, and how it is applied.

Sources: mixing of utterances and of noise are those of UniSpeech-SAT (arXiv 2110.05752) and WavLM (arXiv 2110.13900;
`src/fairseq/data/audio/utterance_mixing_dataset.py` of microsoft/UniSpeech), with two differences: an utterance is
never mixed with itself, and what is mixed in is always as it was read, never itself a mixture. Reverberation is that
of PASE+ (arXiv 2001.09239). Babble is the sum of several talkers, as in Kaldi's `steps/data/augment_data_dir.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from pretrain.data.augment.clips import Clips, open_clips, open_responses
from pretrain.data.augment.options import AddedStage, AugmentConfig, AugmentError, Babble, Mixing, Noise
from pretrain.data.augment.signals import gain, power, repeated, reverberate
from pretrain.data.joined import JoinedManifest
from pretrain.data.manifest import Manifest
from pretrain.method import Example


@dataclass
class Utterance:
    """One example on its way through the stages: `waveform` (T,) so far, `power` that of the clean waveform.

    `others` are the clean waveforms of the other utterances of the micro-batch; `rng` is the example's own.
    """

    waveform: np.ndarray
    power: float
    row: int
    rng: np.random.Generator
    others: list[np.ndarray]


class Augmenter:
    """Alters the waveforms of a micro-batch, as `options` say.

    What is drawn for an example follows from its own generator and from which utterances share its micro-batch, and
    both follow from seed and epoch: neither ranks, workers nor a restart change anything. The draws come from a child
    of `Example.rng`, so that masks are the same with augmentation and without.
    """

    def __init__(self, options: AugmentConfig, clips: dict[str, Clips]) -> None:
        """`clips` has the files that the stages of `options` take audio from, by the name of the stage."""
        self.options = options
        self.clips = clips
        self.stages = options.stages()
        self._apply: dict[str, Callable[[Utterance, list[str]], np.ndarray]] = {
            "reverberation": self._reverberate,
            "mixing": self._mix,
            "babble": self._add_babble,
            "noise": self._add_noise,
            "white_noise": self._add_white_noise,
        }

    def __call__(self, examples: list[Example], problems: list[str]) -> list[Example]:
        """The examples with altered waveforms; files that could not be read are reported in `problems`."""
        return [self._augmented(example, examples, problems) for example in examples]

    def _augmented(self, example: Example, examples: list[Example], problems: list[str]) -> Example:
        [rng] = example.rng.spawn(1)
        others = [other.waveform.numpy() for other in examples if other.row != example.row]
        # Nothing is mixed in where the micro-batch has no other utterance.
        chosen = [name for name in self._choose(rng) if others or name != "mixing"]
        if not chosen:
            return example
        waveform = example.waveform.numpy()
        utterance = Utterance(waveform, power(waveform), example.row, rng, others)
        for name in chosen:
            utterance.waveform = self._apply[name](utterance, problems)
        return replace(example, waveform=torch.from_numpy(utterance.waveform), altered_by=tuple(chosen))

    def _choose(self, rng: np.random.Generator) -> list[str]:
        """The stages of one example."""
        names, probs = list(self.stages), [stage.prob for stage in self.stages.values()]
        if self.options.exclusive:
            place = int(np.searchsorted(np.cumsum(probs), rng.random(), side="right"))
            return names[place : place + 1]
        return [name for name, drawn in zip(names, rng.random(len(names)) < probs, strict=True) if drawn]

    def _reverberate(self, utterance: Utterance, problems: list[str]) -> np.ndarray:
        response = self.clips["reverberation"].draw(utterance.rng, None, problems)
        return reverberate(utterance.waveform, response)

    def _mix(self, utterance: Utterance, problems: list[str]) -> np.ndarray:
        stage = self.options.mixing
        assert isinstance(stage, Mixing)
        other = utterance.others[int(utterance.rng.integers(len(utterance.others)))]
        return _add_part(utterance, other, stage, stage.max_part)

    def _add_babble(self, utterance: Utterance, problems: list[str]) -> np.ndarray:
        stage, samples = self.options.babble, len(utterance.waveform)
        assert isinstance(stage, Babble)
        fewest, most = stage.talkers
        babble = np.zeros(samples, np.float32)
        for _ in range(int(utterance.rng.integers(fewest, most + 1))):
            talker = self._over(utterance, self.clips["babble"], problems, except_row=utterance.row)
            babble += np.float32(gain(1.0, power(talker), 0.0)) * talker
        return _add(utterance, babble, stage)

    def _add_noise(self, utterance: Utterance, problems: list[str]) -> np.ndarray:
        stage, clips = self.options.noise, self.clips["noise"]
        assert isinstance(stage, Noise)
        if stage.max_part is None:
            return _add(utterance, self._over(utterance, clips, problems), stage)
        clip = clips.draw(utterance.rng, len(utterance.waveform), problems)
        return _add_part(utterance, clip, stage, stage.max_part)

    def _add_white_noise(self, utterance: Utterance, problems: list[str]) -> np.ndarray:
        stage = self.options.white_noise
        assert isinstance(stage, AddedStage)
        return _add(utterance, utterance.rng.standard_normal(len(utterance.waveform), np.float32), stage)

    @staticmethod
    def _over(utterance: Utterance, clips: Clips, problems: list[str], except_row: int | None = None) -> np.ndarray:
        """A random piece as long as the utterance; a shorter file is repeated, from a random place on."""
        samples = len(utterance.waveform)
        clip = clips.draw(utterance.rng, samples, problems, except_row)
        if len(clip) == samples:
            return clip
        return repeated(clip, samples, int(utterance.rng.integers(len(clip))))

    def identity(self) -> dict[str, Any]:
        """What a resumed run must find again: the options and the files, as plain values."""
        stages = {name: asdict(stage) for name, stage in self.stages.items()}
        files = {clips.field: clips.manifest.fingerprint() for clips in self.clips.values()}
        return {"exclusive": self.options.exclusive, **stages, "files": files}

    def sentence(self) -> str:
        """What is done to the training waveforms, for the first lines of a run."""
        parts = []
        for name, stage in self.stages.items():
            detail = f" at {stage.snr_db[0]:g} to {stage.snr_db[1]:g} dB" if isinstance(stage, AddedStage) else ""
            files = f" from {len(self.clips[name].manifest)} files" if name in self.clips else ""
            parts.append(f"{name} {stage.prob:.0%}{detail}{files}")
        how = "at most one stage each" if self.options.exclusive else "each stage by itself"
        return f"augmentation of training examples, {how}: {', '.join(parts)}"


def _snr(utterance: Utterance, stage: AddedStage) -> float:
    lowest, highest = stage.snr_db
    return float(utterance.rng.uniform(lowest, highest))


def _add(utterance: Utterance, added: np.ndarray, stage: AddedStage) -> np.ndarray:
    """The utterance with `added` (T,) over all of it."""
    factor = gain(utterance.power, power(added), _snr(utterance, stage))
    return utterance.waveform + np.float32(factor) * added


def _add_part(utterance: Utterance, source: np.ndarray, stage: AddedStage, max_part: float) -> np.ndarray:
    """The utterance with a part of `source` over a part of it; the ratio is that of the wholes."""
    samples, rng = len(utterance.waveform), utterance.rng
    factor = gain(utterance.power, power(source), _snr(utterance, stage))
    length = int(rng.integers(min(int(max_part * samples), len(source)) + 1))
    taken, placed = int(rng.integers(len(source) - length + 1)), int(rng.integers(samples - length + 1))
    mixed = utterance.waveform.copy()
    mixed[placed : placed + length] += np.float32(factor) * source[taken : taken + length]
    return mixed


def open_augmenter(
    options: AugmentConfig, noise: str | None, rirs: str | None, speech: Manifest | JoinedManifest
) -> Augmenter | None:
    """The augmentation of a run, None where no stage is on.

    `noise` and `rirs` are `data.noise` and `data.rirs`; `speech` lists the training utterances. Raises AugmentError or
    ManifestError, naming the field, where files that a stage needs are missing.
    """
    stages, clips = options.stages(), {}
    if "reverberation" in stages:
        clips["reverberation"] = open_responses(rirs, "augment.reverberation")
    if "noise" in stages:
        clips["noise"] = open_clips(noise, "data.noise", "augment.noise")
    if "babble" in stages:
        if len(speech) < 2:
            raise AugmentError(
                "augment.babble: the training data have one utterance and no other to add; use more data"
            )
        clips["babble"] = Clips(speech, "data.dir")
    return Augmenter(options, clips) if stages else None
