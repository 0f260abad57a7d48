"""Sizes of the reference networks, fresh random batches of them, and the loss of what a network says of one.

Imports neither Keras nor PyTorch: the process of one library doesn't pay for the other.
"""

import numpy as np

NETWORKS = ("resnet", "encoder", "lstm", "unet", "depthwise")
CLASSES = 10
VOCABULARY = 8000
TOKENS = 128
UNET_FILTERS = (32, 64, 128, 256)
# Expansion, filters and stride of each block. The stem has stride 1: pictures of 64 pixels don't need the paper's 2.
INVERTED_BLOCKS = (
    (1, 16, 1),
    (6, 24, 2),
    (6, 24, 1),
    (6, 32, 2),
    (6, 32, 1),
    (6, 64, 2),
    (6, 64, 1),
    (6, 96, 1),
)

_PICTURES = {"resnet": (32, 64, 64, 3), "unet": (8, 128, 128, 3), "depthwise": (32, 64, 64, 3)}
_SENTENCES = {"encoder": (16, TOKENS), "lstm": (32, TOKENS)}


def random_batch(network: str, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns fresh inputs of a network and classes int32: one for each example, for `unet` one for each pixel."""
    if network in _PICTURES:
        shape = _PICTURES[network]
        inputs = random.normal(size=shape).astype("float32")
    else:
        shape = _SENTENCES[network]
        inputs = random.integers(0, VOCABULARY, shape, "int32")
    targets = random.integers(0, CLASSES, shape[:3] if network == "unet" else shape[:1], "int32")
    return inputs, targets


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean cross-entropy in float64.

    Args:
        logits: float `[..., classes]`.
        targets: int `[...]`.
    """
    logits = logits.astype("float64")
    highest = logits.max(-1)
    normaliser = highest + np.log(np.exp(logits - highest[..., None]).sum(-1))
    return float(np.mean(normaliser - np.take_along_axis(logits, targets[..., None], -1)[..., 0]))
