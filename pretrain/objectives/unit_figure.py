"""The picture that TensorBoard shows at validation."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from pretrain.features.mel import log_mel


def unit_figure(waveform: Tensor, mask: Tensor, targets: Tensor, predictions: Tensor) -> Figure:
    """Log-mel of (T,) `waveform` with the hidden frames shaded, above (F,) target and predicted units.

    Predictions are green where they hit the target and red where they miss; frames without a target are left out.
    """
    figure = Figure(figsize=(12, 5), layout="constrained")
    spectrogram, units = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1])
    mel = log_mel(waveform).numpy()
    seconds = len(waveform) / 16_000
    spectrogram.imshow(mel.T, origin="lower", aspect="auto", extent=(0, seconds, 0, mel.shape[1]))
    frame_seconds = seconds / len(mask)
    times = (np.arange(len(mask)) + 0.5) * frame_seconds
    for time in times[mask.numpy()]:
        spectrogram.axvspan(time - frame_seconds / 2, time + frame_seconds / 2, color="white", alpha=0.6, lw=0)
    spectrogram.set(ylabel="mel band", title="hidden frames in white")
    scored = targets.numpy() >= 0
    hit = (predictions == targets).numpy()
    units.scatter(times[scored], targets.numpy()[scored], marker="_", color="black", label="target", s=30)
    for name, chosen, colour in (("right", scored & hit, "tab:green"), ("wrong", scored & ~hit, "tab:red")):
        units.scatter(times[chosen], predictions.numpy()[chosen], marker=".", color=colour, label=name, s=14)
    units.set(xlabel="seconds", ylabel="unit")
    units.legend(loc="upper right", ncols=3)
    return figure
