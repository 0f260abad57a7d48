"""What a search for float32 islands found: each layer's sensitivity and cost, the plan, as a table, a picture and JSON.

`tfhalf.search` fills it in.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from tfhalf import precision, reporting, twins


@dataclasses.dataclass(frozen=True)
class Trial:
    """A model with some islands, beside its float32 twin; `str()` of it is a line.

    Attributes:
        name: of the metric.
        value: of the metric.
        within: whether metric and gradients are within tolerance.
        gradient: largest relative error of a layer's weight gradients on the worst batch that was looked at, infinite
            where they overflow; None where the metric was enough to refuse it, or there are none.
        layer: the layer that it is of, as in `precision.layers_by_path`.
        scale: the loss scale that the gradients were taken at; None of a dtype that needs none.
        why: why it couldn't be computed; else "".
    """

    name: str
    value: float
    within: bool
    gradient: float | None = None
    layer: str = ""
    scale: float | None = None
    why: str = ""

    def __str__(self) -> str:
        if self.why:
            return f"can't be computed: {self.why}"
        words = f"{self.name} {self.value:.6g}"
        if self.layer:
            words += f", gradients differ by {self.gradient:.2g} ({self.layer})"
            words += f" at a loss scale of 2^{np.log2(self.scale):g}" if self.scale else ""
        return words + ("" if self.within else ": not within tolerance")


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """A layer that may compute in half.

    Attributes:
        path: as in `precision.layers_by_path`.
        forward, backward, rank: as in `sensitivity.Sensitivity`.
        multiply_adds, parameters: of the layer and what is inside it, for the batch that was measured.
        is_island: whether the plan keeps it in float32.
    """

    path: str
    forward: float
    backward: float
    rank: float
    multiply_adds: int
    parameters: int
    is_island: bool


@dataclasses.dataclass(frozen=True)
class Search:
    """What a search found; `str()` of it is a table.

    Attributes:
        plan: the plan, as it was measured.
        metric: the metric's name.
        tolerance: largest difference of the metric from float32's.
        gradient_tolerance: largest relative error of a layer's weight gradients.
        float32, half, with_plan: the float32 twin, the model in half everywhere, and with the plan.
        layers: all that may compute in half, in order, those inside others too.
        evaluations: how many sets of islands were run.
        is_minimal: whether it was shown that no island can be left out; False: the evaluations didn't suffice.
        seconds: median of a pass over a batch in "half", with the "plan", where it has islands, and in "float32"; empty
            where it wasn't timed.
    """

    plan: precision.PrecisionPlan
    metric: str
    tolerance: float
    gradient_tolerance: float
    float32: Trial
    half: Trial
    with_plan: Trial
    layers: list[LayerCost]
    evaluations: int
    is_minimal: bool
    seconds: dict[str, float]

    @property
    def islands(self) -> list[str]:
        """The paths of the layers that the plan keeps in float32."""
        return [one.path for one in self.layers if one.is_island]

    @property
    def share(self) -> float:
        """Share (0 to 1) of the multiply-adds of layers in half that the islands take to float32."""
        total = sum(one.multiply_adds for one in self._outer)
        return sum(one.multiply_adds for one in self.layers if one.is_island) / total if total else 0.0

    @property
    def _outer(self) -> list[LayerCost]:
        """The layers that aren't inside another one of them."""
        outer: list[LayerCost] = []
        for one in self.layers:
            if not any(one.path.startswith(f"{other.path}/") for other in outer):
                outer.append(one)
        return outer

    def to_json(self) -> dict:
        """Returns all of it as plain JSON values."""
        value = dataclasses.asdict(dataclasses.replace(self, plan=None))
        return reporting.plain(value | {"plan": self.plan.to_json(), "islands": self.islands, "share": self.share})

    def picture(self) -> bytes:
        """Draws what each layer loses in half, in the layers' order, with the islands marked: a PNG picture."""
        figure = Figure(figsize=(max(8.0, 3.0 + 0.16 * len(self.layers)), 5), dpi=100, layout="constrained")
        axis = figure.subplots()
        places = np.arange(len(self.layers))
        for phase, color, most in (
            ("forward", "tab:blue", twins.TOLERANCE),
            ("backward", "tab:green", twins.TOLERANCE**0.5),
        ):
            errors = np.array([getattr(one, phase) for one in self.layers])
            finite = np.isfinite(errors)
            axis.plot(places[finite], np.maximum(errors[finite], 1e-7), ".", c=color, label=phase)
            axis.plot(places[~finite], np.full(np.sum(~finite), 10.0), "^", c=color)
            axis.axhline(most, color=color, linewidth=0.8, linestyle="--")
        axis.set_ylabel("relative error of the layer alone in half")
        axis.set_xlabel(
            "layers in order; red: float32 islands; triangle: overflow; dashed: what a whole model may lose"
        )
        mark_layers(axis, [one.path for one in self.layers], self.islands)
        return reporting.png(figure)

    def __str__(self) -> str:
        number = len(self.islands)
        lines = [
            "no float32 island is needed" if not number else f"float32 islands: {', '.join(self.islands)}",
            f"  in float32    {self.float32}",
            f"  in half       {self.half}",
        ]
        lines += [f"  with the plan {self.with_plan}"] if number else []
        lines.append(f"  tolerances    {self.metric} {self.tolerance:.3g}, gradients {self.gradient_tolerance:.2g}")
        minimal = "" if self.is_minimal else "; they didn't suffice to show that no island can be left out"
        lines.append(f"  evaluations   {self.evaluations}{minimal}")
        if number:
            lines.append(f"  islands take  {self.share:.1%} of the multiply-adds of layers in half to float32")
        if self.seconds:
            times = [("half", "half"), *([("plan", "with the plan")] if number else []), ("float32", "float32")]
            told = [f"{1000 * self.seconds[name]:.1f} ms {words}" for name, words in times]
            lines.append(f"  a pass takes  {', '.join(told)}")
        return "\n".join([*lines, "", *self._table()])

    def _table(self) -> list[str]:
        # The islands, then what loses most.
        order = sorted(
            range(len(self.layers)),
            key=lambda index: (not self.layers[index].is_island, -self.layers[index].rank, index),
        )
        shown = [self.layers[index] for index in sorted(order[: twins.MOST_ROWS])]
        width, total = max(len(one.path) for one in shown), sum(one.multiply_adds for one in self._outer)
        lines = [
            f"  {'layer':{width}} {'forward':>8} {'backward':>9} {'multiply-adds':>14} {'share':>7} {'parameters':>11}"
        ]
        for one in shown:
            share = f"{one.multiply_adds / total if total else 0.0:7.1%}"
            numbers = f"{one.forward:8.2g} {one.backward:9.2g} {one.multiply_adds:14,} {share} {one.parameters:11,}"
            lines.append(f"{'>' if one.is_island else ' '} {one.path:{width}} {numbers}")
        if len(self.layers) > len(shown):
            lines.append(f"and {len(self.layers) - len(shown)} more")
        return lines


def mark_layers(axis, paths: Sequence[str], islands: Sequence[str]) -> None:
    """Names the layers along an axis of matplotlib, on a logarithmic scale, and marks the islands in red."""
    for place, path in enumerate(paths):
        if path in islands:
            axis.axvspan(place - 0.5, place + 0.5, color="tab:red", alpha=0.2)
    axis.set_yscale("log")
    axis.set_xticks(range(len(paths)), [path[-32:] for path in paths], rotation=90, fontsize=6)
    axis.legend(fontsize=8)
