"""Does a model that was trained in bfloat16 fit into float16's range? Each layer's largest numbers, and the islands.

bfloat16 has float32's range, float16 ends at 65504. On calibration batches the float32 twin (`tfhalf.twins`) tells the
largest magnitude of what each layer takes in, puts out and holds as weights, and of its gradients; what is nearer to
float16's end than the headroom becomes a float32 island. What a layer computes in between isn't seen that way, so the
model is then run in float16 with these islands, and the layer where it overflows first becomes one too, until all of
it is finite.

It looks at range only. Whether 11 bits, or the islands, are enough for a metric is for `tfhalf.search`; which loss
scales the gradients bear is for `tfhalf.scale_window`.
"""

import dataclasses
import re
from collections.abc import Iterable

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from tfhalf import compilation, exponents, optimizer, precision, reporting, sensitivity, taps, twins
from tfhalf.islands import mark_layers

# A factor of 4: other batches than those that were looked at may hold larger numbers.
HEADROOM_BITS = 2.0
_FORMAT = precision.FORMATS["float16"]
_SCALE_STEP = 4


@dataclasses.dataclass(frozen=True)
class Range:
    """The largest magnitudes of one layer, 0 where there is nothing.

    Attributes:
        path: as in `precision.layers_by_path`.
        inputs, outputs, weights: of the batches that were looked at, in float32.
        gradients: of the loss, by what the layer takes in, puts out, and its weights; the loss not scaled.
        why: why it is an island; "" where it isn't.
    """

    path: str
    inputs: float
    outputs: float
    weights: float
    gradients: float
    why: str = ""

    @property
    def headroom(self) -> float:
        """Bits from the largest of inputs, outputs and weights to float16's end; infinite where all are 0."""
        largest = max(self.inputs, self.outputs, self.weights)
        return float(_FORMAT.end - np.log2(largest)) if largest else float("inf")


@dataclasses.dataclass(frozen=True)
class Clearance:
    """How near a model's numbers are to float16's end; `str()` of it is a table.

    Attributes:
        plan: float16 with the islands; with it the batches were computed, and all was finite.
        headroom_bits: that a layer must have.
        layers: those that computed in half when the model was given, in order.
        kept: weights that a float16 file can't hold: their path and largest magnitude. An export keeps them in float32.
        scale: the largest loss scale that leaves the headroom to the gradients of layers in half; None where the model
            isn't compiled.
    """

    plan: precision.PrecisionPlan
    headroom_bits: float
    layers: list[Range]
    kept: dict[str, float]
    scale: float | None

    @property
    def islands(self) -> list[str]:
        """The paths of the layers that the plan keeps in float32."""
        return [one.path for one in self.layers if one.why]

    def to_json(self) -> dict:
        """Returns all of it as plain JSON values."""
        rows = [dataclasses.asdict(one) | {"headroom": one.headroom} for one in self.layers]
        names = ("headroom_bits", "kept", "scale", "islands")
        return reporting.plain({name: getattr(self, name) for name in names} | {"plan": self.plan, "layers": rows})

    def picture(self) -> bytes:
        """Draws each layer's largest magnitudes beside float16's end, in the layers' order: a PNG picture."""
        figure = Figure(figsize=(max(8.0, 3.0 + 0.16 * len(self.layers)), 5), dpi=100, layout="constrained")
        axis = figure.subplots()
        places = np.arange(len(self.layers))
        for name, mark in (("inputs", "v"), ("outputs", "^"), ("weights", "_"), ("gradients", ".")):
            values = np.array([getattr(one, name) for one in self.layers])
            axis.plot(places[values > 0], values[values > 0], mark, label=name)
        axis.axhline(_FORMAT.largest, color="tab:red", linewidth=0.8, label="float16's end")
        axis.axhline(2.0 ** (_FORMAT.end - self.headroom_bits), color="tab:red", linewidth=0.8, linestyle="--")
        axis.set_ylabel("largest magnitude")
        axis.set_xlabel("layers in order; red: float32 islands; dashed: the headroom")
        mark_layers(axis, [one.path for one in self.layers], self.islands)
        return reporting.png(figure)

    def __str__(self) -> str:
        islands = [one for one in self.layers if one.why]
        lines = [f"float32 island: {one.path}: {one.why}" for one in islands]
        lines = lines or [f"all layers have {self.headroom_bits:g} bits to float16's end: no float32 island is needed"]
        lines += [f"a float16 file can't hold {name}, up to {value:.3g}" for name, value in self.kept.items()]
        if self.scale is not None:
            lines.append(f"gradients of layers in half: loss scales up to 2^{np.log2(self.scale):g} leave the headroom")
        order = sorted(range(len(self.layers)), key=lambda at: (not self.layers[at].why, self.layers[at].headroom, at))
        shown = [self.layers[at] for at in sorted(order[: twins.MOST_ROWS])]
        width = max(len(one.path) for one in shown)
        heads = " ".join(f"{name:>9}" for name in ("inputs", "outputs", "weights", "gradients", "bits left"))
        lines += ["", f"  {'layer':{width}} {heads}"]
        for one in shown:
            numbers = " ".join(f"{each:9.3g}" for each in (one.inputs, one.outputs, one.weights, one.gradients))
            lines.append(f"{'>' if one.why else ' '} {one.path:{width}} {numbers} {one.headroom:9.1f}")
        if len(self.layers) > len(shown):
            lines.append(f"and {len(self.layers) - len(shown)} more")
        return "\n".join(lines)


