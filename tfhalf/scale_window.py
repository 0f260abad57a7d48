"""The loss scales that a model bears in float16, variable by variable.

The gradients are computed in half at every loss scale, and in float32 (`tfhalf.twins`): which part of them is lost to
zero, and from where on they overflow. Between the two is the window; where there is none, the layer is named to keep in
float32.

It doesn't say whether a model trains as well in half.

Source: Micikevicius et al. 2018, section 3.2, https://arxiv.org/abs/1710.03740
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import keras
import numpy as np
import tensorflow as tf
from matplotlib import colors
from matplotlib.figure import Figure

from tfhalf import compilation, exponents, optimizer, precision, reporting, taps, twins

# The bounds of `tfhalf.LossScaleOptimizer`.
SCALES = tuple(2.0**exponent for exponent in range(optimizer.LOWEST_EXPONENT, optimizer.HIGHEST_EXPONENT + 1))
# float16's unit roundoff: what is lost then is no more than what rounding loses anyway.
ROUNDOFF = 2.0**-11
_HEADROOM, _NARROW_BITS, _GROWTH_STEPS, _SLOW_GROWTH_STEPS = 4.0, 4, 1000, 2000
# A gradient that is lost as a whole has an error of 1.
_NOISE = 2.0


@dataclasses.dataclass(frozen=True)
class VariableWindow:
    """The loss scales that one variable's gradient bears.

    Attributes:
        layer: its path, as in `precision.layers_by_path`; "(model)" for the model's own.
        name: of the variable, after its layer's path.
        lost: share (0 to 1) of the gradient's L1 mass that is 0 in float16 and not in float32, at each scale; where it
            isn't finite nothing is left.
        lost_elements: share of the elements, the same.
        finite: whether all elements are finite, at each scale.
        shut: share of the mass that is 0 in float16 at every finite scale, as behind a ReLU that is shut there and
            open in float32. No scale changes it, and `lost` leaves it out; above `twins.TOLERANCE` it counts as lost.
        is_noise: whether the error is more than twice the gradient at the largest finite scale: it is 0 but for
            rounding, as that of a bias that softmax or normalisation takes out again. Then what is lost doesn't count.
        has_gradient: whether its gradient in float32 has an element that isn't 0.
        low, high: the window's ends; None where there is none.
    """

    layer: str
    name: str
    lost: np.ndarray
    lost_elements: np.ndarray
    finite: np.ndarray
    shut: float
    is_noise: bool
    has_gradient: bool
    low: float | None
    high: float | None

    @property
    def bits(self) -> float | None:
        """Powers of 2 from one end to the other; None where there is no window or no gradient."""
        return None if self.low is None or not self.has_gradient else float(np.log2(self.high / self.low))


@dataclasses.dataclass(frozen=True)
class Window:
    """The loss scales that a model bears in float16; `str()` of it is a table.

    Attributes:
        scales: that were tried, ascending.
        variables: in the order of the layers.
        low, high: the scales that all variables and batches bear; None where there are none.
        limit: where the first scale above `high` overflows, in words; "" where none that was tried does.
        trouble: what is wrong, in words, with the layer and the line of a plan; empty where all is well.
    """

    scales: tuple[float, ...]
    variables: list[VariableWindow]
    low: float | None
    high: float | None
    limit: str
    trouble: list[str]

    @property
    def bits(self) -> float | None:
        """Powers of 2 from the window's low to its high end."""
        return None if self.low is None else float(np.log2(self.high / self.low))

    @property
    def initial_scale(self) -> float | None:
        """What to give to `LossScaleOptimizer`: the top less 2 bits of headroom, not below the bottom."""
        return None if self.low is None else max(self.low, self.high / _HEADROOM)

    @property
    def dynamic_growth_steps(self) -> int | None:
        """What to give to `LossScaleOptimizer`: each growth past the top costs one skipped step."""
        if self.bits is None:
            return None
        return _SLOW_GROWTH_STEPS if self.bits < _NARROW_BITS else _GROWTH_STEPS

    def to_json(self) -> dict:
        """Returns all of it as plain JSON values."""
        names = ("low", "high", "bits", "initial_scale", "dynamic_growth_steps", "limit", "trouble")
        rows = [dataclasses.asdict(one) | {"bits": one.bits} for one in self.variables]
        rows = [{name: reporting.plain(value) for name, value in row.items()} for row in rows]
        return {name: getattr(self, name) for name in names} | {"scales": list(self.scales), "variables": rows}

    def picture(self) -> bytes:
        """Draws the lost share of every variable's gradient by scale, and where it overflows: a PNG picture."""
        rows = sorted(self.variables, key=_worst_first)[: twins.MOST_ROWS]
        figure = Figure(figsize=(9, 2.2 + 0.2 * len(rows)), dpi=100, layout="constrained")
        axis = figure.subplots()
        shares = np.full([max(1, len(rows)), len(self.scales)], np.nan)
        for share, one in zip(shares, rows, strict=False):
            share[one.finite] = one.lost[one.finite]
        logs = np.log2(self.scales)
        norm = colors.LogNorm(ROUNDOFF, 1.0, clip=True)
        image = axis.imshow(np.maximum(shares, ROUNDOFF), cmap="viridis_r", norm=norm, aspect="auto")
        axis.set_yticks(range(len(rows)), [one.name[-40:] for one in rows], fontsize=7)
        axis.set_xticks(range(0, len(logs), 4), [f"2^{logs[index]:g}" for index in range(0, len(logs), 4)], fontsize=8)
        axis.set_xlabel("loss scale")
        ends, starts = np.nonzero([~one.finite for one in rows]) if rows else ((), ())
        axis.scatter(starts, ends, marker="x", s=18, color="tab:red", label="overflow")
        if self.low is not None:
            edges = (self.scales.index(self.low) - 0.5, self.scales.index(self.high) + 0.5)
            axis.axvspan(*edges, fill=False, edgecolor="tab:orange", linewidth=2, label="the window")
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False)
        figure.colorbar(image, ax=axis).set_label("share of the gradient lost to zero", fontsize=8)
        return reporting.png(figure)

    def __str__(self) -> str:
        lines = [f"trouble: {words}" for words in self.trouble]
        if self.low is not None:
            lines.append(
                f"loss scales {_power(self.low)} to {_power(self.high)}, {self.bits:g} bits: "
                f"initial_scale={self.initial_scale:g}, dynamic_growth_steps={self.dynamic_growth_steps}"
            )
        lines += [self.limit] if self.limit else []
        rows = sorted(self.variables, key=_worst_first)
        at = self.scales.index(self.initial_scale) if self.initial_scale in self.scales else None
        width = max((len(one.name) for one in rows), default=0)
        if rows:
            lines += [
                "",
                f"{'variable':{width}}  {'window':14} {'bits':>4} {'lost at 1':>10} {'at initial':>10} {'shut':>7}",
            ]
        for one in rows[: twins.MOST_ROWS]:
            shares = [one.lost[i] if i is not None else None for i in (self._index_of_1(), at)]
            told = [f"{share:10.2%}" if share is not None and one.has_gradient else f"{'':10}" for share in shares]
            bits = f"{one.bits:4g}" if one.bits is not None else f"{'':4}"
            noise = "  rounding noise" if one.is_noise else ""
            lines.append(f"{one.name:{width}}  {_in_words(one):14} {bits} {' '.join(told)} {one.shut:7.2%}{noise}")
        if len(rows) > twins.MOST_ROWS:
            lines.append(f"and {len(rows) - twins.MOST_ROWS} more")
        return "\n".join(lines)

    def _index_of_1(self) -> int | None:
        return self.scales.index(1.0) if 1.0 in self.scales else None


