"""Which layers need float32? The smallest set that keeps a task's metric and its gradients where float32 has them.

The search starts from half everywhere and measures: the model as it was built, with some layers as float32 islands, is
run on held-out batches by a real `PrecisionPlan`, and its metric and weight gradients are compared with those of the
float32 twin (`tfhalf.twins`). All else only decides what is measured next:

1. Half everywhere. Where that is within tolerance there are no islands.
2. Layers are ranked by what each one by itself loses in half (`tfhalf.sensitivity`), from one graph.
3. The shortest part of that ranking that is within tolerance as islands, by doubling and bisection.
4. Of these, what isn't needed is given up, the costliest first: halves, and of a half that can't be given up as a
   whole its halves, down to single layers.
5. A block, as attention, that is an island is tried with what is inside it as islands instead.
6. Each island is given up once more, the costliest first, until none can be.

After 6 no island of the plan can be left out: it is 1-minimal. Layers that fail only together, and islands that help
only together, are found, since every test is of the whole model. For k islands about 2 k log2(n / k) sets of n layers
are run, each of which is a graph to be made and a few batches to be computed.

Source: Zeller and Hildebrandt 2002, "Simplifying and isolating failure-inducing input" (delta debugging), IEEE TSE 28.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Sequence

import keras
import numpy as np
import tensorflow as tf

from tfhalf import compilation, metrics, optimizer, precision, sensitivity, taps, twins, workload
from tfhalf.islands import LayerCost, Search, Trial

GRADIENT_TOLERANCE = twins.TOLERANCE**0.5
MOST_EVALUATIONS = 100


class NoPlanError(ValueError):
    """Float32 islands don't bring the model within tolerance; the message says what is missing."""


def search_precision(
    model: keras.Model,
    data: Iterable,
    metric: metrics.Metric,
    tolerance: float,
    *,
    gradient_tolerance: float = GRADIENT_TOLERANCE,
    most_evaluations: int = MOST_EVALUATIONS,
    report: Callable[[str], None] | None = None,
) -> precision.PrecisionPlan:
    """Finds the smallest set of float32 layers that keeps a metric, and the gradients, within tolerance of float32.

    The model stays as it was, and nothing is trained. The same call on the same weights gives the same plan.

    Args:
        model: built under `PrecisionPlan(...).scope()`, with the weights that it shall be judged by; on one device.
            What it computes in half now is what may become an island; what was built in float32 stays.
        data: held-out batches as `fit` gets them, (x, y) or (x, y, sample_weight). All are kept in memory. A part that
            the result is going to be tested on is no longer held out.
        metric: what must stay where it is: "loss", or the name of another compiled metric as `fit` logs it; a Keras
            metric, which is reset; or a function of (y, y_pred) of a batch, whose results' mean is weighed by the
            batches' sizes. It sees the model in inference. Higher or lower doesn't matter.
        tolerance: largest difference of the metric from float32's, in the metric's own unit, 0 or more.
        gradient_tolerance: of a compiled model: largest relative error of any layer's weight gradients, of all its
            weights together, on any batch: norm of the difference from float32's divided by float32's norm. Default
            0.22: a forward error of 0.05 (`twins.TOLERANCE`), more than rounding makes, moves a share of about 0.05 of
            the values over a kink as ReLU's, which is an error of sqrt(0.05) in the gradient's norm. Gradients that
            overflow count as infinitely wrong, those that are flushed to zero as wrong by their norm. In float16 they
            are taken at whichever loss scale from 2^-14 to 2^24 brings them within tolerance, since a dynamic scale
            would go there: an overflow that a smaller scale mends needs no island.
        most_evaluations: models to run, 3 or more. Where they don't suffice the plan is within tolerance but perhaps
            not the smallest; `find_islands` tells.
        report: is called with a line for each evaluation.

    Returns:
        A plan with the model's half policy as default and an entry for each island. It was measured as it is.

    Raises:
        NoPlanError: even with all layers as islands it isn't within tolerance. It is a ValueError.
        ValueError: the metric or the gradients aren't finite in float32 either, nothing computes in half, there is no
            batch, or an argument is out of range.

    Example:

    >>> with precision.PrecisionPlan().scope():
    ...     layers = [keras.layers.Rescaling(2.0**17, name="up"), keras.layers.Rescaling(2.0**-17, name="down")]
    ...     model = keras.Sequential([keras.Input([2]), *layers, keras.layers.ReLU(name="relu")])
    >>> batch = (np.ones([1, 2], "float32"), np.ones([1, 2], "float32"))
    >>> search_precision(model, [batch], keras.losses.MeanSquaredError(), 0.01).layers
    {'up': 'float32', 'down': 'float32'}
    """
    return find_islands(
        model,
        data,
        metric,
        tolerance,
        gradient_tolerance=gradient_tolerance,
        most_evaluations=most_evaluations,
        report=report,
        rounds=0,
    ).plan


