"""Masks: what of them counts, windows, the weights of classes, the losses and the overlap, all in float32.

A target holds two numbers for a pixel: its class, and the weight of its class. The weight is 0 where a pixel doesn't
count: it is outside of the picture, or its mask says 255 or names no class.

Sources: Milletari et al. 2016, "V-Net", arXiv:1606.04797, section 3 (soft Dice); Eigen & Fergus 2015,
arXiv:1411.4734, section 6.3 (weights of classes).
"""

import keras
import numpy as np
import tensorflow as tf

from apps.image import pictures

IGNORED = 255  # as in PASCAL VOC and Cityscapes
_HEAVIEST = 10.0  # a class of one pixel mustn't drown the others


@keras.saving.register_keras_serializable("tfhalf.apps")
class CrossEntropyAndDice(keras.losses.Loss):
    """Cross-entropy of pixels, weighted by class, and `dice_weight` times soft Dice.

    Each picture has its own loss, so that it doesn't matter how pictures are shared out to replicas.
    """

    def __init__(self, dice_weight: float, name: str = "cross_entropy_and_dice"):
        super().__init__(name=name, dtype="float32")
        self.dice_weight = dice_weight

    def get_config(self):
        """Returns what `__init__` takes."""
        return {"dice_weight": self.dice_weight, "name": self.name}

    def call(self, y_true, y_pred):
        """Targets `[batch, height, width, 2]` and logits `[batch, height, width, classes]` to losses `[batch]`."""
        labels, weights = tf.cast(y_true[..., 0], tf.int32), y_true[..., 1]
        counts = tf.cast(weights > 0, tf.float32)
        # A label that doesn't count may lie out of range: TensorFlow answers that with NaN, and 0 * NaN is NaN.
        labels = tf.where(weights > 0, labels, 0)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, y_pred) * weights
        cross_entropy = tf.reduce_sum(losses, [1, 2]) / tf.maximum(tf.reduce_sum(counts, [1, 2]), 1.0)
        counts = counts[..., tf.newaxis]
        truth = tf.one_hot(labels, y_pred.shape[-1]) * counts
        return cross_entropy + self.dice_weight * _dice_loss(truth, tf.nn.softmax(y_pred) * counts)


def _dice_loss(truth: tf.Tensor, probabilities: tf.Tensor) -> tf.Tensor:
    """1 - Dice, the mean over the classes that a picture holds; 0 where it holds none.

    A class that isn't there has no overlap to gain: its Dice would be about 0 until its last trace is gone, and would
    outweigh the others. Cross-entropy speaks against it. The 1 in both parts of the fraction keeps the slope of an
    object of one pixel finite.
    """
    overlap = _sum_over_pixels(truth * probabilities)
    sizes = _sum_over_pixels(truth + probabilities**2)
    present = tf.cast(tf.reduce_any(truth > 0, [1, 2]), tf.float32)
    losses = present * (1.0 - (2.0 * overlap + 1.0) / (sizes + 1.0))
    return tf.reduce_sum(losses, -1) / tf.maximum(tf.reduce_sum(present, -1), 1.0)


def _sum_over_pixels(x: tf.Tensor) -> tf.Tensor:
    """The sum of `[batch, height, width, classes]` over height and width.

    One after the other: TensorFlow adds the pixels of a class in their order, and in one sum over a million of them
    float32 loses four digits.
    """
    return tf.reduce_sum(tf.reduce_sum(x, 2), 1)


class MeanIoU(keras.metrics.Metric):
    """Intersection over union, the mean over the classes that occur; of our targets and of logits, in float32.

    It counts for all the classes that 8 bits can tell, so that it needn't be told their number.
    """

    def __init__(self, name: str = "miou"):
        super().__init__(name=name, dtype="float32")
        self.hits, self.actual, self.predicted = (
            self.add_variable([IGNORED], "zeros", name=name) for name in ("hits", "actual", "predicted")
        )

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Adds a batch."""
        counted = tf.reshape(y_true[..., 1] > 0, [-1])
        labels = tf.reshape(tf.cast(y_true[..., 0], tf.int32), [-1])
        predictions = tf.reshape(tf.argmax(y_pred, -1, output_type=tf.int32), [-1])
        labels, predictions = (tf.where(counted, ids, -1) for ids in (labels, predictions))  # negative: left out
        hits = tf.where(labels == predictions, labels, -1)
        for variable, ids in ((self.hits, hits), (self.actual, labels), (self.predicted, predictions)):
            variable.assign_add(tf.math.unsorted_segment_sum(tf.ones(tf.shape(ids)), ids, IGNORED))

    def result(self):
        """The mean over the classes seen."""
        hits, actual, predicted = (tf.convert_to_tensor(v) for v in (self.hits, self.actual, self.predicted))
        ious = tf.math.divide_no_nan(hits, actual + predicted - hits)
        return tf.math.divide_no_nan(tf.reduce_sum(ious), tf.reduce_sum(tf.cast(actual > 0, tf.float32)))


def weights_of_classes(counts: np.ndarray) -> list[float]:
    """Weights that give rare classes a say: the square root of median frequency balancing.

    A class' frequency is its share of those pictures that hold it; `counts` are pixels, int `[pictures, classes]`. The
    largest weight is at most 10 times the least, and the mean over all pixels is 1.
    """
    totals, held = counts.sum(axis=0), counts > 0
    areas = (held * counts.sum(axis=1, keepdims=True)).sum(axis=0)
    weights = np.sqrt(np.maximum(1, areas) / np.maximum(1e-6, totals))
    weights = np.minimum(weights, _HEAVIEST * weights.min())
    return [float(weight) for weight in weights * totals.sum() / (weights * totals).sum()]


def to_labels(mask: tf.Tensor, lowest: int, num_classes: int) -> tf.Tensor:
    """A mask's values to int32 classes from 0; 255 where they are none."""
    labels = tf.cast(mask, tf.int32) - lowest
    return tf.where((labels >= 0) & (labels < num_classes), labels, IGNORED)


def cut_window(picture: tf.Tensor, labels: tf.Tensor, size: int, augment: str, seed: tf.Tensor, weights: list[float]):
    """One window to train on, float32 `[size, size, channels]`, and its target, float32 `[size, size, 2]`.

    Colours stay as they are: often they are the class. Changed at random, lakes' IoU was 0 after an epoch.
    """
    window = pictures.draw_window(tf.shape(picture)[:2], size, augment, seed)
    picture = pictures.cut(picture, window, "bilinear")
    labels = pictures.cut(labels[..., tf.newaxis], window, "nearest", outside=IGNORED)
    table = tf.pad(tf.constant(weights, tf.float32), [[0, IGNORED + 1 - len(weights)]])
    return picture, tf.concat([tf.cast(labels, tf.float32), tf.gather(table, labels)], -1)


def confusion(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts pixels by true class (row) and predicted class (column), int64; labels out of range are left out."""
    counted = (labels >= 0) & (labels < num_classes)
    pairs = labels[counted].astype(np.int64) * num_classes + predictions[counted].astype(np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def overlaps(counts: np.ndarray, names: list[str]) -> dict[str, float]:
    """IoU of each class that occurs, their mean, and the mean Dice, of a confusion matrix."""
    hits, actual, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    present = actual > 0
    iou = hits[present] / (actual + predicted - hits)[present]
    dice = 2 * hits[present] / (actual + predicted)[present]
    by_class = {f"iou_{names[index]}": float(value) for index, value in zip(np.flatnonzero(present), iou, strict=True)}
    return {"miou": float(iou.mean()), "dice": float(dice.mean())} | by_class
