"""What a person reads of paired runs: a Markdown page with its pictures, the same in HTML, and JSON."""

import base64
import dataclasses
import datetime
import html
import math
from collections.abc import Sequence
from typing import Any

import keras
import markdown
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from apps import figures
from apps.paired_runs import Result
from tfhalf import equivalence, processor, reporting

Pair = tuple[Result, Result]
# Not scores but what they are counted from.
_COUNTS = {"total", "correct"}
_COLOURS = {"float32": "tab:blue", "half": "tab:orange"}
_STYLE = (
    "body{font-family:sans-serif;max-width:62em;margin:2em auto;padding:0 1em;line-height:1.45}"
    "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #bbb;padding:.25em .6em;text-align:right}"
    "td:first-child,th:first-child{text-align:left}code{background:#f2f2f2}img{max-width:100%}"
)


def scored(scores: dict[str, float]) -> list[str]:
    """Returns the names of a task's scores that are more than counts."""
    return [name for name in scores if name not in _COUNTS]


def margins(pilots: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns each score's margin, of the scores of pilot runs.

    What counts test examples can't differ by less than one of them.
    """
    first = pilots[0]
    one = 1 / first["total"] if "correct" in first else 0.0
    return {
        name: equivalence.margin_of([scores[name] for scores in pilots], one if name == "accuracy" else 0.0)
        for name in scored(first)
    }


@dataclasses.dataclass(frozen=True)
class Report:
    """All that paired runs show.

    Attributes:
        app, metric, half: as in `apps.parity.Study`.
        pairs: results of float32 and half, by the same seeds.
        margins: the metrics' margins, where they come from, and when they were stated.
        command: that makes it again.
        verdicts: of each score that has a margin above 0.
    """

    app: str
    metric: str
    half: str
    pairs: list[Pair]
    margins: dict[str, Any]
    command: str
    verdicts: dict[str, equivalence.Verdict]

    @classmethod
    def of(cls, app, metric, half, pairs: list[Pair], margins: dict[str, Any], command: str) -> "Report":
        """Judges the pairs.

        Raises:
            ValueError: a run in float32 failed.
        """
        verdicts = {}
        for name, margin in margins["metrics"].items():
            scores = [[one.scores.get(name, math.nan) for one in side] for side in zip(*pairs, strict=True)]
            if margin > 0:
                verdicts[name] = equivalence.parity(*scores, margin)
        return cls(app, metric, half, pairs, margins, command, verdicts)

    @property
    def speed(self) -> tuple[float, float, float]:
        """Seconds an epoch, half divided by float32, within pairs: median, lowest, highest; NaN where unknown.

        Of pairs that were made beside each other: a machine isn't the same at another time.
        """
        ratios = [half.epoch_seconds / true.epoch_seconds for true, half in self._whole if half.is_beside(true)]
        return (float(np.median(ratios)), min(ratios), max(ratios)) if ratios else (math.nan,) * 3

    @property
    def memory(self) -> float:
        """Largest resident set, half divided by float32: median within pairs."""
        return float(
            np.median([half.peak_memory_bytes / true.peak_memory_bytes for true, half in self._whole] or [math.nan])
        )

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped in all half runs."""
        return sum(half.skipped_steps for _, half in self.pairs)

    @property
    def _whole(self) -> list[Pair]:
        return [(true, half) for true, half in self.pairs if not half.reason]

    def means(self, name: str) -> list[str]:
        """Returns a score's mean and standard deviation, of float32 and of half."""
        sides = [[one.scores[name] for one in side if one.scores] for side in zip(*self.pairs, strict=True)]
        return [f"{np.mean(side):.4f} ± {np.std(side, ddof=1):.4f}" if len(side) > 1 else "" for side in sides]

    def summary(self) -> str:
        """Returns what matters in a few lines."""
        median, low, high = self.speed
        time = f"an epoch takes {median:.3f} times as long ({low:.3f} to {high:.3f})"
        if np.isnan(median):
            time = "times can't be compared"
        return "\n".join(
            [
                f"{self.app}, {self.half} against float32, {self.metric}:",
                f"  {self.verdicts[self.metric]}",
                f"  {time}, memory {self.memory:.3f}, {self.skipped_steps} steps skipped in all",
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """Returns all of it but the curves as plain JSON values."""
        runs = [
            {"policy": one.run.policy, "seed": one.run.seed, "scores": one.scores, "failed": one.reason}
            | {"epoch_seconds": one.epoch_seconds, "peak_memory_bytes": one.peak_memory_bytes}
            | {"skipped_steps": one.skipped_steps}
            for pair in self.pairs
            for one in pair
        ]
        value = {"app": self.app, "metric": self.metric, "half": self.half, "margins": self.margins}
        verdicts = {
            name: dataclasses.asdict(verdict) | {"more_seeds": verdict.more_seeds}
            for name, verdict in self.verdicts.items()
        }
        about = {"command": self.command, "machine": _machine(), "verdicts": verdicts, "runs": runs}
        return reporting.plain(value | about)

    def to_markdown(self, picture: str) -> str:
        """Returns the page.

        Args:
            picture: name of the file beside it that `pictures` draws, as "mixed_float16.png".
        """
        verdict, (median, low, high) = self.verdicts[self.metric], self.speed
        time = (
            f"An epoch in half takes {median:.3f} times as long as in float32 (median within pairs, {low:.3f} to "
            f"{high:.3f}; of twins that were made beside each other, each on its share of the cores)."
        )
        if np.isnan(median):
            time = "Times can't be compared: no twins of several epochs were made beside each other."
        stated = f"stated {self.margins['stated']}, before the runs that are judged: {self.margins['source']}"
        parts = [
            f"# {self.app}: {self.half} against float32",
            f"By {self.metric} {str(verdict).replace(verdict.kind, f'**{verdict.kind}**', 1)}.",
            f"Margins: {stated}. `{self.command}`; {_machine()}, {datetime.date.today()}.",
            self._metrics(),
            "Equivalent: the 90% interval lies within the margins (two one-sided tests at 5%); different: outside of "
            "them; else undecided. The verdict is the first metric's; the others are there to be seen, and several "
            "tests find more by chance than one.",
            f"{time} The process in half has {self.memory:.3f} times the memory; {self.skipped_steps} steps were "
            "skipped in all.",
            f"![differences by seed, and curves]({picture})",
            self._runs(),
        ]
        return "\n\n".join(parts) + "\n"

    def _metrics(self) -> str:
        rows = []
        for name in sorted(self.verdicts, key=lambda name: name != self.metric):
            verdict = self.verdicts[name]
            interval = f"{verdict.low:+.4f} to {verdict.high:+.4f}"
            rows.append(
                [name, *self.means(name), f"{verdict.difference:+.4f}", interval, f"{verdict.margin:.4f}", verdict.kind]
            )
        header = ["metric", "float32", self.half, "difference", "its 90% interval", "margin", "verdict"]
        return figures.to_table(header, rows)

    def _runs(self) -> str:
        rows = []
        for true, half in self.pairs:
            scores = [one.scores.get(self.metric, math.nan) for one in (true, half)]
            seconds = [f"{one.epoch_seconds:.2f}" for one in (true, half)]
            memory = [f"{one.peak_memory_bytes / 2**30:.2f}" for one in (true, half)]
            told = [half.reason] if half.reason else [str(half.skipped_steps)]
            difference = f"{scores[1] - scores[0]:+.4f}"
            rows.append(
                [str(true.run.seed), *(f"{score:.4f}" for score in scores), difference, *seconds, *memory, *told]
            )
        sides = [f"{what}, {side}" for what in ("s an epoch", "GiB") for side in ("float32", "half")]
        return figures.to_table(
            ["seed", f"{self.metric}, float32", "half", "difference", *sides, "skipped steps"], rows
        )

    def pictures(self) -> dict[str, bytes]:
        """Draws differences by seed and the curves; PNG pictures by the end of their files' names."""
        names = [name for name in self.pairs[0][0].epochs[0] if name.startswith("val_") or name == "loss"][:5]
        figure = Figure(figsize=(4 * (len(names) + 1), 3.6), dpi=90, layout="constrained")
        first, *others = figure.subplots(1, len(names) + 1)
        self._draw_differences(first)
        for axis, name in zip(others, names, strict=True):
            for side, policy in enumerate(_COLOURS):
                for pair in self.pairs:
                    curve = [epoch.get(name, math.nan) for epoch in pair[side].epochs]
                    axis.plot(range(1, len(curve) + 1), curve, color=_COLOURS[policy], alpha=0.6, linewidth=1)
                axis.plot([], [], color=_COLOURS[policy], label=policy if policy == "float32" else self.half)
            axis.set(xlabel="epoch", title=name)
            axis.legend(fontsize=8)
        return {".png": figures.to_png(figure)}

    def _draw_differences(self, axis) -> None:
        verdict = self.verdicts[self.metric]
        axis.axhspan(-verdict.margin, verdict.margin, color="tab:green", alpha=0.15, label="margin")
        axis.axhline(0, color="black", linewidth=0.6)
        points = [(true.run.seed, half.scores[self.metric] - true.scores[self.metric]) for true, half in self._whole]
        axis.plot(*zip(*points, strict=True), "o", color=_COLOURS["half"]) if points else None
        middle = len(self.pairs) + 0.5
        error = [[verdict.difference - verdict.low], [verdict.high - verdict.difference]]
        axis.errorbar([middle], [verdict.difference], yerr=error, fmt="s", color="black", capsize=4, label="mean, 90%")
        axis.set(xlabel="seed", title=f"{self.metric}: half - float32")
        axis.legend(fontsize=8)


def _machine() -> str:
    cpu = processor.this()
    return f"{cpu.name}, {cpu.cores} cores, TensorFlow {tf.__version__}, Keras {keras.__version__}"


def to_html(text: str, pictures: dict[str, bytes]) -> str:
    """Returns a page in Markdown as one HTML file that holds its pictures.

    Args:
        text: Markdown; a heading first.
        pictures: PNG by the name that the text calls it.
    """
    body = markdown.markdown(text, extensions=["tables"])
    for name, picture in pictures.items():
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{base64.b64encode(picture).decode()}"')
    title = html.escape(text.splitlines()[0].lstrip("# "))
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'
