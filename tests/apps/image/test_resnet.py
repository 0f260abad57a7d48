"""The block against numpy, and its shapes."""

import keras
import numpy as np
import pytest

from apps.image import resnet


@pytest.mark.parametrize(("filters", "stride"), [(8, 1), (12, 1), (8, 2)])
def test_block_has_a_projection_where_shapes_change(filters, stride):
    inputs = keras.Input([9, 9, 8])
    model = keras.Model(inputs, resnet.residual_block(inputs, filters, stride, "block"))
    side = -(-9 // stride)
    assert model.output.shape == (None, side, side, filters)
    names = {layer.name for layer in model.layers}
    assert ("block_shortcut_conv" in names) is ((filters, stride) != (8, 1))


def test_block_adds_its_input():
    inputs = keras.Input([5, 5, 4])
    model = keras.Model(inputs, resnet.residual_block(inputs, 4, 1, "block"))
    model.get_layer("block_b_norm").gamma.assign(np.zeros(4))
    x = np.random.default_rng(0).normal(size=[2, 5, 5, 4]).astype("float32")
    np.testing.assert_allclose(model(x, training=False), np.maximum(x, 0), atol=1e-6)
