"""The picture that TensorBoard shows at validation."""

from __future__ import annotations

from matplotlib.figure import Figure
from torch import Tensor

from pretrain.features.mel import log_mel


def prediction_figure(waveform: Tensor, probabilities: Tensor, stride_samples: int) -> Figure:
    """Log-mel of (T,) `waveform` above (K, W) `probabilities` of the true frame k + 1 steps after each context."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    spectrogram, steps = figure.subplots(2, 1, sharex=True)
    mel = log_mel(waveform).numpy()
    spectrogram.imshow(mel.T, origin="lower", aspect="auto", extent=(0, len(waveform) / 16_000, 0, mel.shape[1]))
    spectrogram.set(ylabel="mel band")
    extent = (0, probabilities.shape[1] * stride_samples / 16_000, 0.5, len(probabilities) + 0.5)
    image = steps.imshow(probabilities.numpy(), origin="lower", aspect="auto", extent=extent, vmin=0, vmax=1)
    steps.set(xlabel="seconds", ylabel="steps ahead", title="probability of the true frame")
    figure.colorbar(image, ax=steps)
    return figure
