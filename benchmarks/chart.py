"""A chart of the contenders' medians, as PNG."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.measuring import Estimate

_COLOURS = {"Keras": "#9aa5b1", "tfhalf": "#1f6fb4", "Grappler": "#c9a227", "PyTorch": "#d1603d"}


def write(path: str, title: str, milliseconds: dict[str, Estimate]) -> None:
    """Writes horizontal bars with their 95% intervals, in the order given, from the top."""
    figure = Figure(figsize=(9, 1.4 + 0.42 * len(milliseconds)), layout="constrained")
    axes = figure.add_subplot()
    names, values = list(milliseconds), list(milliseconds.values())
    medians = [value.median for value in values]
    errors = [[value.median - value.low for value in values], [value.high - value.median for value in values]]
    colours = [_COLOURS[name.split()[0]] for name in names]
    axes.barh(names, medians, xerr=errors, color=colours, error_kw={"capsize": 3, "linewidth": 1})
    for row, value in enumerate(values):
        axes.annotate(
            f"{value.median:,.0f}" if value.median >= 100 else f"{value.median:.1f}",
            (value.high, row),
            (5, 0),
            textcoords="offset points",
            va="center",
        )
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("ms, median and its 95% interval; less is better")
    axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(path)