def find_islands(
    model: keras.Model,
    data: Iterable,
    metric: metrics.Metric,
    tolerance: float,
    *,
    gradient_tolerance: float = GRADIENT_TOLERANCE,
    most_evaluations: int = MOST_EVALUATIONS,
    report: Callable[[str], None] | None = None,
    rounds: int = 5,
) -> Search:
    """Does what `search_precision` does, and tells all that was measured on the way.

    Args:
        model, data, metric, tolerance, gradient_tolerance, most_evaluations, report: as in `search_precision`.
        rounds: how often the pass of a training step (of inference, where the model isn't compiled) is timed in half,
            with the plan and in float32, in turn; 0: not at all.

    Returns:
        A `Search`.

    Raises:
        NoPlanError, ValueError: as `search_precision`.
    """
    if not (tolerance >= 0 and gradient_tolerance > 0):
        raise ValueError(
            f"search_precision: tolerance must be 0 or more and gradient_tolerance above 0, got {tolerance} and "
            f"{gradient_tolerance}"
        )
    if most_evaluations < 3:
        raise ValueError(f"search_precision: most_evaluations must be 3 or more, got {most_evaluations}")
    batches = [twins.tensors(batch) for batch in data]
    if not batches:
        raise ValueError("search_precision: data is empty; give at least one batch")
    trials = _Trials(
        model, batches, metric, tolerance, gradient_tolerance, most_evaluations, report or (lambda _: None)
    )
    with twins.without_randomness(model), compilation.activities_in_float32(model):
        half = trials.of(())
        found = sensitivity.measure(model, batches[0])
        costs = _costs(model, batches[0])
        islands, is_minimal = ([], True) if half.within else _search(model, trials, found, costs)
        seconds = trials.seconds(islands, rounds) if rounds else {}
    rows = [
        LayerCost(path, one.forward, one.backward, one.rank, *costs[path], path in islands)
        for path, one in found.items()
    ]
    return Search(
        trials.plan(islands), trials.name, tolerance, gradient_tolerance, trials.reference, half, trials.of(islands),
        rows, trials.count, is_minimal, seconds,
    )  # fmt: skip


def smallest(ranked: Sequence[str], costs: dict[str, float], passes: Callable[[Sequence[str]], bool]) -> list[str]:
    """Finds a smallest set that passes: steps 3, 4 and 6 of the search.

    Args:
        ranked: of which one is looked for, the likeliest first; all together pass.
        costs: of each; where either of two would do the cheaper one is taken.
        passes: tells of a set whether it does.
    """
    kept = sorted(ranked[: _shortest(ranked, passes)], key=lambda one: -costs[one])
    return _without_superfluous(_reduced(kept, kept, passes), costs, passes)


def _reduced(kept: list[str], part: list[str], passes: Callable[[Sequence[str]], bool]) -> list[str]:
    """What is left of a set that passes, when as much as can be of a part of it is given up."""
    if passes(fewer := [one for one in kept if one not in part]):
        return fewer
    if len(part) == 1:
        return kept
    middle = len(part) // 2
    return _reduced(_reduced(kept, part[:middle], passes), part[middle:], passes)


def _shortest(order: Sequence[str], passes: Callable[[Sequence[str]], bool]) -> int:
    """How many of the first of them pass; all of them do."""
    low, high = 0, 1
    while high < len(order) and not passes(order[:high]):
        low, high = high, 2 * high
    high = min(high, len(order))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(order[:middle]) else (middle, high)
    return high


def _without_superfluous(islands: list[str], costs, passes) -> list[str]:
    for one in sorted(islands, key=lambda one: -costs[one]):
        if passes(fewer := [other for other in islands if other != one]):
            return _without_superfluous(fewer, costs, passes)
    return islands


