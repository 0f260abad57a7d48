"""A network in which overflows can be planted, forward and backward, without tracing it again."""

import keras
import tensorflow as tf

import tfhalf


class Planted(keras.layers.Dense):
    """Dense, in which an overflow can be planted: of what it puts out, or of the gradient of what it takes in.

    It acts in rows whose mark is 1.
    """

    def build(self, input_shape):
        super().build(input_shape)
        self.factors = [
            self.add_weight(shape=[], initializer="ones", trainable=False, autocast=False, name=name)
            for name in ("forward", "backward")
        ]

    def plant(self, kind: str | None) -> None:
        """Plants in the "forward" or "backward" pass; None: nowhere any more."""
        for name, factor in zip(("forward", "backward"), self.factors, strict=True):
            factor.assign(1e30 if name == kind else 1.0)

    def call(self, x, mark):
        mark = tf.cast(mark, tf.float32)
        forward, backward = (1.0 + mark * (tf.convert_to_tensor(factor) - 1.0) for factor in self.factors)

        def times(value, factor):
            return tf.cast(tf.cast(value, tf.float32) * factor, value.dtype)

        @tf.custom_gradient
        def through(x):
            return x, lambda gradient: times(gradient, backward)

        return times(super().call(through(x)), forward)


def build(depth: int) -> tuple[keras.Model, dict[str, Planted]]:
    """A network of residual blocks of `Planted` layers in mixed_float16: float32 `[batch, 16]` to `[batch, 4]`.

    Returns:
        The model, and the layers by their paths. A row's first number is its mark.
    """
    keras.utils.set_random_seed(1)
    with tfhalf.PrecisionPlan().scope():
        inputs = keras.Input([16])
        mark = keras.layers.Lambda(lambda x: x[:, :1], dtype="float32", name="mark")(inputs)
        x = keras.layers.Dense(16, name="first")(inputs)
        for index in range(depth):
            within, marked = keras.Input([16]), keras.Input([1], dtype="float32")
            y = Planted(16, activation="relu", name="a")(within, mark=marked)
            y = keras.layers.LayerNormalization(name="norm")(y)
            y = keras.layers.Dropout(0.1, name="drop")(y)
            y = Planted(16, name="b")(y, mark=marked)
            y = keras.layers.Add(name="add")([within, y])
            x = keras.Model([within, marked], y, name=f"block_{index}")([x, mark])
        model = keras.Model(inputs, keras.layers.Dense(4, dtype="float32", name="head")(x))
    layers = tfhalf.precision.layers_by_path(model)
    return model, {path: layer for path, layer in layers.items() if isinstance(layer, Planted)}
