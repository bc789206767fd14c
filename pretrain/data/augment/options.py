"""The `augment` block of a recipe: which stages alter the training waveforms, how often and how much."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pretrain.errors import UserError

MAX_SNR_DB = 100  # beyond it either signal is lost in the other's rounding


class AugmentError(UserError):
    """An augmentation that cannot be carried out: "<field>: <what>; <what to do>"."""


@dataclass
class Stage:
    """`prob` is the probability that the stage is applied to an example."""

    prob: float

    def check(self, where: str) -> None:
        """Raises AugmentError, naming a field of the block `where`, for values that have no meaning."""
        if not 0 < self.prob <= 1:
            raise AugmentError(f"{where}.prob: {self.prob:g} is not in (0, 1]; set {where} to null to switch it off")


@dataclass
class Reverberation(Stage):
    """Convolution with a random impulse response of `data.rirs`; alignment and energy of the utterance are kept."""


@dataclass
class AddedStage(Stage):
    """Something is added at an energy ratio drawn uniformly from `snr_db` [lowest, highest], in dB.

    The ratio is the mean power of the whole utterance over the mean power of what is added.
    """

    snr_db: list[float]

    def check(self, where: str) -> None:
        """As `Stage.check`."""
        super().check(where)
        if len(self.snr_db) != 2 or not -MAX_SNR_DB <= self.snr_db[0] <= self.snr_db[1] <= MAX_SNR_DB:
            raise AugmentError(
                f"{where}.snr_db: {self.snr_db} is not [lowest, highest] in dB; give two numbers from -{MAX_SNR_DB} to "
                f"{MAX_SNR_DB}"
            )


@dataclass
class Mixing(AddedStage):
    """A part of another utterance of the same micro-batch is added to a part of the utterance.

    The length of the part is uniform between 0 and `max_part` (at most 0.5) of the utterance; where it begins is
    uniform in both utterances. The ratio compares whole utterances, so the part itself may be louder or softer.
    """

    max_part: float = 0.5

    def check(self, where: str) -> None:
        """As `Stage.check`."""
        super().check(where)
        if not 0 < self.max_part <= 0.5:
            raise AugmentError(
                f"{where}.max_part: {self.max_part:g} is not in (0, 0.5]; beyond half of the utterance nothing tells "
                "which of the two is the primary one"
            )


@dataclass
class Babble(AddedStage):
    """The sum of other utterances of the training data is added over the whole utterance.

    Their number is uniform between the two entries of `talkers`; each is brought to the same power first.
    """

    talkers: list[int]

    def check(self, where: str) -> None:
        """As `Stage.check`."""
        super().check(where)
        if len(self.talkers) != 2 or not 1 <= self.talkers[0] <= self.talkers[1]:
            raise AugmentError(f"{where}.talkers: {self.talkers} is not [fewest, most]; give two positive numbers")


@dataclass
class Noise(AddedStage):
    """A random piece of a random file of `data.noise` is added.

    Over the whole utterance, where shorter files are repeated; or, with `max_part`, over a part whose length is uniform
    between 0 and this share of the utterance, and at most the length of the file. The power of the noise is then that
    of a piece as long as the utterance, or of the whole file where it is shorter, and not that of the part.
    """

    max_part: float | None = None

    def check(self, where: str) -> None:
        """As `Stage.check`."""
        super().check(where)
        if self.max_part is not None and not 0 < self.max_part <= 1:
            raise AugmentError(f"{where}.max_part: {self.max_part:g} is not in (0, 1]; null is the whole utterance")


@dataclass
class WhiteNoise(AddedStage):
    """Gaussian noise, independent from sample to sample, is added over the whole utterance."""


@dataclass
class AugmentConfig:
    """Stages in the order in which they are applied; those that are null are off.

    The order is that of the way from a mouth to a file: the room colours the speech, other talkers and noises are
    recorded with it, and white noise stands for the recorder. Every energy ratio refers to the power of the utterance
    itself, which reverberation keeps, and not to the power of what earlier stages have made of it.

    Without `exclusive` each stage is drawn by itself; with it at most one stage alters an example: the probabilities
    then add up to at most 1, and what is left stays clean.
    """

    exclusive: bool = False
    reverberation: Reverberation | None = None
    mixing: Mixing | None = None
    babble: Babble | None = None
    noise: Noise | None = None
    white_noise: WhiteNoise | None = None

    def __post_init__(self) -> None:
        for name, stage in self.stages().items():
            stage.check(f"augment.{name}")
        total = sum(stage.prob for stage in self.stages().values())
        if self.exclusive and total > 1 + 1e-9:
            raise AugmentError(
                f"augment.exclusive: the probabilities of the stages add up to {total:g}; lower them to 1 in all, or "
                "set augment.exclusive to false"
            )

    def stages(self) -> dict[str, Stage]:
        """The stages that are on, by name, in the order in which they are applied."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "exclusive"}
        return {name: stage for name, stage in named.items() if stage is not None}
