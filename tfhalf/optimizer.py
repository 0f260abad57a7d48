"""Loss scaling that makes the same, counted decision on every replica.

float16 can't hold numbers below 2^-24, and gradients are often that small. So the loss is multiplied by a scale
before back-propagation and the gradients are divided by it afterwards. One step, in this order:

1. reduce: the scaled gradients are summed over the replicas, in float32;
2. check: the step is taken only if all reduced gradients and every replica's loss are finite;
3. unscale, in float32; accumulate, where several batches make one step; clip (the inner optimizer does); update.

A skipped step changes no variable but the counters here. Where a gradient overflowed the scale is halved; where the
loss itself wasn't finite the scale isn't to blame and stays; `dynamic_growth_steps` good batches after its last change
it is doubled. It stays within bounds, and `max_consecutive_skips` skipped batches in a row end training.

Keras' own optimizer checks before it reduces, and looks at replica 0 only: one overflow elsewhere makes every weight
NaN, or lets workers wait for each other for ever. It clips each replica's part, lets the scale run to 0 (and then
0/0 becomes a weight) or to infinity (which never heals), and says nothing about it.

What layers do in the forward pass, as BatchNormalization's statistics, happens before an optimizer is asked;
`tfhalf.compile_model` takes that back on a skipped step.

Source: Micikevicius et al. 2018, section 3.2, https://arxiv.org/abs/1710.03740
"""

import contextlib
import threading
from collections.abc import Iterator

import keras
import tensorflow as tf

from tfhalf import precision

# Powers of 2 that the loss scale stays between, and starts at. Below 2^-14 float16 is subnormal; 2^15 is Keras' start.
LOWEST_EXPONENT, FIRST_EXPONENT, HIGHEST_EXPONENT = -14, 15, 24
_STRATEGIES = (
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
    tf.distribute.OneDeviceStrategy,
)
REMEDY = "look for NaN or huge values in the data, lower the learning rate, or compare with a float32 run"
# What Keras' base class accepts on any optimizer, and its defaults: on a wrapper it would have no effect.
_INNER_SETTINGS = {
    "weight_decay": None,
    "clipnorm": None,
    "global_clipnorm": None,
    "clipvalue": None,
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_overwrite_frequency": None,
    "loss_scale_factor": None,
}