def range_clearance(model: keras.Model, data: Iterable, *, headroom_bits: float = HEADROOM_BITS) -> Clearance:
    """Finds the layers whose numbers don't fit into float16, and the float32 islands with which the model is finite.

    The model stays as it was.

    Args:
        model: with its trained weights, built under `PrecisionPlan("mixed_bfloat16").scope()` (or "mixed_float16"): its
            half layers are those that shall compute in float16. Where it is compiled gradients are looked at too.
        data: calibration batches as `fit` gets them: x, or (x, y), or (x, y, sample_weight). Numbers that these don't
            show aren't known.
        headroom_bits: powers of 2 that must be left between the largest magnitude and float16's end, 0 or more. Default
            2. Gradients needn't have it, since the loss scale is lowered for them.

    Returns:
        A `Clearance`; build under `clearance.plan.scope()`, load the weights, then `clearance.plan.apply(model)`.

    Raises:
        ValueError: nothing computes in half, there is no batch, the numbers aren't finite in float32 either, or it
            overflows outside of the layers, where no island helps.

    Example:

    >>> with precision.PrecisionPlan("mixed_bfloat16").scope():
    ...     layers = [keras.layers.Rescaling(1e5, name="far"), keras.layers.Rescaling(1e-5, name="back")]
    ...     model = keras.Sequential([keras.Input([2]), *layers, keras.layers.ReLU(name="near")])
    >>> range_clearance(model, [np.ones([1, 2], "float32")]).islands
    ['far', 'back']
    """
    if not headroom_bits >= 0:
        raise ValueError(f"range_clearance: headroom_bits must be 0 or more, got {headroom_bits}")
    batches = [twins.tensors(batch) for batch in data]
    if not batches:
        raise ValueError("range_clearance: data is empty; give at least one batch")
    if not (paths := sensitivity.all_half_layers(model)):
        raise ValueError(
            f"range_clearance: no layer of model {model.name!r} computes in half; build it under "
            'PrecisionPlan("mixed_bfloat16").scope() and load its weights'
        )
    with twins.without_randomness(model), compilation.activities_in_float32(model):
        ranges = _ranges(model, batches, paths)
        lacking = {path: _why(one, headroom_bits) for path, one in ranges.items()}
        islands = _until_finite(
            model, batches, ranges, {path: why for path, why in lacking.items() if why}, headroom_bits
        )
    rows = [dataclasses.replace(one, why=islands.get(path, "")) for path, one in ranges.items()]
    scale = 2.0 ** _scale(ranges, islands, headroom_bits) if getattr(model, "compiled", False) else None
    return Clearance(_plan(islands), headroom_bits, rows, _kept(model), scale)


def _ranges(model: keras.Model, batches: list, paths: list[str]) -> dict[str, Range]:
    """Largest magnitudes in float32, of all batches."""
    names: list[tuple[str, str]] = []
    layers = precision.layers_by_path(model)

    def largest(data):
        # What a block hands from one layer inside it to the next needs no room in the block's own dtype.
        places = [place for place in _places(model, data, 1.0) if place.what != "its own operations"]
        names[:] = [(place.layer, _column(place)) for place in places]
        return tf.stack([exponents.extremes(place.tensors) for place in places])

    with precision.computing_in(model, "float32"):
        traced = twins.traced(largest, batches)
        rows = [traced(data).numpy() for data in batches]
    found = {path: Range(path, 0.0, 0.0, _largest_weight(layers[path]), 0.0) for path in paths}
    for index, row in enumerate(rows):
        for (layer, column), (bad, most, _) in zip(names, row, strict=True):
            if bad:
                raise ValueError(
                    f"range_clearance: {column} of {layer} aren't finite in float32 either, in batch {index}"
                )
            if layer in found:
                value = max(float(most), getattr(found[layer], column))
                found[layer] = dataclasses.replace(found[layer], **{column: value})
    return found


