"""Where half precision and float32 part: a pass in half beside the same one in float32, place by place.

The places are those of `tfhalf.taps`, forward and backward; the same weights and batch go through both
(`tfhalf.twins`). At each place it is measured how far half is from float32, and the first on either way that is further
than the tolerance is marked: there precision is lost, and not only handed on.

It doesn't say whether a model trains as well in half.
"""

import dataclasses

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from tfhalf import compilation, precision, reporting, taps, twins


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far half is from float32 at one place of a pass.

    Attributes:
        layer, phase, what: as in `taps.Place`.
        dtype: the half dtype that `ulps` are of.
        error: norm of the difference divided by float32's norm; infinite where half isn't finite.
        cosine: of the angle between the two.
        ulps: largest difference, in spacings of the dtype's numbers in the binade of float32's value.
    """

    layer: str
    phase: str
    what: str
    dtype: str
    error: float
    cosine: float
    ulps: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A pass in half beside the same one in float32; `str()` of it is a table.

    Attributes:
        tolerance: relative error from which the two part forward; backward it is the square root.
        scale: loss scale of the backward pass.
        places: in the order in which the pass computes.
    """

    tolerance: float
    scale: float
    places: list[Difference]

    @property
    def forward(self) -> Difference | None:
        """Where the two part first on the way forward; None where they don't."""
        return self._first("forward")

    @property
    def backward(self) -> Difference | None:
        """Where the two part first on the way back; None where they don't."""
        return self._first("backward")

    def _first(self, phase: str) -> Difference | None:
        most = self._tolerances[phase]
        return next((one for one in self.places if one.phase == phase and not one.error <= most), None)

    @property
    def _tolerances(self) -> dict[str, float]:
        return {"forward": self.tolerance, "backward": self.tolerance**0.5}

    def to_json(self) -> dict:
        """Returns all of it as plain JSON values."""
        rows = [dataclasses.asdict(one) for one in [self.forward, self.backward, *self.places] if one]
        rows = [{name: reporting.plain(value) for name, value in row.items()} for row in rows]
        parted = {phase: rows.pop(0) if getattr(self, phase) else None for phase in ("forward", "backward")}
        return {"tolerance": self.tolerance, "scale": self.scale} | parted | {"places": rows}

    def picture(self) -> bytes:
        """Draws the relative error along the pass: a PNG picture."""
        figure = Figure(figsize=(11, 5), dpi=100, layout="constrained")
        axis = figure.subplots()
        for phase, color in (("forward", "tab:blue"), ("backward", "tab:green")):
            along = [index for index, one in enumerate(self.places) if one.phase == phase]
            errors = np.array([self.places[index].error for index in along])
            axis.plot(
                along, np.where(np.isfinite(errors), np.maximum(errors, 1e-8), np.nan), ".-", c=color, label=phase
            )
            axis.axhline(self._tolerances[phase], color=color, linewidth=0.8, linestyle="--")
            if first := getattr(self, phase):
                axis.axvline(self.places.index(first), color=color, linestyle=":", label=f"{first.layer}: {first.what}")
        axis.set_yscale("log")
        axis.set_xlabel("places of the pass, in order; dashed: tolerances")
        axis.set_ylabel("relative error")
        axis.legend(fontsize=8)
        return reporting.png(figure)

    def __str__(self) -> str:
        parted = [one for one in (self.forward, self.backward) if one]
        lines = [f"{one.phase}: parts at {one.layer}, {one.what}: relative error {one.error:.2g}" for one in parted]
        lines += (
            []
            if parted
            else [f"all {len(self.places)} places agree within {self.tolerance:g}, backward {self.tolerance**0.5:.2g}"]
        )
        near = {self.places.index(one) + step for one in parted for step in range(-3, 4)}
        # Of the others those with the largest errors.
        order = sorted(range(len(self.places)), key=lambda index: (index not in near, -self.places[index].error))
        shown = [self.places[index] for index in sorted(order[: twins.MOST_ROWS])]
        width = max(len(one.layer) for one in shown)
        lines += ["", f"  {'layer':{width}}  {'phase':8} {'error':>8} {'cosine':>9} {'ULPs':>9}  what"]
        for one in shown:
            mark = ">" if one in parted else " "
            numbers = f"{one.error:8.2g} {one.cosine:9.6f} {one.ulps:9.3g}"
            lines.append(f"{mark} {one.layer:{width}}  {one.phase:8} {numbers}  {one.what}")
        if len(self.places) > len(shown):
            lines.append(f"and {len(self.places) - len(shown)} more")
        return "\n".join(lines)


