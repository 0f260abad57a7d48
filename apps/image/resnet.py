"""The residual block that the networks of image tasks are built from.

Source: He et al. 2016, "Deep residual learning for image recognition", section 3.3 (projection shortcuts, option B).
"""

import keras


def residual_block(x, filters: int, stride: int, name: str):
    """Two 3x3 convolutions and a shortcut around them.

    Args:
        x: half or float32 `[batch, height, width, channels]`.
        filters: channels of the result.
        stride: 1, or 2 to halve height and width.
        name: prefix of the layers' names.

    Returns:
        `[batch, ceil(height / stride), ceil(width / stride), filters]`.
    """
    y = conv_norm(x, filters, 3, stride, f"{name}_a")
    y = keras.layers.ReLU(name=f"{name}_a_relu")(y)
    y = conv_norm(y, filters, 3, 1, f"{name}_b")
    if stride != 1 or x.shape[-1] != filters:
        x = conv_norm(x, filters, 1, stride, f"{name}_shortcut")
    y = keras.layers.Add(name=f"{name}_add")([x, y])
    return keras.layers.ReLU(name=f"{name}_relu")(y)


def conv_norm(x, filters: int, size: int, stride: int, name: str):
    """A convolution without bias, and BatchNormalization."""
    x = keras.layers.Conv2D(
        filters, size, stride, padding="same", use_bias=False, kernel_initializer="he_normal", name=f"{name}_conv"
    )(x)
    return keras.layers.BatchNormalization(momentum=0.9, name=f"{name}_norm")(x)
