"""Pictures that methods which predict features share: spectrograms under each other, and the error of each band."""

from __future__ import annotations

from matplotlib.figure import Figure
from torch import Tensor


def spectrogram_figure(panels: dict[str, Tensor], frame_seconds: float = 0.01) -> Figure:
    """One image per (F, D) panel, time in seconds to the right and bands upwards, in one scale of colours per width."""
    figure = Figure(figsize=(12, 2.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    images = {name: panel.detach().float().cpu().T.numpy() for name, panel in panels.items()}
    scales: dict[int, tuple[float, float]] = {}
    for image in images.values():
        low, high = scales.get(len(image), (image.min(), image.max()))
        scales[len(image)] = (min(low, image.min()), max(high, image.max()))
    for axis, (name, image) in zip(axes, images.items(), strict=True):
        bands, frames = image.shape
        low, high = scales[bands]
        extent = (0, frames * frame_seconds, 0, bands)
        axis.imshow(image, origin="lower", aspect="auto", extent=extent, vmin=low, vmax=high)
        axis.set(title=name, ylabel="band")
    axes[-1].set(xlabel="seconds")
    return figure


def band_error_figure(errors: dict[str, Tensor]) -> Figure:
    """One line per predictor: its mean absolute error (D,) in each band."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for name, values in errors.items():
        axis.plot(values.detach().float().cpu().numpy(), label=name)
    axis.set(xlabel="band", ylabel="mean absolute error", ylim=(0, None))
    axis.legend()
    return figure


def band_errors(predictions: Tensor, targets: Tensor, elements: Tensor | None = None) -> Tensor:
    """(D,) mean absolute error per band of (N, D), over the elements that `elements` (N, D) bool marks, or all."""
    errors = (predictions.float() - targets.float()).abs()
    if elements is None:
        return errors.mean(0)
    return (errors * elements).sum(0) / elements.sum(0)