def _search(model, trials: "_Trials", found, costs) -> tuple[list[str], bool]:
    """The islands, and whether there were evaluations enough to show that none can be left out."""
    layers = sensitivity.half_layers(model)
    if not (all_of_them := trials.of(layers)).within:
        raise NoPlanError(
            f"search_precision: even with all layers as float32 islands {all_of_them}, beside {trials.reference} in "
            "float32: it is lost outside of the layers, as in the model's own call, or the tolerance is too small"
        )
    amounts = {path: multiply_adds + parameters for path, (multiply_adds, parameters) in costs.items()}

    def passes(islands) -> bool:
        return trials.of(islands).within

    ranked = sorted(layers, key=lambda path: -found[path].rank)  # stable: of equals the first
    try:
        islands = smallest(ranked, amounts, passes)
        blocks = list(islands)
        while blocks:
            block = blocks.pop()
            inside, others = sensitivity.half_layers(model, block), [one for one in islands if one != block]
            if inside and passes([*others, *inside]):
                ranked = sorted(inside, key=lambda path: -found[path].rank)
                chosen = smallest(ranked, amounts, lambda some, others=others: passes([*others, *some]))
                islands, blocks = [*others, *chosen], [*blocks, *chosen]
        return _without_superfluous(islands, amounts, passes), True
    except _EnoughError:
        return trials.best, False


def _costs(model: keras.Model, batch) -> dict[str, tuple[int, int]]:
    """Multiply-adds of a batch and parameters of each layer with what is inside it."""
    x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
    rows = workload.coverage(model, x).layers

    def inside(path: str) -> list[workload.LayerCoverage]:
        return [row for row in rows if row.path == path or row.path.startswith(f"{path}/")]

    return {
        row.path: (sum(one.multiply_adds for one in inside(row.path)), sum(one.parameters for one in inside(row.path)))
        for row in rows
    }


class _EnoughError(Exception):
    """All evaluations are used up."""


