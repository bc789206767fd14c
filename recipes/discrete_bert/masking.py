"""Which tokens are predicted and what stands in their place; drawn on the host from an example's own generator.

Source: `fairseq/data/mask_tokens_dataset.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recipes.discrete_bert.encoder import SPECIALS


@dataclass(frozen=True)
class TokenMask:
    """Spans of `mask_multiple_length` +- `mask_stdev` tokens, `mask_prob` of all if none overlapped.

    Of the tokens in them `leave_unmasked_prob` stay, `random_token_prob` become another, the others <mask>.
    """

    mask_prob: float
    mask_multiple_length: int
    mask_stdev: float
    leave_unmasked_prob: float
    random_token_prob: float

    def select(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """(length,) bool: the tokens that are predicted, <s> and </s> among them."""
        spans = int(self.mask_prob * length / self.mask_multiple_length + rng.random())
        starts = rng.choice(length, size=min(spans, length), replace=False)
        sizes = np.maximum(0, np.rint(rng.normal(self.mask_multiple_length, self.mask_stdev, len(starts)))).astype(int)
        edges = np.zeros(length + 1, dtype=np.int64)
        np.add.at(edges, starts, 1)
        np.add.at(edges, np.minimum(starts + sizes, length), -1)
        return np.cumsum(edges[:-1]) > 0

    def hide(self, rng: np.random.Generator, tokens: np.ndarray, selected: np.ndarray, vocab_size: int) -> np.ndarray:
        """The (L,) tokens with those `selected` hidden; a random token is any but the specials, <mask> included."""
        changed = self.leave_unmasked_prob + self.random_token_prob
        other = selected & (rng.random(len(tokens)) < changed)
        kept = other & (rng.random(len(tokens)) * changed < self.leave_unmasked_prob)
        drawn = other & ~kept
        hidden = np.where(selected & ~other, vocab_size - 1, tokens)
        hidden[drawn] = rng.integers(SPECIALS, vocab_size, size=int(drawn.sum()))
        return hidden
