"""Discrete BERT's configuration, batches and loss: masked language modelling over speech tokens.

Source: arXiv 1910.05453, section 4; `fairseq/tasks/masked_lm.py`, `fairseq/criterions/masked_lm.py`.
Letters: B rows, L tokens of the longest row with <s> and </s>, N predicted tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import ConfigError
from pretrain.data.labels import LabelError
from pretrain.labelling.tokens.dictionary import TokenDictionary
from pretrain.labelling.tokens.tokenizer import Tokenizer, build_tokenizer, load_tokenizer, tokenizer_of
from pretrain.losses.masked_prediction import class_histogram, prediction_loss
from pretrain.method import (
    Batch,
    CollatorDefaults,
    Counts,
    Example,
    LabelSource,
    Method,
    Ratio,
    StepOutput,
    TargetInfo,
    TargetSpec,
)
from pretrain.models.kernels import LayerNorm, Linear, linear
from pretrain.objectives.collate import Stacked, silent_waveforms
from recipes.discrete_bert.encoder import (
    BOS,
    EOS,
    PAD,
    SPECIALS,
    UNK,
    DiscreteBertEncoder,
    DiscreteBertEncoderConfig,
    TokenizerConfig,
    init_bert,
)
from recipes.discrete_bert.masking import TokenMask

# The classes of a token directory are <unk> and the pairs: the vocabulary without <s>, <pad>, </s> and <mask>.
NO_CLASSES = 4
TOKENS = "tokens"  # the target
MFCC_CLUSTERS = 100  # at most, on the embedded sample


@dataclass
class DiscreteBertConfig:
    """Published hyper-parameters; see `TokenMask` for those of the masks."""

    name: str
    encoder: DiscreteBertEncoderConfig
    mask_prob: float
    mask_multiple_length: int
    mask_stdev: float
    leave_unmasked_prob: float
    random_token_prob: float

    @property
    def token_mask(self) -> TokenMask:
        return TokenMask(
            self.mask_prob,
            self.mask_multiple_length,
            self.mask_stdev,
            self.leave_unmasked_prob,
            self.random_token_prob,
        )


@dataclass(frozen=True)
class DiscreteBertCollator(CollatorDefaults):
    """Cuts the tokens of a batch and masks them; see `DiscreteBertMethod` for what it puts into `extras`."""

    stride_samples: int
    receptive_field_samples: int
    vocab_size: int
    max_positions: int
    token_mask: TokenMask
    reads_audio: bool = False

    def __call__(self, examples: list[Example]) -> Batch:
        stacked = silent_waveforms(examples)
        tokens = [self._tokens(example) for example in examples]
        selected = [self.token_mask.select(e.rng, len(row)) for e, row in zip(examples, tokens, strict=True)]
        hidden = [
            self.token_mask.hide(example.rng, row, chosen, self.vocab_size)
            for example, row, chosen in zip(examples, tokens, selected, strict=True)
        ]
        return make_batch(
            stacked,
            tokens=tokens,
            hidden=hidden,
            selected=selected,
        )

    def _tokens(self, example: Example) -> np.ndarray:
        """(L,) int64: <s>, the tokens of the crop's frames, </s>. Raises ConfigError where they are too many."""
        frames = max(0, (len(example.waveform) - self.receptive_field_samples) // self.stride_samples + 1)
        first = example.start // self.stride_samples
        inner = np.asarray(cast(np.ndarray, example.targets[TOKENS])[first : first + frames], dtype=np.int64) + UNK
        if len(inner) + 2 > self.max_positions:
            raise ConfigError(
                f"crop.max_seconds: a row of {len(inner) + 2} tokens exceeds method.encoder.max_positions "
                f"({self.max_positions}); lower crop.max_seconds"
            )
        return np.concatenate([[BOS], inner, [EOS]])


def make_batch(
    stacked: Stacked,
    *,
    tokens: list[np.ndarray],
    hidden: list[np.ndarray],
    selected: list[np.ndarray],
) -> Batch:
    """Assemble a batch from rows of tokens (L_b,), of what the network sees of them, and of those it predicts (bool).

    Predicted tokens travel as flat positions b * L + l, so that nothing on the device has to count them.
    """
    counts = [len(row) for row in tokens]
    longest = max(counts)
    inputs = np.full((len(tokens), longest), PAD)
    for place, row in zip(inputs, hidden, strict=True):
        place[: len(row)] = row
    positions = np.concatenate([index * longest + np.flatnonzero(row) for index, row in enumerate(selected)])
    targets = np.concatenate([row[chosen] for row, chosen in zip(tokens, selected, strict=True)])
    extras = {"tokens": inputs, "positions": positions, "targets": targets, "counts": np.array(counts)}
    return stacked.batch(len(targets), extras)


class LanguageModelHead(nn.Module):
    """Hidden states to logits over the vocabulary; the last product is by the embeddings, which the encoder owns."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.dense = Linear(dim, dim)
        self.layer_norm = LayerNorm(dim)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        init_bert(self.dense)

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """(N, D) and (V, D) to (N, V)."""
        return linear(self.layer_norm(F.gelu(self.dense(hidden))), embeddings, self.bias)


class DiscreteBertMethod(Method):
    """RoBERTa over tokens; the loss is cross-entropy at the tokens that the masks selected.

    Reads `batch.extras`: `tokens` (B, L) int64, what the network sees, padded with <pad>; `positions` (N,) flat
    positions and `targets` (N,) tokens of what it predicts; `counts` (B,) tokens of each row.
    """

    Config = DiscreteBertConfig
    config: DiscreteBertConfig
    encoder: DiscreteBertEncoder

    def __init__(self, config: DiscreteBertConfig) -> None:
        super().__init__(config)
        self.encoder = DiscreteBertEncoder(config.encoder)
        self.lm_head = LanguageModelHead(config.encoder.encoder_embed_dim, config.encoder.vocab_size)

    @classmethod
    def targets(cls, config: DiscreteBertConfig) -> list[TargetSpec]:
        """One label set, of the dictionary's pairs and <unk>, made by tools/make_tokens.py; on the sample, k-means on
        MFCC takes the quantizer's place.
        """

        def make(data_dir: Path, output_dir: Path) -> Path:
            from pretrain.labelling.tokens.generate import (
                ensure_kmeans_tokens,  # readers of audio only where tokens are made
            )

            clusters = min(MFCC_CLUSTERS, config.encoder.vocab_size - SPECIALS - 1)
            return ensure_kmeans_tokens(data_dir, output_dir, clusters)

        command = "python tools/make_tokens.py checkpoint=<a trained vq-wav2vec> data.dir={dir}"
        source = LabelSource("tokens by k-means on MFCC", command, make)
        return [TargetSpec(TOKENS, "frames", config.encoder.vocab_size - NO_CLASSES, source=source)]

    @classmethod
    def fit_to_targets(cls, config: DiscreteBertConfig, found: dict[str, TargetInfo]) -> DiscreteBertConfig:
        """Take the vocabulary from the tokens, and the tokenizer from the directory that they lie in.

        Raises LabelError for labels that no tokenizer came with.
        """
        info = found[TOKENS]
        encoder = replace(config.encoder, vocab_size=info.num_classes + NO_CLASSES)
        if info.directory is not None:
            encoder.tokenizer = TokenizerConfig(*tokenizer_of(info.directory))
        return replace(config, encoder=encoder)

    @classmethod
    def collator(cls, config: DiscreteBertConfig) -> DiscreteBertCollator:
        """The collator of this configuration."""
        with torch.device("meta"):
            tokenizer = build_tokenizer(config.encoder.tokenizer.method, config.encoder.tokenizer.encoder)
        return DiscreteBertCollator(
            stride_samples=tokenizer.stride_samples,
            receptive_field_samples=tokenizer.receptive_field_samples,
            vocab_size=config.encoder.vocab_size,
            max_positions=config.encoder.max_positions,
            token_mask=config.token_mask,
        )

    def begin(self, found: dict[str, TargetInfo]) -> None:
        """Load the tokenizer and the dictionary of the token directory.

        Raises LabelError where `init_from` brought another dictionary, since its embeddings would change meaning.
        """
        directory = found[TOKENS].directory
        if directory is None:
            return
        tokenizer = cast(Tokenizer, self.encoder.tokenizer.network)
        dictionary = TokenDictionary.read(directory, *tokenizer.code_shape)
        tokens = torch.from_numpy(dictionary.class_of_number()) + UNK
        known = self.encoder.token_of_number
        if bool((known != UNK).any()) and not torch.equal(known.cpu(), tokens):
            raise LabelError(
                f"{directory}: dict.txt: is not the dictionary that init_from was trained with; make the tokens with "
                "tools/make_tokens.py tokens=<its token directory>"
            )
        known.copy_(tokens)
        load_tokenizer(self.encoder.tokenizer.network, directory)

    def forward(self, batch: Batch) -> StepOutput:
        """Loss in nats per predicted token; `perplexity_bits` is the same in bits, fairseq's `ppl` being 2 to it.

        `labels_perplexity`, of the histogram of the targets, is what a guesser who knows only their shares reaches.
        """
        extras = batch.extras
        hidden = self.encoder.context(extras["tokens"], batch.padded)[-1].flatten(0, 1)
        logits = self.lm_head(hidden.index_select(0, extras["positions"]), self.encoder.embed_tokens.weight)
        targets, vocab_size = extras["targets"], logits.shape[1]
        with torch.autocast(logits.device.type, enabled=False):
            loss, correct = prediction_loss(logits.float(), targets)
        chosen = batch.sample_size
        metrics: dict[str, Ratio | Counts] = {
            "perplexity_bits": Ratio(loss.detach() / math.log(2), chosen),
            "accuracy_masked": Ratio(correct.float(), chosen),
            "masked_share": Ratio(torch.full((), float(chosen), device=loss.device), extras["counts"].sum()),
            "labels": Counts(class_histogram(targets, vocab_size)),
            "predictions": Counts(class_histogram(logits.detach().argmax(-1), vocab_size)),
        }
        return StepOutput(loss, metrics)

    def training_flops(self, samples: int) -> float:
        """RoBERTa, and the head at the tokens that are predicted, as many as if no spans overlapped."""
        tokens = samples // self.encoder.downsample_rates[0] + 2
        dim, vocab_size = self.config.encoder.encoder_embed_dim, self.config.encoder.vocab_size
        head = 3 * 2.0 * self.config.mask_prob * tokens * dim * (dim + vocab_size)
        return self.encoder.training_flops(tokens) + head