class _Trials:
    """Runs a model with some islands, and remembers what came out."""

    def __init__(self, model, batches, metric, tolerance, gradient_tolerance, most, report):
        self._default = precision.policy_of(_half_dtype(model))
        self._model, self._batches, self._metric = model, batches, metrics.Score(model, batches, metric)
        self.name = self._metric.name
        self._tolerance, self._gradient_tolerance = tolerance, gradient_tolerance
        self._most, self._report = most, report
        self._owners = taps.own_weights(model) if getattr(model, "compiled", False) else {}
        self._weights = [weight for own in self._owners.values() for weight in own]
        self._done: dict[frozenset, Trial] = {}
        self._scale = optimizer.FIRST_EXPONENT
        self.count = 0
        with twins.without_randomness(model), compilation.activities_in_float32(model):
            self._true, self.reference = self._in_float32()

    def seconds(self, islands: list[str], rounds: int) -> dict[str, float]:
        """Median seconds of a pass over the first batch: in half, with the islands, in float32, timed in turn."""

        def step(data):
            if self._weights:
                return twins.gradients(self._model, self._weights, data, 2.0**self._scale)
            x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
            return taps.inferred(self._model, x)

        functions = {}
        for name, some in ({"half": []} | ({"plan": islands} if islands else {})).items():
            with precision.keeping_policies(self._model):
                self.plan(some).apply(self._model)
                functions[name] = twins.traced(step, self._batches[:1])
        with precision.computing_in(self._model, "float32"):
            functions["float32"] = twins.traced(step, self._batches[:1])
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(rounds + 1):
            for name, function in functions.items():
                begin = time.perf_counter()
                tf.nest.map_structure(np.asarray, function(self._batches[0]))
                times[name].append(time.perf_counter() - begin)
        return {name: float(np.median(some[1:])) for name, some in times.items()}  # the first one warms up

    def plan(self, islands: Sequence[str]) -> precision.PrecisionPlan:
        """The plan of some islands."""
        places = {path: index for index, path in enumerate(precision.layers_by_path(self._model))}
        ordered = sorted(islands, key=places.__getitem__)
        return precision.PrecisionPlan(self._default, {re.escape(path): "float32" for path in ordered})

    @property
    def best(self) -> list[str]:
        """Of what was within tolerance the fewest islands."""
        return sorted(min((key for key, trial in self._done.items() if trial.within), key=len))

    def of(self, islands: Sequence[str]) -> Trial:
        """Runs the model with some islands, once."""
        key = frozenset(islands)
        if key not in self._done:
            if self.count == self._most:
                raise _EnoughError
            self.count += 1
            with precision.keeping_policies(self._model):
                self.plan(islands).apply(self._model)
                trial = self._done[key] = self._run()
            self._report(f"evaluation {self.count}: {_named(islands)} in float32: {trial}")
        return self._done[key]

    def _run(self) -> Trial:
        try:
            value = self._metric()
            trial = Trial(self._metric.name, value, abs(value - self.reference.value) <= self._tolerance)
            return self._with_gradients(trial) if trial.within and self._weights else trial
        except (TypeError, ValueError, tf.errors.InvalidArgumentError) as error:
            # An operation of a block that is given half by one of its layers and float32 by another.
            return Trial(self._metric.name, float("nan"), False, why=str(error).splitlines()[0])

    def _in_float32(self) -> tuple[list, Trial]:
        with precision.computing_in(self._model, "float32"):
            value = self._metric()
            if not np.isfinite(value):
                raise ValueError(f"search_precision: {self.name} is {value} in float32 too: there is nothing to keep")
            if not self._weights:
                return [], Trial(self.name, value, True)
            gradients = twins.traced(
                lambda data: twins.gradients(self._model, self._weights, data, 1.0)[1], self._batches
            )
            true = [gradients(data) for data in self._batches]
        for index, some in enumerate(true):
            for path, own in self._by_layer(some).items():
                if not all(np.isfinite(one).all() for one in own):
                    raise ValueError(
                        f"search_precision: gradients aren't finite in float32 either: {path}, batch {index}"
                    )
        return true, Trial(self.name, value, True, gradient=0.0)

    def _with_gradients(self, trial: Trial) -> Trial:
        """Looks for a loss scale at which all gradients are within tolerance: down from overflow, up from underflow."""
        errors = twins.traced(self._errors, self._batches, [tf.ones([])], self._true)
        scaled = self.plan(()).needs_loss_scaling
        bounds = (optimizer.LOWEST_EXPONENT, optimizer.HIGHEST_EXPONENT, self._scale)
        low, high, exponent = bounds if scaled else (0, 0, 0)
        while True:
            rows = []
            for data, true in zip(self._batches, self._true, strict=True):
                rows.append(errors(data, tf.constant(2.0**exponent), true).numpy())
                if not rows[-1].max(initial=0.0) <= self._gradient_tolerance:
                    break
            worst = np.max(rows, 0)
            at, finite = int(np.argmax(worst)), bool(np.isfinite(worst).all())
            within = bool(worst[at] <= self._gradient_tolerance)
            low, high = (exponent + 1, high) if finite else (low, exponent - 1)
            if within or low > high:
                break
            exponent = (low + high) // 2
        if within:
            self._scale = exponent if scaled else self._scale
        layer = list(self._owners)[at] or taps.MODEL
        scale = 2.0**exponent if scaled else None
        return dataclasses.replace(trial, within=within, gradient=float(worst[at]), layer=layer, scale=scale)

    def _errors(self, data, scale, true) -> tf.Tensor:
        """Relative error of each layer's weight gradients, infinite where they overflow."""
        _, half = twins.gradients(self._model, self._weights, data, scale)
        pairs = self._by_layer(list(zip(half, true, strict=True)))
        return tf.stack(
            [
                sensitivity.relative_error([one / scale for one, _ in own], [one for _, one in own])
                for own in pairs.values()
            ]
        )

    def _by_layer(self, some: list) -> dict[str, list]:
        left = iter(some)
        return {path: [next(left) for _ in own] for path, own in self._owners.items()}


def _half_dtype(model: keras.Model) -> str:
    found = precision.compute_dtypes(model)
    if dtype := next((dtype for dtype in precision.HALF_DTYPES if dtype in found), None):
        return dtype
    raise ValueError(
        f"search_precision: no layer of model {model.name!r} computes in half, but in {', '.join(sorted(found))}; "
        'build it under PrecisionPlan("mixed_float16").scope()'
    )


def _named(islands: Sequence[str]) -> str:
    return ", ".join(islands) if 0 < len(islands) < 4 else f"{len(islands) or 'no'} layers"