def _until_finite(model, batches, ranges, islands: dict[str, str], headroom_bits: float) -> dict[str, str]:
    """Adds the layers where the model overflows in float16, one after the other, until it doesn't."""
    while True:
        try:
            where = _overflow(model, batches, islands, _scale(ranges, islands, headroom_bits))
        except (TypeError, ValueError, tf.errors.InvalidArgumentError):
            # A block that is given half by one of its layers and float32 by another: as a whole, then.
            whole = sensitivity.half_layers(model)
            inner = next((path for path in islands if path not in whole), None)
            if inner is None:
                raise
            block = next(path for path in whole if inner.startswith(f"{path}/"))
            why = f"{inner} must be, and the rest of it can't be left in half: {islands[inner]}"
            islands = {path: each for path, each in islands.items() if not path.startswith(f"{block}/")} | {block: why}
            continue
        if where is None:
            return islands
        if where.layer not in ranges or where.layer in islands:
            raise ValueError(
                f"range_clearance: in float16 it overflows in {where.layer} ({where.phase}: {where.what}), outside of "
                "the layers: no float32 island helps; cast there, or scale the numbers"
            )
        islands = islands | {where.layer: f"it overflows in float16 ({where.phase}: {where.what})"}


def _overflow(model: keras.Model, batches: list, islands: Iterable[str], exponent: int) -> taps.Place | None:
    """Where the model overflows first in float16 at any loss scale from this one downwards; None where it doesn't."""
    found: list[taps.Place] = []

    def count(data, scale):
        places = _places(model, data, scale)
        found[:] = [dataclasses.replace(place, tensors=[]) for place in places]
        return tf.stack([exponents.extremes(place.tensors)[0] for place in places])

    with precision.computing_in(model, "float16"):
        _plan(islands).apply(model)
        traced = twins.traced(count, batches, [tf.ones([])])
        while True:
            bad = [np.flatnonzero(traced(data, tf.constant(2.0**exponent))) for data in batches]
            first = [found[at[0]] for at in bad if at.size]
            forward = next((place for place in first if place.phase == "forward"), None)
            if forward or not first or exponent == optimizer.LOWEST_EXPONENT:
                return forward or next(iter(first), None)
            exponent = max(exponent - _SCALE_STEP, optimizer.LOWEST_EXPONENT)


def _places(model: keras.Model, data, scale) -> list[taps.Place]:
    if getattr(model, "compiled", False):
        return taps.places(data, taps.replay(model, data, scale=scale))
    return taps.places(data, taps.forward(model, data))


def _column(place: taps.Place) -> str:
    if place.phase == "backward":
        return "gradients"
    return "inputs" if "input" in place.what else "outputs"


def _largest_weight(layer: keras.Layer) -> float:
    """Of the weights that a layer and what is inside it compute with in half; normalisation does it in float32."""
    if isinstance(layer, precision.NORMALIZATIONS):
        return 0.0
    children = precision.layers_by_path(layer).values()
    return max((_size(one) for each in [layer, *children] for one in precision.own_weights(each)), default=0.0)


def _size(weight: keras.Variable) -> float:
    value = keras.ops.convert_to_numpy(weight)
    return float(np.abs(value).max()) if value.size and weight.dtype == "float32" else 0.0


def _kept(model: keras.Model) -> dict[str, float]:
    return {weight.path: size for weight in model.weights if (size := _size(weight)) > _FORMAT.largest}


def _why(one: Range, headroom_bits: float) -> str:
    if one.headroom >= headroom_bits:
        return ""
    parts = {name: getattr(one, name) for name in ("inputs", "outputs", "weights")}
    name = max(parts, key=parts.get)
    return f"{name} up to {parts[name]:.3g}, {one.headroom:.1f} bits to float16's end"


def _scale(ranges: dict[str, Range], islands: Iterable[str], headroom_bits: float) -> int:
    """The exponent of the largest loss scale that leaves the headroom to the gradients of layers in half."""
    largest = max((one.gradients for path, one in ranges.items() if path not in islands), default=0.0)
    most = _FORMAT.end - headroom_bits - np.log2(largest) if largest else optimizer.HIGHEST_EXPONENT
    return int(np.clip(np.floor(most), optimizer.LOWEST_EXPONENT, optimizer.HIGHEST_EXPONENT))


def _plan(islands: Iterable[str]) -> precision.PrecisionPlan:
    """Float16 with islands; one that is inside another is in it already."""
    outer = [path for path in islands if not any(path.startswith(f"{other}/") for other in islands)]
    return precision.PrecisionPlan("mixed_float16", {re.escape(path): "float32" for path in outer})
