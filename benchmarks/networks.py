"""The reference networks that speed is measured on, with random inputs of their kind.

`resnet`: 64x64x3 pictures, batch 32, three stages of two basic blocks (He et al. 2016); 83 GFLOP a step. `encoder`:
128 tokens, batch 16, four pre-norm blocks of width 512 with 8 heads (Vaswani et al. 2017, Xiong et al. 2020); 161 GFLOP
a step. Both end in ten float32 logits.
"""

import keras
import numpy as np

_CLASSES = 10
_VOCABULARY = 8000
_TOKENS = 128
_WIDTH = 512


def build_resnet() -> keras.Model:
    """Pictures float32 `[batch, 64, 64, 3]` to logits float32 `[batch, 10]`, under the global policy."""
    pictures = keras.Input([64, 64, 3])
    x = keras.layers.ReLU()(_conv_norm(pictures, 64, 3, 1))
    for filters in (64, 128, 256):
        for block in range(2):
            stride = 2 if block == 0 else 1
            y = keras.layers.ReLU()(_conv_norm(x, filters, 3, stride))
            y = _conv_norm(y, filters, 3, 1)
            if stride != 1:
                x = _conv_norm(x, filters, 1, stride)
            x = keras.layers.ReLU()(keras.layers.Add()([x, y]))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(pictures, keras.layers.Dense(_CLASSES, dtype="float32")(x))


def _conv_norm(x, filters: int, size: int, stride: int):
    x = keras.layers.Conv2D(filters, size, stride, padding="same", use_bias=False)(x)
    return keras.layers.BatchNormalization()(x)


def build_encoder() -> keras.Model:
    """Ids int32 `[batch, 128]` to logits float32 `[batch, 10]`, under the global policy."""
    ids = keras.Input([_TOKENS], dtype="int32")
    x = keras.layers.Embedding(_VOCABULARY, _WIDTH)(ids)
    for _ in range(4):
        y = keras.layers.LayerNormalization()(x)
        x = keras.layers.Add()([x, keras.layers.MultiHeadAttention(8, _WIDTH // 8)(y, y)])
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.Dense(4 * _WIDTH, activation="gelu")(y)
        x = keras.layers.Add()([x, keras.layers.Dense(_WIDTH)(y)])
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(ids, keras.layers.Dense(_CLASSES, dtype="float32")(x))


BUILDERS = {"resnet": build_resnet, "encoder": build_encoder}


def random_batch(network: str, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns fresh inputs of a network and classes int32 `[batch]`."""
    if network == "resnet":
        return random.normal(size=[32, 64, 64, 3]).astype("float32"), random.integers(0, _CLASSES, [32], "int32")
    return random.integers(0, _VOCABULARY, [16, _TOKENS], "int32"), random.integers(0, _CLASSES, [16], "int32")
