"""Codebooks that turn frames into entries: chosen by Gumbel-softmax, by nearest neighbour, or at random."""
