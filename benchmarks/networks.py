"""The reference networks that speed is measured on, in Keras; `benchmarks/torch_networks.py` has the same in PyTorch.

| network | inputs of a batch | layers | GFLOP a step |
|---|---|---|---|
| `resnet` | 32 x 64x64x3 | three stages of two basic blocks (He et al. 2016) | 83 |
| `encoder` | 16 x 128 tokens | four pre-norm blocks of 512, 8 heads (Vaswani et al. 2017, Xiong et al. 2020) | 161 |
| `lstm` | 32 x 128 tokens | LSTM of 256 in both directions, then one of 256 (Hochreiter & Schmidhuber 1997) | 45 |
| `unet` | 8 x 128x128x3 | four levels, 32 to 256 filters (Ronneberger et al. 2015), one class for each pixel | 111 |
| `depthwise` | 32 x 64x64x3 | eight inverted residual blocks (Sandler et al. 2018, MobileNetV2) | 10 |

All end in ten float32 logits. A step is counted as three forward passes of convolutions and matrix products; its
inputs come from `benchmarks/batches.py`.
"""

import keras

from benchmarks.batches import CLASSES, INVERTED_BLOCKS, TOKENS, UNET_FILTERS, VOCABULARY

_WIDTH = 512
_LSTM_WIDTH = 256


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
    return keras.Model(pictures, keras.layers.Dense(CLASSES, dtype="float32")(x))


def _conv_norm(x, filters: int, size: int, stride: int):
    x = keras.layers.Conv2D(filters, size, stride, padding="same", use_bias=False)(x)
    return keras.layers.BatchNormalization()(x)


def build_encoder() -> keras.Model:
    """Ids int32 `[batch, 128]` to logits float32 `[batch, 10]`, under the global policy."""
    ids = keras.Input([TOKENS], dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, _WIDTH)(ids)
    for _ in range(4):
        y = keras.layers.LayerNormalization()(x)
        x = keras.layers.Add()([x, keras.layers.MultiHeadAttention(8, _WIDTH // 8)(y, y)])
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.Dense(4 * _WIDTH, activation="gelu")(y)
        x = keras.layers.Add()([x, keras.layers.Dense(_WIDTH)(y)])
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(ids, keras.layers.Dense(CLASSES, dtype="float32")(x))


def build_lstm() -> keras.Model:
    """Ids int32 `[batch, 128]` to logits float32 `[batch, 10]`, under the global policy."""
    ids = keras.Input([TOKENS], dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, _LSTM_WIDTH)(ids)
    x = keras.layers.Bidirectional(keras.layers.LSTM(_LSTM_WIDTH, return_sequences=True))(x)
    x = keras.layers.LSTM(_LSTM_WIDTH)(x)
    return keras.Model(ids, keras.layers.Dense(CLASSES, dtype="float32")(x))


def build_unet() -> keras.Model:
    """Pictures float32 `[batch, 128, 128, 3]` to logits float32 `[batch, 128, 128, 10]`, under the global policy."""
    pictures = keras.Input([128, 128, 3])
    x, kept = pictures, []
    for filters in UNET_FILTERS[:-1]:
        x = _conv_norm_twice(x, filters)
        kept.append(x)
        x = keras.layers.MaxPooling2D(2)(x)
    x = _conv_norm_twice(x, UNET_FILTERS[-1])
    for filters in reversed(UNET_FILTERS[:-1]):
        x = keras.layers.Conv2DTranspose(filters, 2, 2)(x)
        x = _conv_norm_twice(keras.layers.Concatenate()([kept.pop(), x]), filters)
    return keras.Model(pictures, keras.layers.Conv2D(CLASSES, 1, dtype="float32")(x))


def _conv_norm_twice(x, filters: int):
    for _ in range(2):
        x = keras.layers.ReLU()(_conv_norm(x, filters, 3, 1))
    return x


def build_depthwise() -> keras.Model:
    """Pictures float32 `[batch, 64, 64, 3]` to logits float32 `[batch, 10]`, under the global policy."""
    pictures = keras.Input([64, 64, 3])
    x = _relu6(_conv_norm(pictures, 32, 3, 1))
    for expansion, filters, stride in INVERTED_BLOCKS:
        y = x
        if expansion != 1:
            y = _relu6(_conv_norm(y, expansion * x.shape[-1], 1, 1))
        y = keras.layers.DepthwiseConv2D(3, stride, padding="same", use_bias=False)(y)
        y = _relu6(keras.layers.BatchNormalization()(y))
        y = _conv_norm(y, filters, 1, 1)
        x = keras.layers.Add()([x, y]) if x.shape == y.shape else y
    x = _relu6(_conv_norm(x, 1280, 1, 1))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(pictures, keras.layers.Dense(CLASSES, dtype="float32")(x))


def _relu6(x):
    return keras.layers.ReLU(max_value=6.0)(x)


BUILDERS = {
    "resnet": build_resnet,
    "encoder": build_encoder,
    "lstm": build_lstm,
    "unet": build_unet,
    "depthwise": build_depthwise,
}