def compare(model: keras.Model, data, *, tolerance: float = twins.TOLERANCE) -> Comparison:
    """Compares a training pass in half with the same one in float32, layer by layer, and tells where they part.

    A place that only one of the two has, as a cast to half, is left out; so is what is in a loop of the graph.

    Args:
        model: compiled, on one device; some layer computes in half.
        data: a batch as `fit` gets it: x, or (x, y), or (x, y, sample_weight).
        tolerance: relative error from which the two part on the way forward, above 0. Default 0.05: what a hundred
            roundings of float16 in one direction make (13 of bfloat16), or ten thousand at random (164). Backward
            it is the square root, 0.22: where a forward error e has moved values over a kink, as ReLU's, a share of
            about e of the gradient's elements is 0 in one twin only, which is an error of sqrt(e) in its norm.
            Measured with fresh weights on MNIST, a ResNet-20 has 0.19 in float16, and 0.39 in bfloat16: raise it for a
            deep model in bfloat16.

    Returns:
        A `Comparison`. Gradients are those of the loss times the optimizer's scale, if it has one, which no relative
        error depends on but by what is lost.

    Raises:
        ValueError: the model isn't compiled, nothing in it computes in half, or the tolerance isn't above 0.

    Example:

    >>> with precision.PrecisionPlan("mixed_bfloat16").scope():
    ...     model = keras.Sequential([keras.Input([2]), keras.layers.Dense(2, dtype="float32", name="head")])
    ...     model.add(keras.layers.Rescaling(1.0, name="half"))  # on the CPU Dense's bias gradient isn't right
    >>> model.compile("sgd", "mse")
    >>> compared = compare(model, (np.ones([4, 2], "float32"), np.zeros([4, 2], "float32")))
    >>> compared.forward is None, compared.places[0].layer
    (True, '(data)')
    """
    dtype = twins.require_half(model, precision.HALF_DTYPES)
    if not tolerance > 0:
        raise ValueError(f"compare: tolerance must be above 0, got {tolerance}")
    data, scale, keys, shown = twins.tensors(data), _scale_of(model.optimizer), [], []
    dtypes = {path: layer.compute_dtype for path, layer in precision.layers_by_path(model).items()}

    def true(data):
        places = _keyed(taps.places(data, taps.replay(model, data, scale=scale)))
        keys[:] = places
        return [place.tensors for place in places.values()]

    def differences(data, reference):
        known, rows = dict(zip(keys, reference, strict=True)), []
        for key, place in _keyed(taps.places(data, taps.replay(model, data, scale=scale))).items():
            twin = known.get(key, [])
            if [tensor.shape for tensor in twin] != [tensor.shape for tensor in place.tensors]:
                continue
            own = place.tensors[0].dtype.name
            own = next((each for each in (own, dtypes.get(place.layer)) if each in precision.HALF_DTYPES), dtype)
            shown.append((place.layer, place.phase, place.what, own))
            rows.append(_difference(place.tensors, twin, own))
        return tf.stack(rows)

    with twins.without_randomness(model), compilation.activities_in_float32(model):
        with precision.computing_in(model, "float32"):
            reference = tf.function(true, autograph=False)(data)
        rows = tf.function(differences, autograph=False)(data, reference).numpy()
    return Comparison(
        tolerance, scale, [Difference(*of, *map(float, row)) for of, row in zip(shown, rows, strict=True)]
    )


def _keyed(places: list[taps.Place]) -> dict[tuple, taps.Place]:
    """Places by layer, phase, what and occurrence."""
    keyed: dict[tuple, taps.Place] = {}
    for place in places:
        name, occurrence = (place.layer, place.phase, place.what), 0
        while (*name, occurrence) in keyed:
            occurrence += 1
        keyed[*name, occurrence] = place
    return keyed


def _difference(half: list[tf.Tensor], true: list[tf.Tensor], dtype: str) -> tf.Tensor:
    """Relative error, cosine, and largest error in ULPs, float64 `[3]`."""
    half, true = (tf.concat([tf.reshape(tf.cast(each, tf.float32), [-1]) for each in some], 0) for some in (half, true))
    binade = tf.bitcast(tf.bitwise.bitwise_and(tf.bitcast(true, tf.int32), 0x7F800000), tf.float32)
    about = precision.FORMATS[dtype]
    spacing = tf.cast(tf.maximum(binade, 2.0**about.normal), tf.float64) * 2.0 ** (1 - about.bits)
    half, true = (tf.cast(each, tf.float64) for each in (half, true))
    norms = [tf.norm(each) for each in (half, true, half - true)]
    both = norms[0] * norms[1]
    error = tf.where(tf.equal(norms[2], 0.0), tf.zeros([], tf.float64), norms[2] / norms[1])
    cosine = tf.where(
        tf.equal(norms[2], 0.0), tf.ones([], tf.float64), tf.math.divide_no_nan(tf.reduce_sum(half * true), both)
    )
    ulps = tf.reduce_max(tf.abs(half - true) / spacing)
    finite = tf.math.is_finite(error) & tf.math.is_finite(ulps)
    return tf.stack([tf.where(finite, error, np.inf), tf.where(finite, cosine, np.nan), tf.where(finite, ulps, np.inf)])


def _scale_of(optimizer: keras.optimizers.Optimizer) -> float:
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return 1.0
    scale = optimizer.dynamic_scale if optimizer.built else optimizer.initial_scale
    return float(keras.ops.convert_to_numpy(scale))