def loss_scale_window(model: keras.Model, batches: Iterable, *, scales: Sequence[float] = SCALES) -> Window:
    """Measures which loss scales a model's gradients bear in float16, variable by variable.

    A variable's window goes from the smallest scale at which at most 2^-11 of its gradient's L1 mass is lost to zero,
    to the largest at which all its elements are finite; the model's is what all variables and batches have in common.
    The mass decides, and not the number of elements: those whose float32 value is rounding noise have none.

    Start at the top less 2 bits. Each growth past the top costs one skipped step, so that a growth every 1000 steps
    costs 0.1%; 2000 where the window is narrower than 4 bits. Where there is no window, put the layer that is named
    into an island, and measure again: another one may follow.

    Args:
        model: compiled, on one device; some layer computes in float16.
        batches: each as `fit` gets it: x, or (x, y), or (x, y, sample_weight).
        scales: powers of 2. Default 2^-14 to 2^24, the bounds of `LossScaleOptimizer`. Each one is a pass.

    Returns:
        A `Window`. Gradients, or a loss, that aren't finite in float32 either are in its `trouble`, as is an overflow
        of the forward pass, which no scale helps.

    Raises:
        ValueError: the model isn't compiled, nothing in it computes in float16, there is no batch, or a scale isn't a
            power of 2.

    Example:

    >>> with precision.PrecisionPlan().scope():
    ...     model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1, use_bias=False, name="dense")])
    >>> model.compile("sgd", lambda y, y_pred: 2.0**-20 * y_pred)
    >>> window = loss_scale_window(model, [(np.ones([1, 2], "float32"), np.ones([1, 1], "float32"))])
    >>> np.log2([window.low, window.high, window.initial_scale])
    array([-4., 24., 22.])

    Source: Micikevicius et al. 2018, section 3.2, https://arxiv.org/abs/1710.03740
    """
    twins.require_half(model, ("float16",))
    if not model.trainable_weights:
        raise ValueError(f"loss_scale_window: model {model.name!r} has no trainable weights: no gradient to scale")
    scales = tuple(sorted(float(scale) for scale in scales))
    if not scales or any(scale <= 0 or np.frexp(scale)[0] != 0.5 for scale in scales):
        raise ValueError(f"loss_scale_window: scales must be powers of 2, got {scales}")
    batches = [twins.tensors(batch) for batch in batches]
    if not batches:
        raise ValueError("loss_scale_window: batches is empty; give at least one")
    with twins.without_randomness(model), compilation.activities_in_float32(model):
        measured = _Twins(model, scales)
        for index, batch in enumerate(batches):
            if words := measured.measure(batch):
                return Window(scales, [], None, None, "", [f"batch {index}: {words}"])
        return measured.window()


