"""The half-precision page of TensorBoard: scalars by layer, a layout of charts, and pictures of exponents.

The page is the tab "Custom Scalars". Its first charts sum all layers up, the next ones draw a line for each layer. The
pictures (tab "Images", `half_precision/exponents`) show for each kind of tensor which powers of 2 its values have, all
layers together and layer by layer, beside the ranges of float16 and bfloat16.

Source of the pictures: Micikevicius et al. 2018, figure 3, https://arxiv.org/abs/1710.03740
"""

from pathlib import Path

import numpy as np
import tensorflow as tf
from matplotlib import colors
from matplotlib.figure import Figure
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import summary as custom_scalars
from tensorboard.plugins.scalar import summary_v2 as scalars

from tfhalf import reporting
from tfhalf.exponents import HIGHEST, LOWEST, Statistics
from tfhalf.precision import FORMATS

_SHARES = ("zero", "subnormal", "near_overflow", "non_finite")
# Of one chart or picture; more can't be told apart.
_MOST_ROWS = 60
_FINEST = 1e-5


class Board:
    """Writes events into a folder for TensorBoard.

    Args:
        folder: made if missing.
    """

    def __init__(self, folder: Path):
        self._writer = tf.summary.create_file_writer(str(folder))
        self._has_layout = False

    def write(self, statistics: list[dict], skips: list[dict]) -> None:
        """Adds records of `Monitor`; one event for each.

        Args:
            statistics: with "step", "scale" and "layers": path to kind to `Statistics`.
            skips: with "step", "scale", "layer", "phase" and "what".
        """
        with self._writer.as_default(0):
            if statistics and not self._has_layout:
                self._has_layout = True
                _write(custom_scalars.pb(_layout(statistics[0]["layers"])), 0)
            for record in statistics:
                summary = scalars.scalar_pb(
                    "half_precision/log2_loss_scale", np.log2(max(record["scale"], 2.0 ** FORMATS["float32"].normal))
                )
                for tag, value in _values(record["layers"]).items():
                    summary.MergeFrom(scalars.scalar_pb(tag, value))
                _write(summary, record["step"])
            for skip in skips:
                words = (
                    f"step {skip['step']}: {skip['layer']} ({skip['phase']}: {skip['what']}), scale {skip['scale']:g}"
                )
                tf.summary.text("half_precision/skipped", words, step=skip["step"])
        self._writer.flush()

    def draw(self, layers: dict[str, dict[str, Statistics]], step: int) -> None:
        """Adds the pictures of exponents, one for each kind of tensor."""
        with self._writer.as_default(step):
            for kind in dict.fromkeys(kind for kinds in layers.values() for kind in kinds):
                found = {layer: kinds[kind] for layer, kinds in layers.items() if kind in kinds}
                picture = tf.io.decode_png(exponents_picture(found, kind.replace("_", " ")), channels=3)
                tf.summary.image(f"half_precision/exponents/{kind}", picture[tf.newaxis])
        self._writer.flush()


def _write(summary, step: int) -> None:
    tf.summary.experimental.write_raw_pb(summary.SerializeToString(), step=step)


def _values(layers: dict[str, dict[str, Statistics]]) -> dict[str, float]:
    """The scalars of one record, by tag."""
    values = {}
    ratios = {}
    for layer, kinds in layers.items():
        for kind, found in kinds.items():
            numbers = {name: getattr(found, name) for name in (*_SHARES, "maximum", "norm")}
            values |= {f"{kind}/{name}/{layer}": value for name, value in numbers.items()}
        ratio = update_ratio(kinds)
        if ratio is not None:
            ratios[layer] = ratio
    for kind in dict.fromkeys(kind for kinds in layers.values() for kind in kinds):
        some = [kinds[kind] for kinds in layers.values() if kind in kinds]
        total = sum(found.count for found in some)
        for name in _SHARES:
            share = sum(found.count * getattr(found, name) for found in some) / total
            values[f"half_precision/{name}/{kind}"] = share
        most = max(found.maximum for found in some)
        values[f"half_precision/log2_maximum/{kind}"] = np.log2(max(most, 2.0 ** FORMATS["float32"].normal))
    values |= {f"updates/ratio/{layer}": ratio for layer, ratio in ratios.items()}
    if ratios:
        for name, function in (("least", min), ("median", np.median), ("most", max)):
            values[f"half_precision/update_ratio/{name}"] = float(function(list(ratios.values())))
    return values