@keras.saving.register_keras_serializable(package="tfhalf")
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """A Keras `LossScaleOptimizer` that is safe on several replicas, bounded and counted.

    It takes the place of Keras' own in `compile`, in a custom `train_step` and in a custom loop, on one device and
    under `MirroredStrategy` and `MultiWorkerMirroredStrategy`. In a custom loop call `scale_loss` inside the tape and
    `apply` in the same function.

    Args:
        inner_optimizer: the Keras optimizer that takes the unscaled step; clipping, weight decay, a moving average
            and schedules are its own settings.
        initial_scale: first scale, within the bounds. Default 2^15: one overflow costs one step.
        dynamic_growth_steps: good batches since the last change before the scale doubles, at least 1. Default 2000.
        min_scale: the scale never goes below. Default 2^-14, the smallest normal float16.
        max_scale: the scale never goes above. Default 2^24.
        gradient_accumulation_steps: good batches that make one step on the mean of their gradients, at least 1. A
            batch that is skipped is left out of the mean, and another one takes its place. Schedules and moving
            averages count steps, as if the batch were larger.
        max_consecutive_skips: skipped batches in a row that end training with an `InvalidArgumentError`. XLA drops that
            error (`jit_compile=True`): add `StopWhenStalled()` to the callbacks there. Default 50.
        name: name of the optimizer.
        **kwargs: what Keras' class takes for the sake of old saved models.

    Raises:
        ValueError: a bound is out of order, a number is out of range, the inner optimizer scales or accumulates
            itself, or a setting belongs to the inner optimizer.

    Example:

    >>> optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8.0)
    >>> weight = keras.Variable([1.0])
    >>> with tf.GradientTape() as tape:
    ...     loss = optimizer.scale_loss(weight * weight)
    >>> optimizer.apply([tape.gradient(loss, weight.value)], [weight])
    >>> float(weight[0]), optimizer.scale, optimizer.steps_taken, optimizer.steps_skipped
    (0.8..., 8.0, 1, 0)
    """

    def __init__(
        self,
        inner_optimizer,
        initial_scale=2.0**FIRST_EXPONENT,
        dynamic_growth_steps=2000,
        min_scale=2.0**LOWEST_EXPONENT,
        max_scale=2.0**HIGHEST_EXPONENT,
        gradient_accumulation_steps=1,
        max_consecutive_skips=50,
        name=None,
        **kwargs,
    ):
        if isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError("LossScaleOptimizer: inner_optimizer scales the loss already; pass the one inside it")
        if not 0 < min_scale <= initial_scale <= max_scale < float("inf"):
            raise ValueError(
                f"LossScaleOptimizer: expected 0 < min_scale <= initial_scale <= max_scale, "
                f"got {min_scale}, {initial_scale}, {max_scale}"
            )
        accumulation = 1 if gradient_accumulation_steps is None else gradient_accumulation_steps  # Keras' word for 1
        for argument, value in (
            ("dynamic_growth_steps", dynamic_growth_steps),
            ("max_consecutive_skips", max_consecutive_skips),
            ("gradient_accumulation_steps", accumulation),
        ):
            if value < 1 or value != int(value):
                raise ValueError(f"LossScaleOptimizer: {argument} must be at least 1, and whole; got {value}")
        super().__init__(inner_optimizer, initial_scale, dynamic_growth_steps, name=name, **kwargs)
        self.min_scale = min_scale
        self.max_scale = max_scale
        self.gradient_accumulation_steps = int(accumulation)
        self.max_consecutive_skips = max_consecutive_skips
        self._losses = _Losses()
        self._refuse_inner_accumulation()

    def __setattr__(self, name, value):
        if name in _INNER_SETTINGS and value != _INNER_SETTINGS[name]:
            raise AttributeError(f"LossScaleOptimizer: {name} has no effect here; set it on inner_optimizer")
        super().__setattr__(name, value)

    def build(self, variables):
        """Makes the scale, the counters, the accumulators and the inner optimizer's variables.

        Raises:
            ValueError: it was built for other variables before, as when layers were unfrozen since.
        """
        if self.built:
            known, asked = ({self._var_key(v) for v in some} for some in (self._trainable_variables, variables))
            if not asked <= known:
                raise ValueError(
                    f"LossScaleOptimizer: built for {len(known)} variables, and {len(asked - known)} of the "
                    f"{len(asked)} given now aren't among them; compile the model with a new optimizer"
                )
            return
        self._skipped = self._counter("steps_skipped")
        self._consecutive = self._counter("consecutive_skips")
        self._accumulated = self._counter("accumulated_batches")
        # Keras' build would make accumulators too, in the variables' dtype and used by nobody.
        steps, self.gradient_accumulation_steps = self.gradient_accumulation_steps, None
        super().build(variables)
        self.gradient_accumulation_steps = steps
        self._accumulators = [self._accumulator(v) for v in variables] if steps > 1 else []
        self._refuse_inner_accumulation()  # again: a MultiOptimizer may know its optimizers only now

    def _counter(self, name: str) -> keras.Variable:
        return self.add_variable(shape=(), dtype="int64", initializer="zeros", aggregation="none", name=name)

    def _accumulator(self, variable) -> keras.Variable:
        dtype = "float32" if tf.as_dtype(variable.dtype).name in precision.HALF_DTYPES else variable.dtype
        with self._distribution_strategy.extended.colocate_vars_with(getattr(variable, "value", variable)):
            return self.add_variable(shape=variable.shape, dtype=dtype, name="gradient_accumulator")

    def _refuse_inner_accumulation(self) -> None:
        for optimizer in parts(self):
            if optimizer.gradient_accumulation_steps:
                raise ValueError(
                    f"LossScaleOptimizer: {optimizer.name} accumulates gradients itself, and would take in one step "
                    "what was scaled in several; set gradient_accumulation_steps on LossScaleOptimizer instead"
                )

    @property
    def scale(self):
        """The loss scale now: a float before and after `build`, a float32 scalar tensor inside a traced function."""
        return float(self.initial_scale) if not self.built else _read(self.dynamic_scale, float)

    @property
    def steps_taken(self):
        """Steps that changed the weights: an int, or an int scalar tensor inside a traced function."""
        return _read(self.iterations, int)

    @property
    def steps_skipped(self):
        """Batches that were skipped: an int, or an int64 scalar tensor inside a traced function."""
        return 0 if not self.built else _read(self._skipped, int)

    @property
    def consecutive_skips(self):
        """Batches skipped since the last good one: an int, or an int64 scalar tensor inside a traced function."""
        return 0 if not self.built else _read(self._consecutive, int)

    @property
    def batches_seen(self):
        """Batches that `apply` was called for: taken, accumulated and skipped; an int."""
        waiting = 0 if not self.built else _read(self._accumulated, int)
        return self.steps_taken * self.gradient_accumulation_steps + waiting + self.steps_skipped

    @property
    def stalled(self):
        """Whether the last `max_consecutive_skips` batches were all skipped."""
        return self.consecutive_skips >= self.max_consecutive_skips

    @tf.autograph.experimental.do_not_convert
    def scale_loss(self, loss):
        """Returns the loss times the scale, and notes for the next `apply` whether it was finite.

        Args:
            loss: float `[...]`, this replica's part of the loss.

        Returns:
            float32 `[...]` (float64 of float64): a half loss times 2^15 would overflow by itself.
        """
        loss = precision.at_least_float32(tf.convert_to_tensor(loss))
        self._losses.note(tf.reduce_all(tf.math.is_finite(loss)))
        scale = self.dynamic_scale if self.built else self.initial_scale
        return tf.multiply(loss, tf.cast(scale, loss.dtype))

    @tf.autograph.experimental.do_not_convert
    def apply(self, grads, trainable_variables=None):
        """Takes or skips one step.

        Args:
            grads: this replica's gradients of the scaled loss, one tensor, IndexedSlices or None for each variable.
            trainable_variables: the variables; may be left out once built.

        Raises:
            RuntimeError: `scale_loss` wasn't called in the same function before, or the distribution strategy isn't
                one of MirroredStrategy, MultiWorkerMirroredStrategy and OneDeviceStrategy.
            ValueError: the number of gradients isn't that of the variables, or all of them are None.
            tf.errors.InvalidArgumentError: the last `max_consecutive_skips` batches were all skipped.
        """
        strategy = self._strategy()
        finite_loss = self._losses.take()
        if not self.built:
            with tf.name_scope(self.name):
                self.build(list(trainable_variables))
        variables = list(self._trainable_variables if trainable_variables is None else trainable_variables)
        if len(grads) != len(variables):
            raise ValueError(f"LossScaleOptimizer: got {len(grads)} gradients for {len(variables)} variables")
        if all(grad is None for grad in grads):
            raise ValueError("LossScaleOptimizer: no variable has a gradient: the loss doesn't depend on any of them")
        replicated = strategy.num_replicas_in_sync > 1
        if replicated or self.gradient_accumulation_steps > 1:
            self._refuse_overwritten(variables)
        grads = [None if grad is None else _map_values(precision.at_least_float32, grad) for grad in grads]
        num_bad_losses = 1.0 - tf.cast(finite_loss, tf.float32)
        if replicated:
            grads, num_bad_losses = _reduce_sum(grads, num_bad_losses)
        if tf.__internal__.distribute.strategy_supports_no_merge_call():
            # XLA on GPUs: no thread of one replica waits for another one's, each decides on the same reduced values.
            self._step(lambda branch: branch(grads, variables), grads, num_bad_losses)
            return

        def decide(strategy, grads, num_bad_losses, variables):
            # In cross-replica context, because a branch of a cond in replica context can't update mirrored variables.
            first, first_num_bad = _of_first_replica(strategy, (grads, num_bad_losses))
            run = strategy.extended.call_for_each_replica
            self._step(lambda branch: run(branch, args=(grads, variables)), first, first_num_bad)

        tf.distribute.get_replica_context().merge_call(decide, args=(grads, num_bad_losses, variables))

    def apply_gradients(self, grads_and_vars):
        """Calls `apply` with pairs of gradient and variable; returns the inner optimizer's `iterations`."""
        grads, variables = zip(*grads_and_vars, strict=True)
        self.apply(list(grads), list(variables))
        return self.iterations

    def check_finite(self, grads):
        """Returns whether all gradients are finite, a bool scalar; IndexedSlices stay sparse."""
        values = [getattr(grad, "values", grad) for grad in grads if grad is not None]
        return tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(value)) for value in values]))

    def _step(self, run, grads, num_bad_losses) -> None:
        """Decides on reduced gradients; `run` calls one of the branches below for each replica."""
        finite_loss = tf.equal(num_bad_losses, 0.0)
        finite_grads = self.check_finite(grads)
        finite = tf.logical_and(finite_loss, finite_grads)
        scale = tf.identity(self.dynamic_scale.value)  # what these gradients were scaled by, before it is changed
        self._note(finite, finite_loss, scale)

        def update(grads, variables):
            grads = self._unscale(grads, variables, scale)
            if self.gradient_accumulation_steps > 1:
                grads = self._mean_with_accumulated(grads, variables)
            self.inner_optimizer.apply(grads, trainable_variables=variables)

        def accumulate(grads, variables):
            self._accumulate(self._unscale(grads, variables, scale), variables)

        def update_and_average():
            run(update)
            self._overwrite_with_averages(overwrite_frequencies)

        def take():
            if self.gradient_accumulation_steps == 1:
                update_and_average()
                return
            last = tf.equal(self._accumulated.value, self.gradient_accumulation_steps - 1)
            tf.cond(last, lambda: _call(update_and_average), lambda: _call(run, accumulate))
            self._accumulated.assign(tf.where(last, tf.constant(0, tf.int64), self._accumulated.value + 1))

        with self._inner_without_reduction() as overwrite_frequencies:
            tf.cond(finite, lambda: _call(take), lambda: _call(self._refuse_to_stall, finite_loss, scale))

    def _note(self, finite, finite_loss, scale) -> None:
        """Moves the scale and counts."""
        one, zero = tf.ones([], tf.int64), tf.zeros([], tf.int64)
        self._skipped.assign_add(tf.where(finite, zero, one))
        self._consecutive.assign(tf.where(finite, zero, self._consecutive.value + one))
        good = tf.identity(self.step_counter.value)
        grow = tf.logical_and(finite, tf.greater_equal(good, self.dynamic_growth_steps - 1))
        overflow = tf.logical_and(tf.logical_not(finite), finite_loss)
        factor = tf.where(grow, 2.0, tf.where(overflow, 0.5, 1.0))
        self.dynamic_scale.assign(tf.clip_by_value(scale * factor, self.min_scale, self.max_scale))
        good = tf.where(tf.logical_or(grow, overflow), tf.zeros_like(good), good + tf.cast(finite, good.dtype))
        self.step_counter.assign(good)

    def _refuse_to_stall(self, finite_loss, scale) -> None:
        good = tf.less(self._consecutive.value, self.max_consecutive_skips)
        told = [
            "LossScaleOptimizer: every batch was skipped, this many in a row:",
            self._consecutive.value,
            "; the loss was finite (1) or not (0):",
            tf.cast(finite_loss, tf.int32),
            "; the loss scale was:",
            scale,
            f"; {REMEDY}",
        ]
        if not tf.executing_eagerly():
            tf.debugging.Assert(good, told)
        elif not good:
            words = [word if isinstance(word, str) else f"{word.numpy():g}" for word in told]
            raise tf.errors.InvalidArgumentError(None, None, f"assertion failed: [{'] ['.join(words)}]")

    def _unscale(self, grads, variables, scale) -> list:
        def unscale(values):
            return tf.divide(values, tf.cast(scale, values.dtype))

        return [
            grad if grad is None or self._overwrite_variable_with_gradient(variable) else _map_values(unscale, grad)
            for grad, variable in zip(grads, variables, strict=True)
        ]

    def _accumulate(self, grads, variables) -> None:
        for grad, variable in zip(grads, variables, strict=True):
            if grad is None:
                continue
            accumulator = self._accumulators[self._get_variable_index(variable)].value
            if isinstance(grad, tf.IndexedSlices):
                accumulator.scatter_add(grad)
            else:
                accumulator.assign_add(grad)

    def _mean_with_accumulated(self, grads, variables) -> list:
        """Adds the last batch's gradients, and returns the means and empties the accumulators."""
        self._accumulate(grads, variables)
        means = []
        for grad, variable in zip(grads, variables, strict=True):
            accumulator = self._accumulators[self._get_variable_index(variable)]
            means.append(None if grad is None else accumulator.value / self.gradient_accumulation_steps)
            accumulator.assign(tf.zeros_like(accumulator.value))
        return means

    @contextlib.contextmanager
    def _inner_without_reduction(self) -> Iterator[list[int | None]]:
        """Lets the inner optimizers take reduced gradients as they are, and leaves overwriting weights by their
        averages to us, while the block runs; gives the frequencies of that."""
        # Private Keras: its TensorFlow optimizer sums gradients over replicas after clipping, with no way to be told
        # that they are sums already; and its cond around overwriting fails under a strategy. test_optimizer.py compares
        # two replicas with one device, and fails if that changes.
        optimizers = parts(self)
        frequencies = [optimizer.ema_overwrite_frequency for optimizer in optimizers]
        for optimizer in optimizers:
            optimizer._all_reduce_sum_gradients = lambda grads_and_vars: grads_and_vars
            optimizer.ema_overwrite_frequency = None
        try:
            yield frequencies
        finally:
            for optimizer, frequency in zip(optimizers, frequencies, strict=True):
                del optimizer._all_reduce_sum_gradients
                optimizer.ema_overwrite_frequency = frequency

    def _overwrite_with_averages(self, frequencies) -> None:
        for optimizer, frequency in zip(parts(self), frequencies, strict=True):
            if frequency:
                due = tf.equal(tf.convert_to_tensor(optimizer.iterations) % frequency, 0)
                # Private Keras: the variables that it was built for.
                overwrite, variables = optimizer.finalize_variable_values, optimizer._trainable_variables
                tf.cond(due, lambda f=overwrite, v=variables: _call(f, v), lambda: None)

    def _strategy(self) -> tf.distribute.Strategy:
        strategy = tf.distribute.get_strategy()
        if tf.distribute.has_strategy() and not isinstance(strategy, _STRATEGIES):
            raise RuntimeError(
                f"LossScaleOptimizer: {type(strategy).__name__} isn't supported; use MirroredStrategy for the devices "
                "of one machine or MultiWorkerMirroredStrategy for several machines (a TPU computes in bfloat16, which "
                "needs no loss scaling)"
            )
        if tf.distribute.in_cross_replica_context():
            raise RuntimeError("LossScaleOptimizer: call apply() inside the function given to strategy.run()")
        return strategy

    def _refuse_overwritten(self, variables) -> None:
        overwritten = [v for v in variables if self._overwrite_variable_with_gradient(v)]
        if overwritten:
            raise RuntimeError(
                f"LossScaleOptimizer: {overwritten[0].path} is overwritten with its gradient (float8), which is only "
                "possible on one device and without gradient accumulation"
            )

    def get_config(self):
        """Returns what `from_config` needs to make an equal one."""
        return super().get_config() | {
            "min_scale": self.min_scale,
            "max_scale": self.max_scale,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "max_consecutive_skips": self.max_consecutive_skips,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Makes an optimizer from `get_config`'s value, which stays as it is."""
        return super().from_config(dict(config), custom_objects)


def parts(optimizer: keras.optimizers.Optimizer) -> list[keras.optimizers.Optimizer]:
    """Returns the optimizers that update variables: itself, the one that is wrapped, or a MultiOptimizer's."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return list(getattr(inner, "optimizers", [inner]))


class _Losses:
    """Whether the losses given to `scale_loss` since the last `apply` were finite, for each replica's thread."""

    def __init__(self):
        self._noted: dict[int, tuple[tf.Graph | None, tf.Tensor]] = {}

    def note(self, finite: tf.Tensor) -> None:
        graph, thread = _graph(), threading.get_ident()
        before = self._noted.get(thread)
        if before and before[0] is graph:  # a step may have several losses
            finite = tf.logical_and(before[1], finite)
        self._noted[thread] = graph, finite

    def take(self) -> tf.Tensor:
        noted, graph = self._noted.pop(threading.get_ident(), None), _graph()
        visible = [graph]
        while visible[-1] is not None:  # a branch of a cond sees what is around it
            visible.append(getattr(visible[-1], "outer_graph", None))
        if not noted or not any(noted[0] is graph for graph in (visible[:-1] or visible)):
            raise RuntimeError(
                "LossScaleOptimizer: apply() without scale_loss() before it in the same function would take a step "
                "that is too small by the loss scale; compute gradients of optimizer.scale_loss(loss), inside the tape"
            )
        return noted[1]


def _graph() -> tf.Graph | None:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _read(variable, kind: type):
    """The value of a variable or tensor, of one replica: a Python number, or a tensor while a graph is made."""
    return kind(variable.numpy()) if tf.executing_eagerly() else tf.convert_to_tensor(variable.value)


def _call(function, *arguments) -> None:
    """Calls a branch of a cond, whose branches must return the same: nothing."""
    function(*arguments)


def _map_values(function, grad):
    """Applies a function to a gradient's numbers; IndexedSlices stay sparse."""
    if isinstance(grad, tf.IndexedSlices):
        return tf.IndexedSlices(function(grad.values), grad.indices, grad.dense_shape)
    return function(grad)


def _reduce_sum(grads: list, num_bad_losses) -> tuple[list, tf.Tensor]:
    """Sums over replicas, all in one call, and leaves out the gradients that are None."""
    present = [grad for grad in grads if grad is not None]
    *present, num_bad_losses = tf.distribute.get_replica_context().all_reduce(
        tf.distribute.ReduceOp.SUM, [*present, num_bad_losses]
    )
    present = iter(present)
    return [None if grad is None else next(present) for grad in grads], num_bad_losses


def _of_first_replica(strategy: tf.distribute.Strategy, values):
    return tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], values)