class _Twins:
    """A model's scaled gradients in half, measured against its float32 twin's."""

    def __init__(self, model: keras.Model, scales: tuple[float, ...]):
        owners = taps.own_weights(model)
        self._model, self._scales = model, scales
        self._layers = [path or taps.MODEL for path, some in owners.items() for _ in some]
        self._weights = [weight for some in owners.values() for weight in some]
        self._measured: list[tuple] = []  # of each batch
        self._true, self._half = (tf.function(each, autograph=False) for each in (self._gradients, self._losses))
        self._true_overflow, self._half_overflow = _first_non_finite(model), _first_non_finite(model)

    def measure(self, batch) -> str:
        """Measures a batch at every scale; returns what makes that pointless, in words, or ""."""
        with precision.computing_in(self._model, "float32"):
            loss, true = self._true(batch, tf.constant(1.0))
            if not all(np.isfinite(tensor).all() for tensor in [loss, *true]):
                where = self._true_overflow(batch, 1.0) or taps.Place(taps.LOSS, "backward", "its gradients", [])
                return f"the pass isn't finite in float32 either, first in {where.layer} ({where.phase}: {where.what})"
        where = self._half_overflow(batch, self._scales[0])
        if where and where.phase == "forward":
            island = "" if where.layer in (taps.DATA, taps.LOSS) else f"; {_island(where.layer)}"
            return f"the forward pass overflows, which no loss scale helps, in {where.layer} ({where.what}){island}"
        rows = np.stack([self._half(batch, tf.constant(scale), true) for scale in self._scales])
        self._measured.append((batch, rows, [bool(np.any(gradient)) for gradient in true]))
        return ""

    def window(self) -> Window:
        """Puts together what was measured of all batches."""
        _, rows, nonzero = (list(some) for some in zip(*self._measured, strict=True))
        finite = (np.max(rows, 0)[..., 2] == 0.0).T  # [variables, scales], as the next ones
        losses = [np.where(finite, each[..., 0].T, 1.0) for each in rows]
        shut = np.stack([np.min(each, 1) for each in losses])  # [batches, variables]
        shut = np.where(shut <= twins.TOLERANCE, shut, 0.0)
        lost = np.max([each - least[:, np.newaxis] for each, least in zip(losses, shut, strict=True)], 0)
        last = len(self._scales) - 1 - np.argmax(finite[:, ::-1], 1)
        errors = [each[last, np.arange(len(last)), 3] for each in rows]  # at the largest finite scale
        noise = np.all(np.where(nonzero, errors, np.inf) > _NOISE, 0) & finite.any(1) & np.any(nonzero, 0)
        fine = finite & ((lost <= ROUNDOFF) | noise[:, np.newaxis])
        names = [f"{layer}/{weight.name}" for layer, weight in zip(self._layers, self._weights, strict=True)]
        columns = (
            lost,
            np.max(rows, 0)[..., 1].T,
            finite,
            shut.max(0).tolist(),
            noise.tolist(),
            np.any(nonzero, 0).tolist(),
        )
        variables = [
            VariableWindow(*about, *self._longest(fits))
            for *about, fits in zip(self._layers, names, *columns, fine, strict=True)
        ]
        low, high = self._longest(fine.all(0))
        above = [index for index in np.flatnonzero(~finite.all(0)) if high is None or self._scales[index] > high]
        limit = ""
        if above:
            where, scale = self._overflow(above[0]), self._scales[above[0]]
            limit = f"at {_power(scale)} the first overflow is in {where.layer} ({where.phase}: {where.what})"
        trouble = [] if low else self._advice(variables)
        if not any(one.has_gradient for one in variables):
            trouble = ["no variable has a gradient in float32: the loss is flat here"]
        return Window(self._scales, variables, low, high, limit, trouble)

    def _advice(self, variables: list[VariableWindow]) -> list[str]:
        """Names the layers whose islands help: where it overflows, or whose gradient never gets large enough."""
        stuck = [one for one in variables if one.low is None] or [min(variables, key=lambda one: one.high)]
        told = {}
        for one in stuck:
            ends = np.flatnonzero(~one.finite)
            layer = self._overflow(ends[0], one).layer if ends.size else one.layer
            layer = one.layer if layer in (taps.DATA, taps.LOSS, taps.MODEL) else layer
            told.setdefault(layer, []).append(one)
        words = []
        for layer, some in told.items():
            others = f" and {len(some) - 1} more" if len(some) > 1 else ""
            lead = f"no loss scale fits {some[0].name}{others}"
            if some[0].low is not None:
                most = max(variables, key=lambda one: one.low)
                lead = f"no loss scale fits both {some[0].name} (at most {_power(some[0].high)}) and {most.name} "
                lead += f"(at least {_power(most.low)})"
            words.append(f"{lead}; {_island(layer)}")
        return words

    def _overflow(self, index: int, one: VariableWindow | None = None) -> taps.Place:
        """Where the pass overflows first at a scale, in the first batch that does."""
        for batch, rows, *_ in self._measured:
            if rows[index, :, 2].any() and (where := self._half_overflow(batch, self._scales[index])):
                return where
        return taps.Place(one.layer if one else taps.MODEL, "backward", "the gradient of its weights", [])

    def _longest(self, fits: np.ndarray) -> tuple[float | None, float | None]:
        """The ends of the longest run of scales that fit."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], fits, [False]]).astype("int8")))
        runs = edges.reshape(-1, 2)
        if not len(runs):
            return None, None
        first, end = runs[np.argmax(runs[:, 1] - runs[:, 0])]
        return self._scales[first], self._scales[end - 1]

    def _gradients(self, data, scale):
        return twins.gradients(self._model, self._weights, data, scale)

    def _losses(self, data, scale, true):
        """For each variable the lost share of mass and of elements, the number of non-finite ones, and the error."""
        _, gradients = self._gradients(data, scale)
        rows = []
        for gradient, twin in zip(gradients, true, strict=True):
            size, some = tf.abs(twin), tf.cast(tf.not_equal(twin, 0.0), tf.float32)
            shares = [_share(tf.where(tf.equal(gradient, 0.0), each, 0.0), each) for each in (size, some)]
            bad = tf.math.count_nonzero(~tf.math.is_finite(gradient), dtype=tf.int32)
            error = tf.math.divide_no_nan(tf.reduce_sum(tf.abs(gradient / scale - twin)), tf.reduce_sum(size))
            rows.append(tf.stack([*shares, tf.cast(bad, tf.float32), error]))
        return tf.stack(rows)


def _first_non_finite(model: keras.Model) -> Callable[..., taps.Place | None]:
    """A function of a batch and a scale that tells where the pass isn't finite first, if it isn't."""
    found: list[taps.Place] = []

    def count(data, scale):
        places = taps.places(data, taps.replay(model, data, scale=scale))
        found[:] = [dataclasses.replace(place, tensors=[]) for place in places]
        return tf.stack([exponents.extremes(place.tensors)[0] for place in places])

    traced = tf.function(count, autograph=False)

    def first(data, scale: float) -> taps.Place | None:
        bad = np.flatnonzero(traced(data, tf.constant(scale)))
        return found[bad[0]] if bad.size else None

    return first


def _share(part: tf.Tensor, whole: tf.Tensor) -> tf.Tensor:
    return tf.math.divide_no_nan(tf.reduce_sum(part), tf.reduce_sum(whole))


def _island(layer: str) -> str:
    line = (
        'PrecisionPlan("mixed_bfloat16")' if layer == taps.MODEL else f'PrecisionPlan(layers={{"{layer}": "float32"}})'
    )
    return f"use bfloat16 or a float32 island here: {layer}, {line}"


def _worst_first(one: VariableWindow) -> tuple:
    return not one.has_gradient, -1.0 if one.bits is None else one.bits


def _in_words(one: VariableWindow) -> str:
    if not one.has_gradient:
        return "no gradient"
    return "none" if one.low is None else f"{_power(one.low)} to {_power(one.high)}"


def _power(scale: float) -> str:
    return f"2^{np.log2(scale):g}"
