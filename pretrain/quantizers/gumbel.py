"""The product quantizer of wav2vec 2.0 and vq-wav2vec: entries chosen by a Gumbel-softmax, straight through.

Source: arXiv 1910.05453, section 3.1, and arXiv 2006.11477, section 2; `fairseq/modules/gumbel_vector_quantizer.py`.
Letters: N frames, G groups, V entries per group, E = vq_dim / G numbers per entry.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.config import ConfigError
from pretrain.errors import UserError
from pretrain.models.kernels import Linear

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class Quantized(NamedTuple):
    """`vectors` (N, vq_dim) float32, the chosen entries of all groups side by side; `codes` (N, G) int64, which entries
    these are; `prob_perplexity` () float32 with gradient, between G and G * V: how many entries the softmax uses on
    average, summed over groups; `counts` (G, V) float32, how often each entry is the likeliest (noise left out).
    """

    vectors: Tensor
    codes: Tensor
    prob_perplexity: Tensor
    counts: Tensor

    def entries(self) -> Tensor:
        """(N,) int64: one number per combination of codes, equal exactly where the vectors are."""
        numbers = self.codes[:, 0]
        for codes in self.codes.unbind(1)[1:]:
            numbers = numbers * self.counts.shape[1] + codes
        return numbers


class GumbelVectorQuantizer(nn.Module):
    """Picks, in each of `groups` groups, one of `num_vars` learned entries for every frame.

    Training draws from softmax((logits + Gumbel noise) / `temperature`): the forward pass sees the chosen entry, the
    logits get the gradient of the soft mixture. Evaluation takes the likeliest entry. All of it is float32.

    `depth` 1 computes the logits with one projection (wav2vec 2.0), more with hidden layers of `2 * dim`
    before it (vq-wav2vec: 2). With `combine_groups` all groups choose from one codebook.
    """

    def __init__(
        self,
        dim: int,
        num_vars: int,
        groups: int,
        vq_dim: int,
        combine_groups: bool = False,
        depth: int = 1,
        activation: str = "gelu",
    ) -> None:
        """Raises UserError where `vq_dim` does not divide into `groups`."""
        super().__init__()
        if vq_dim % groups:
            raise UserError(f"vq_dim: {vq_dim} does not divide into {groups} groups; change one of them")
        self.num_vars, self.groups, self.combine_groups = num_vars, groups, combine_groups
        self.temperature = 1.0
        codebooks = 1 if combine_groups else groups
        self.vars = nn.Parameter(torch.empty(1, codebooks * num_vars, vq_dim // groups).uniform_())
        if depth == 1:
            self.weight_proj: nn.Module = Linear(dim, groups * num_vars)
            nn.init.normal_(self.weight_proj.weight, mean=0.0, std=1.0)
            nn.init.zeros_(self.weight_proj.bias)
        else:
            widths = [dim] + [2 * dim] * (depth - 1)
            hidden = [
                nn.Sequential(Linear(width, wider), ACTIVATIONS[activation]()) for width, wider in pairwise(widths)
            ]
            self.weight_proj = nn.Sequential(*hidden, Linear(widths[-1], groups * num_vars))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Quantized:
        """(N, dim) frames to their entries.

        `noise` (N, G, V) takes the place of the Gumbel noise that training draws; evaluation uses none.
        """
        with torch.autocast(x.device.type, enabled=False):
            logits = self.weight_proj(x.float()).view(len(x), self.groups, self.num_vars)
            likeliest = logits.detach().argmax(-1)
            entries = self.vars.view(-1, self.num_vars, self.vars.shape[-1]).expand(self.groups, -1, -1)
            if self.training:
                noise = gumbel_noise(logits) if noise is None else noise
                soft = ((logits + noise) / self.temperature).softmax(-1)
                codes = soft.detach().argmax(-1)
                # A mixture with weights of zero: adds nothing to the entry, but carries its gradient to the logits.
                # So the forward pass has no rounding of (hard - soft) + soft, and equal codes give equal vectors.
                mixture = torch.einsum("ngv,gve->nge", soft - soft.detach(), entries.detach())
                vectors = (self._lookup(entries, codes) + mixture).flatten(1)
            else:
                codes = likeliest
                vectors = self._lookup(entries, codes).flatten(1)
            return Quantized(vectors, codes, prob_perplexity(logits), self._counts(likeliest))

    def _lookup(self, entries: Tensor, codes: Tensor) -> Tensor:
        """The entries (N, G, E) of `codes` (N, G), from (G, V, E)."""
        return entries[torch.arange(self.groups, device=codes.device), codes]

    def _counts(self, codes: Tensor) -> Tensor:
        """Histograms (G, V) of (N, G) codes, without asking the device for a maximum as bincount does."""
        counts = torch.zeros(self.groups, self.num_vars, device=codes.device)
        return counts.scatter_add_(1, codes.T, torch.ones_like(codes.T, dtype=counts.dtype))


def prob_perplexity(logits: Tensor) -> Tensor:
    """Perplexity of the softmax of (N, G, V) logits averaged over frames, summed over groups: () between G and G * V.

    1e-7 inside the logarithm is fairseq's.
    """
    mean = logits.float().softmax(-1).mean(0)
    return torch.exp(-(mean * torch.log(mean + 1e-7)).sum(-1)).sum()


def gumbel_noise(like: Tensor) -> Tensor:
    """Standard Gumbel noise of the shape of `like`, in its type, from torch's generator."""
    return -torch.empty_like(like).exponential_().log()


def temperature_at(update: int, start: float, end: float, decay: float) -> float:
    """The temperature after `update` optimiser updates: `start * decay^update`, never below `end`."""
    return max(start * decay**update, end)


def check_codebook(latent_temp: list[float], latent_groups: int, latent_dim: int) -> None:
    """Raises ConfigError, naming the option, where a method's codebook or its temperature cannot be built."""
    if len(latent_temp) != 3:
        raise ConfigError(f"method.latent_temp: {latent_temp}; state start, end and decay")
    if latent_dim % latent_groups:
        raise ConfigError(f"method.latent_dim: {latent_dim} does not divide into {latent_groups} groups; change one")
