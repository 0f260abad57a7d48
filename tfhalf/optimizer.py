"""Loss scaling with bounds and a count of the steps that it skipped.

float16 can't hold numbers below 2^-24, and gradients are often that small. So the loss is multiplied by a scale
before back-propagation and the gradients are divided by it afterwards. Where a scaled gradient overflows the
step is skipped and the scale halved; after `dynamic_growth_steps` good steps in a row it is doubled.

Keras' own optimizer lets the scale run to 0 (and then 0/0 becomes a weight) or to infinity (which never heals),
and says nothing about it. This one keeps the scale within bounds, counts, and knows when to give up:
`tfhalf.training` stops a run whose last `max_consecutive_skips` steps were all skipped.

It is for one device: under a distribution strategy it raises, because Keras looks at one replica's gradients only.

Source: Micikevicius et al. 2018, section 3.2, https://arxiv.org/abs/1710.03740
"""

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="tfhalf")
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """A Keras `LossScaleOptimizer` with a bounded scale and counters.

    Args:
        inner_optimizer: the Keras optimizer that takes the unscaled step.
        initial_scale: first scale, within the bounds. Default 2^15: one overflow costs one step.
        dynamic_growth_steps: good steps in a row before the scale doubles, at least 1. Default 2000.
        min_scale: the scale never goes below. Default 2^-14, the smallest normal float16.
        max_scale: the scale never goes above. Default 2^24.
        gradient_accumulation_steps: only 1 is possible so far.
        max_consecutive_skips: skipped steps in a row after which `stalled` is true. Default 50.
        name: name of the optimizer.

    Raises:
        ValueError: a bound is out of order, or a number is out of range.

    Example:

    >>> optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8.0)
    >>> optimizer.build([keras.Variable([1.0])])
    >>> float(optimizer.scale), optimizer.steps_skipped
    (8.0, 0)
    """

    def __init__(
        self,
        inner_optimizer,
        initial_scale=2.0**15,
        dynamic_growth_steps=2000,
        min_scale=2.0**-14,
        max_scale=2.0**24,
        gradient_accumulation_steps=1,
        max_consecutive_skips=50,
        name=None,
    ):
        if isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError("LossScaleOptimizer: inner_optimizer scales the loss already; pass the one inside it")
        if not 0 < min_scale <= initial_scale <= max_scale < float("inf"):
            raise ValueError(
                f"LossScaleOptimizer: expected 0 < min_scale <= initial_scale <= max_scale, "
                f"got {min_scale}, {initial_scale}, {max_scale}"
            )
        for argument, value in (
            ("dynamic_growth_steps", dynamic_growth_steps),
            ("max_consecutive_skips", max_consecutive_skips),
        ):
            if value < 1:
                raise ValueError(f"LossScaleOptimizer: {argument} must be at least 1, got {value}")
        if gradient_accumulation_steps != 1:
            raise ValueError(
                "LossScaleOptimizer: gradient_accumulation_steps other than 1 isn't possible yet, got "
                f"{gradient_accumulation_steps}; use a larger batch, or set it on inner_optimizer"
            )
        super().__init__(inner_optimizer, initial_scale, dynamic_growth_steps, name=name)
        self.min_scale = min_scale
        self.max_scale = max_scale
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.max_consecutive_skips = max_consecutive_skips

    def build(self, variables):
        """Makes the counters beside Keras' own variables."""
        if self.built:
            return
        self._skipped = self._counter("steps_skipped")
        self._consecutive = self._counter("consecutive_skips")
        super().build(variables)

    def _counter(self, name: str) -> keras.Variable:
        return self.add_variable(shape=(), dtype="int64", initializer="zeros", aggregation="none", name=name)

    @property
    def scale(self) -> float:
        """The loss scale now, before and after `build`."""
        return float(keras.ops.convert_to_numpy(self.dynamic_scale)) if self.built else float(self.initial_scale)

    @property
    def steps_taken(self) -> int:
        """Steps that changed the weights."""
        return int(keras.ops.convert_to_numpy(self.iterations)) if self.built else 0

    @property
    def steps_skipped(self) -> int:
        """Steps that were skipped because a gradient wasn't finite."""
        return int(keras.ops.convert_to_numpy(self._skipped)) if self.built else 0

    @property
    def consecutive_skips(self) -> int:
        """Steps skipped since the last one that was taken."""
        return int(keras.ops.convert_to_numpy(self._consecutive)) if self.built else 0

    @property
    def stalled(self) -> bool:
        """Whether the last `max_consecutive_skips` steps were all skipped."""
        return self.consecutive_skips >= self.max_consecutive_skips

    def scale_loss(self, loss):
        """Returns the loss in float32 times the scale: a half loss times 2^15 would overflow by itself."""
        scale = self.dynamic_scale if self.built else self.initial_scale
        return keras.ops.multiply(keras.ops.cast(loss, "float32"), scale)

    def apply(self, grads, trainable_variables=None):
        """Takes or skips one step.

        Args:
            grads: gradients of the scaled loss, one for each variable.
            trainable_variables: the variables; may be left out once built.

        Raises:
            RuntimeError: called under a distribution strategy with several replicas.
        """
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            raise RuntimeError(
                "LossScaleOptimizer: several replicas aren't supported yet, because Keras would look for an overflow "
                "in one replica's gradients only; train on one device"
            )
        super().apply(grads, trainable_variables)

    # Private Keras: the next two methods are the branches of its `apply`, and the only place to bound the scale and to
    # count inside the branch that was taken. test_optimizer.py fails when Keras no longer calls them.

    def _stateful_handle_finite_grads(self, grads, trainable_variables):
        super()._stateful_handle_finite_grads(grads, trainable_variables)
        self._consecutive.assign(0)
        self._keep_within_bounds()

    def _stateful_handle_non_finite_grads(self):
        super()._stateful_handle_non_finite_grads()
        self._skipped.assign_add(1)
        self._consecutive.assign_add(1)
        self._keep_within_bounds()

    def _keep_within_bounds(self):
        self.dynamic_scale.assign(keras.ops.clip(self.dynamic_scale, self.min_scale, self.max_scale))

    def get_config(self):
        """Returns what `from_config` needs to make an equal one."""
        return super().get_config() | {
            "min_scale": self.min_scale,
            "max_scale": self.max_scale,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "max_consecutive_skips": self.max_consecutive_skips,
        }
