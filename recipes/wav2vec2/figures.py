"""The picture that TensorBoard shows at validation."""

from __future__ import annotations

from matplotlib.figure import Figure
from torch import Tensor


def similarity_figure(similarity: Tensor, codes: Tensor) -> Figure:
    """Cosines (K, K) of predictions (rows) and targets of one utterance's masked frames, over their (K, G) codes.

    Trained, the diagonal stands out; a codebook that has collapsed shows one flat line per group.
    """
    figure = Figure(figsize=(7, 8), layout="constrained")
    cosines, chosen = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    image = cosines.imshow(similarity.numpy(), aspect="auto", vmin=-1, vmax=1, cmap="RdBu_r")
    figure.colorbar(image, ax=cosines, label="cosine")
    cosines.set(ylabel="prediction at masked frame", title="predictions against targets")
    for group, line in enumerate(codes.T.numpy()):
        chosen.plot(line, ".", markersize=3, label=f"group {group}")
    chosen.set(xlabel="target at masked frame", ylabel="code")
    chosen.legend(loc="upper right", ncols=codes.shape[1])
    return figure
