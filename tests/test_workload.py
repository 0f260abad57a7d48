"""Coverage against counts by hand."""

import keras
import numpy as np
import pytest

from tfhalf import workload
from tfhalf.precision import PrecisionPlan


def test_coverage_counts_by_hand():
    with PrecisionPlan("mixed_float16").scope():
        inputs = keras.Input([8, 8, 4])
        x = keras.layers.Conv2D(6, 3, name="conv")(inputs)  # 6x6x6 outputs of 3x3x4
        x = keras.layers.Conv2D(6, 3, groups=2, padding="same", name="grouped")(x)  # 6x6x6 outputs of 3x3x3
        x = keras.layers.BatchNormalization(name="norm")(x)
        x = keras.layers.DepthwiseConv2D(3, name="depthwise")(x)  # 4x4x6 outputs of 3x3
        x = keras.layers.Conv2DTranspose(5, 2, strides=2, name="transposed")(x)  # 4x4x6 inputs to 2x2x5
        x = keras.layers.Reshape([16, 20])(x)
        x = keras.layers.LSTM(7, name="lstm")(x)  # 16 steps of (20 + 7) x 28
        model = keras.Model(inputs, keras.layers.Dense(3, dtype="float32", name="head")(x))
    rows = {row.path: row for row in workload.coverage(model).layers}
    assert rows["conv"].dtypes == {"float16": 6 * 6 * 6 * 36}
    assert rows["grouped"].dtypes == {"float16": 6 * 6 * 6 * 27}
    assert rows["depthwise"].dtypes == {"float16": 4 * 4 * 6 * 9}
    assert rows["transposed"].dtypes == {"float16": 4 * 4 * 6 * 20}
    assert rows["lstm/lstm_cell"].dtypes == {"float16": 16 * 27 * 28}
    assert rows["head"].dtypes == {"float32": 21}
    assert rows["head"].why == "its policy is float32"
    assert rows["norm"].why == "normalisation computes in float32"
    assert sum(row.parameters for row in rows.values()) == model.count_params()


def test_coverage_sees_through_a_policy():
    class Float32Inside(keras.layers.Dense):
        def call(self, inputs):
            return keras.ops.cast(keras.ops.matmul(keras.ops.cast(inputs, "float32"), self.kernel.value), "float16")

    with PrecisionPlan("mixed_float16").scope():
        model = keras.Sequential([keras.Input([4]), Float32Inside(2, autocast=False, name="liar")])
    measured = workload.coverage(model)
    assert measured.multiply_adds_in_half == 0
    assert "float32 although its policy is mixed_float16" in measured.islands["liar"]


def test_coverage_leaves_the_model_as_it_was(build_convnet, pictures):
    model = build_convnet()
    before = np.asarray(model(pictures))
    table = str(workload.coverage(model))
    assert "in half: " in table
    assert all("call" not in vars(layer) for layer in model.layers)
    np.testing.assert_array_equal(model(pictures), before)


def test_coverage_needs_shapes():
    model = keras.Sequential([keras.Input([None, 3]), keras.layers.Dense(2, name="dense")])
    with pytest.raises(ValueError, match="pass inputs="):
        workload.coverage(model)
    assert workload.coverage(model, np.ones([2, 5, 3], "float32")).layers[-1].multiply_adds == 2 * 5 * 3 * 2
