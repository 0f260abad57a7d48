"""What Keras' optimizers lack for Transformers: a rate that warms up and cools down, and Muon for attention."""

import math

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("tfhalf.apps")
class InverseSquareRoot(keras.optimizers.schedules.LearningRateSchedule):
    """A rate that rises in a line, falls with the square root of the step, and at the end in a line to 0.

    Args:
        learning_rate: the highest one.
        warmup_steps: when it is reached, 1 or more.
        cooldown_steps: how long the last fall is, 1 or more.
        num_steps: when it is over.

    Sources: Vaswani et al. 2017, section 5.3, scaled to its highest rate; Zhai et al. 2022, "Scaling vision
    transformers", arXiv:2106.04560 (cooldown).
    """

    def __init__(self, learning_rate: float, warmup_steps: int, cooldown_steps: int, num_steps: int):
        self.learning_rate, self.warmup_steps = learning_rate, warmup_steps
        self.cooldown_steps, self.num_steps = cooldown_steps, num_steps

    def __call__(self, step):
        """Returns the rate of a step, counted from 0; not 0 before `num_steps`."""
        step = tf.cast(step, tf.float32)
        ratio = (step + 1.0) / self.warmup_steps
        left = tf.clip_by_value((self.num_steps - step) / self.cooldown_steps, 0.0, 1.0)
        return self.learning_rate * tf.minimum(ratio, tf.math.rsqrt(ratio)) * left

    def get_config(self):
        """Returns what `__init__` takes."""
        names = ("learning_rate", "warmup_steps", "cooldown_steps", "num_steps")
        return {name: getattr(self, name) for name in names}


@keras.saving.register_keras_serializable("tfhalf.apps")
class Muon(keras.optimizers.Muon):
    """Muon for kernels of attention and of dense layers, Adam for everything else.

    Keras' Muon takes variables with two axes: no kernel of attention, which has three, but its biases. Here kernels of
    attention are the square matrices that all heads make together. (Their decay is `adam_weight_decay` still.)

    Args:
        learning_rate: of both, a number or a schedule.
        settings: as `keras.optimizers.Muon` takes them; `exclude_layers` are the biases unless it is given.

    Half precision: gradients, momenta and the iteration are float32, like the weights.

    Sources: https://github.com/KellerJordan/Muon; Liu et al. 2025, "Muon is scalable for LLM training",
    arXiv:2502.16982 (its steps are scaled to be as large as Adam's, so that both take one rate).
    """

    def __init__(self, learning_rate=0.001, **settings):
        super().__init__(learning_rate, **({"exclude_layers": ["/bias$"]} | settings))

    def add_variable_from_reference(self, reference_variable, name=None, **settings):
        """Makes a state of a variable; no velocity for a kernel of attention, which tells Keras to take Muon."""
        shape = reference_variable.shape
        is_attention = reference_variable.path.endswith("/kernel") and len(shape) == 3
        if name == "velocity" and is_attention and math.prod(shape) == max(shape) ** 2:
            return None
        return super().add_variable_from_reference(reference_variable, name, **settings)

    def zeropower_via_newtonschulz5(self, x, steps: int):
        """Returns the nearest orthogonal matrix, roughly, in the shape of x."""
        return keras.ops.reshape(super().zeropower_via_newtonschulz5(_as_matrix(x), steps), x.shape)

    def lr_adjust(self, x):
        """Returns a step as large as Adam's would be."""
        return keras.ops.reshape(super().lr_adjust(_as_matrix(x)), x.shape)


def _as_matrix(x):
    """Returns `[width, heads, head width]` and `[heads, head width, width]` as `[width, width]`."""
    return x if len(x.shape) == 2 else keras.ops.reshape(x, [max(x.shape), -1])
