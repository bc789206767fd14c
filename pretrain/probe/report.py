"""What a probe found, as Markdown, JSON and a bar chart per layer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pretrain.files import new_file

BASELINE, UNTRAINED, UPSTREAM = "baseline", "untrained", "upstream"


@dataclass(frozen=True)
class Score:
    """One probe. `kind` is baseline, untrained or upstream; `accuracy` over all `scored` rows, `speech_accuracy` over
    those whose label is no silence (None: no such thing in this task); `majority` the share of the commonest label.
    """

    kind: str
    name: str
    dim: int
    accuracy: float
    speech_accuracy: float | None
    majority: float
    trained: int
    scored: int
    epochs: int
    layer_weights: list[float] | None = None


@dataclass(frozen=True)
class UnitScore:
    """Units against phones, over all frames and over speech frames; `rate_hz` units per second.

    Of `clusters` units `used` appear; `perplexity` is that of their frequencies.
    """

    name: str
    clusters: int
    rate_hz: float
    frames: int
    used: int
    perplexity: float
    phone_purity: float
    cluster_purity: float
    pnmi: float
    speech_phone_purity: float
    speech_cluster_purity: float
    speech_pnmi: float


@dataclass
class Report:
    """`classes` are the label names; hours count labelled utterances; `options` is the command line, typed."""

    upstream: str
    task: str
    classes: list[str]
    train_hours: float
    valid_hours: float
    options: dict[str, Any]
    scores: list[Score] = field(default_factory=list)
    units: list[UnitScore] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wall_seconds: float = 0.0

    def best(self) -> Score:
        """The best single layer of the upstream."""
        layers = [score for score in self.scores if score.kind == UPSTREAM and score.layer_weights is None]
        return max(layers, key=lambda score: score.accuracy)

    def markdown(self) -> str:
        """A title, the table of probes, the table of units where there are any, and the notes."""
        best = self.best()
        lines = [
            f"## {self.task} probe of {self.upstream}",
            "",
            f"Linear, {len(self.classes)} classes; trained on {self.train_hours:.2f} h ({best.trained} rows), scored "
            f"on {self.valid_hours:.2f} h ({best.scored} rows). Commonest class: {best.majority:.3f}.",
            "",
            *_table(["input", "width", *self._columns()], [self._cells(score, score is best) for score in self.scores]),
        ]
        if self.units:
            names = ["phone purity", "cluster purity", "PNMI"]
            header = ["units", "clusters", "used", "perplexity", "Hz", *names, *(f"{name}, speech" for name in names)]
            lines += ["", *_table(header, [_unit_cells(unit) for unit in self.units])]
        lines += ["", *self.notes] if self.notes else []
        return "\n".join(lines) + "\n"

    def _columns(self) -> list[str]:
        return ["accuracy, all frames", "accuracy, speech frames"] if self.task == "phone" else ["accuracy"]

    def _cells(self, score: Score, best: bool) -> list[str]:
        values = [score.accuracy] if score.speech_accuracy is None else [score.accuracy, score.speech_accuracy]
        numbers = [f"**{value:.3f}**" if best else f"{value:.3f}" for value in values]
        name = score.name if score.kind == BASELINE else f"{score.kind}, {score.name}"
        return [name, str(score.dim), *numbers]


def _unit_cells(unit: UnitScore) -> list[str]:
    values = (unit.phone_purity, unit.cluster_purity, unit.pnmi)
    speech = (unit.speech_phone_purity, unit.speech_cluster_purity, unit.speech_pnmi)
    size = [str(unit.clusters), str(unit.used), f"{unit.perplexity:.1f}", f"{unit.rate_hz:g}"]
    return [unit.name, *size, *(f"{value:.3f}" for value in (*values, *speech))]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table whose columns line up in plain text too."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in (header, *rows)
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _figure(report: Report) -> Any:
    """Bars per layer, trained beside untrained, with the baselines as lines; one panel per kind of accuracy."""
    from matplotlib.figure import Figure

    measures = [("accuracy", "all frames"), ("speech_accuracy", "speech frames")]
    measures = measures if report.task == "phone" else [("accuracy", "utterances")]
    bars = {kind: [score for score in report.scores if score.kind == kind] for kind in (UPSTREAM, UNTRAINED)}
    shown = {kind: scores for kind, scores in bars.items() if scores}
    names = [score.name.removeprefix("layer ") for score in bars[UPSTREAM]]
    figure = Figure(figsize=(max(5.5, 0.5 * len(names) + 2.5) * len(measures), 4.8), layout="constrained")
    axes = figure.subplots(1, len(measures), squeeze=False)[0]
    width = 0.8 / len(shown)
    for axis, (measure, title) in zip(axes, measures, strict=True):
        for i, (kind, scores) in enumerate(shown.items()):
            places = [names.index(score.name.removeprefix("layer ")) + (i + 0.5) * width - 0.4 for score in scores]
            values = [getattr(score, measure) for score in scores]
            axis.bar(places, values, width, label=kind, color=("tab:blue", "lightgrey")[i])
        for i, score in enumerate(score for score in report.scores if score.kind == BASELINE):
            style = ("--", "-.", ":")[i % 3]
            axis.axhline(getattr(score, measure), color=f"C{i + 1}", linestyle=style, label=score.name)
        axis.set(xlabel="layer", ylabel=f"accuracy, {title}", title=title, ylim=(0, 1), xlim=(-0.6, len(names) - 0.4))
        axis.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
        axis.grid(axis="y", alpha=0.3)
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=3)
    figure.suptitle(f"Linear {report.task} probe of {report.upstream}")
    return figure


def write_report(report: Report, output: Path) -> list[Path]:
    """Write probe.json, probe.md and probe.png into `output`, each by renaming a finished file. Returns their paths."""
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / name for name in ("probe.json", "probe.md", "probe.png")]
    contents = (json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n", report.markdown())
    for path, content in zip(paths[:2], contents, strict=True):
        with new_file(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    with new_file(paths[2]) as temporary:
        _figure(report).savefig(temporary, dpi=120, format="png")
    return paths