def update_ratio(kinds: dict[str, Statistics]) -> float | None:
    """Returns the norm of a layer's update divided by that of its weights; None where it has no weights but 0."""
    if "updates" not in kinds or "weights" not in kinds or not kinds["weights"].norm:
        return None
    return kinds["updates"].norm / kinds["weights"].norm


def _layout(layers: dict[str, dict[str, Statistics]]) -> layout_pb2.Layout:
    def chart(title: str, *tags: str) -> layout_pb2.Chart:
        return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=list(tags)))

    titles = {
        "zero": "zero, flushed or exact",
        "subnormal": "subnormal",
        "near_overflow": "within 2 bits of overflow",
        "non_finite": "non-finite",
    }
    overall = [chart("loss scale, power of 2", "half_precision/log2_loss_scale")]
    overall += [chart(f"share {title}", f"half_precision/{name}/.*") for name, title in titles.items()]
    overall += [chart("largest magnitude, power of 2", "half_precision/log2_maximum/.*")]
    overall += [chart("norm of update / norm of weights, of the layers", "half_precision/update_ratio/.*")]
    kinds = sorted({kind for some in layers.values() for kind in some})
    by_layer = [
        chart(f"{kind.replace('_', ' ')}: {name.replace('_', ' ')}", f"{kind}/{name}/.*")
        for kind in kinds
        for name in ("zero", "near_overflow", "maximum")
    ]
    by_layer.append(chart("norm of update / norm of weights", "updates/ratio/.*"))
    return layout_pb2.Layout(
        category=[
            layout_pb2.Category(title="half precision: all layers", chart=overall),
            layout_pb2.Category(title="half precision: layer by layer", chart=by_layer, closed=True),
        ]
    )


def exponents_picture(found: dict[str, Statistics], title: str) -> bytes:
    """Draws which powers of 2 values have, all layers together and layer by layer: a PNG picture.

    Args:
        found: path of a layer to what was found of one kind of tensor.
        title: as "activations".
    """
    found = dict(list(found.items())[:_MOST_ROWS])
    weights = np.array([one.count for one in found.values()], "float64")
    shares = np.stack([one.exponent_shares for one in found.values()])
    height = 3.4 + 0.16 * len(found)
    figure = Figure(figsize=(6.0, height), dpi=90)
    top, below = figure.subplots(
        2, sharex=True, gridspec_kw={"height_ratios": [2.0, 0.2 + 0.16 * len(found)], "hspace": 0.06}
    )
    figure.subplots_adjust(0.3, 0.45 / height, 0.88, 1 - 0.75 / height)
    heights = np.maximum(weights @ shares / weights.sum(), _FINEST)
    top.stairs(heights, np.arange(LOWEST, HIGHEST + 2) - 0.5, baseline=_FINEST, fill=True, color="tab:blue")
    top.set_yscale("log")
    top.set_ylim(_FINEST, 1.0)
    top.set_ylabel("share of all values", fontsize=8)
    zero = weights @ [one.zero for one in found.values()] / weights.sum()
    top.set_title(
        f"{title}: {zero:.1%} zero\nfloat16: normal between the orange lines, subnormal from the dotted one;\n"
        "bfloat16 (2^-126 to 2^128) holds all that is shown",
        fontsize=8,
    )
    extent = (LOWEST - 0.5, HIGHEST + 0.5, len(found) - 0.5, -0.5)
    norm = colors.LogNorm(_FINEST, 1.0)
    image = below.imshow(np.maximum(shares, _FINEST), aspect="auto", extent=extent, norm=norm, cmap="viridis")
    below.set_yticks(range(len(found)), [layer[-30:] for layer in found], fontsize=7)
    below.set_xlabel("exponent (power of 2)", fontsize=8)
    for axis in (top, below):
        _mark_ranges(axis)
    place = figure.add_axes((0.9, below.get_position().y0, 0.02, below.get_position().height))
    figure.colorbar(image, cax=place).ax.tick_params(labelsize=7)
    return reporting.png(figure)


def _mark_ranges(axis) -> None:
    about = FORMATS["float16"]
    for place, style in ((about.zero, ":"), (about.normal, "-"), (about.end, "-")):
        axis.axvline(place - 0.5, color="tab:orange", linestyle=style, linewidth=1.2)
    axis.tick_params(labelsize=7)
