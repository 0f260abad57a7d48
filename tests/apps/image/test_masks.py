"""The losses and metrics of masks against other implementations, weights by hand, and what can go wrong with them."""

import numpy as np
import pytest
import tensorflow as tf
from sklearn import metrics as sklearn_metrics

from apps.image import masks

IGNORED = 255


def target_of(labels: np.ndarray, weights=(1.0, 1.0, 1.0)) -> np.ndarray:
    """A target as the data give it: classes and their weights."""
    table = np.zeros(IGNORED + 1)
    table[: len(weights)] = weights
    return np.stack([labels, table[labels]], -1).astype("float32")


def float64_losses(labels: np.ndarray, logits: np.ndarray, weights) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy and Dice loss of each picture, pixel by pixel in plain float64."""
    cross_entropies, dice_losses = [], []
    for classes, row in zip(labels, logits.astype(np.float64), strict=True):
        inside = classes != IGNORED
        classes, row = classes[inside], row[inside]
        shares = np.exp(row - row.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        entropy = [-weights[c] * np.log(p[c]) for c, p in zip(classes, shares, strict=True)]
        cross_entropies.append(sum(entropy) / max(1, len(entropy)))
        dice = []
        for c in np.unique(classes):
            truth = classes == c
            dice.append(1 - (2 * shares[truth, c].sum() + 1) / (truth.sum() + (shares[:, c] ** 2).sum() + 1))
        dice_losses.append(np.mean(dice) if dice else 0.0)
    return np.array(cross_entropies), np.array(dice_losses)


@pytest.mark.parametrize("dice_weight", [0.0, 0.7])
def test_loss_agrees_with_float64(dice_weight):
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, [4, 7, 5, 3]).astype("float32")
    labels = random.choice([0, 1, 2, IGNORED], [4, 7, 5])
    labels[1], labels[2] = 1, IGNORED
    weights = (0.5, 2.0, 7.5)
    entropy, dice = float64_losses(labels, logits, weights)
    loss = masks.CrossEntropyAndDice(dice_weight)
    np.testing.assert_allclose(
        loss.call(target_of(labels, weights), tf.constant(logits)), entropy + dice_weight * dice, rtol=1e-5
    )
    mean = float(loss(target_of(labels, weights), logits))
    assert mean == pytest.approx(np.mean(entropy + dice_weight * dice), rel=1e-5)


def hard_cases() -> dict[str, np.ndarray]:
    one_pixel = np.zeros([1, 16, 16], int)
    one_pixel[0, 5, 9] = 2
    half_outside = np.ones([1, 16, 16], int)
    half_outside[:, 8:] = IGNORED
    return {
        "one class": np.zeros([1, 16, 16], int),
        "an object of one pixel": one_pixel,
        "half outside": half_outside,
        "nothing but outside": np.full([1, 16, 16], IGNORED),
    }


@pytest.mark.parametrize("certainty", [0.0, 10.0, 1e4])
@pytest.mark.parametrize("case", hard_cases())
def test_slopes_of_hard_cases_fit_into_half(case, certainty):
    labels = hard_cases()[case]
    logits = tf.Variable(np.random.default_rng(1).normal(size=[1, 16, 16, 3]) * certainty, dtype=tf.float32)
    loss = masks.CrossEntropyAndDice(1.0)
    with tf.GradientTape() as tape:
        value = loss(target_of(labels, (0.9, 1.1, 9.0)), logits)
    slopes = tape.gradient(value, logits).numpy()
    assert np.isfinite(value)
    assert np.abs(slopes).max() * 2**15 < np.finfo(np.float16).max
    assert not slopes[labels == IGNORED].any()
    assert slopes.any() or case == "nothing but outside" or certainty == 1e4


def test_dice_of_a_large_picture_is_summed_in_float32():
    # A million pixels: more than float16 can count, and than it can tell apart from 2048 on.
    random = np.random.default_rng(2)
    labels = random.choice(3, [1, 1024, 1024], p=[0.6, 0.3999, 0.0001])
    logits = random.normal(size=[1, 1024, 1024, 3]).astype("float32")
    entropy, dice = float64_losses(labels, logits, (1, 1, 1))
    loss = masks.CrossEntropyAndDice(1.0)(target_of(labels), logits)
    assert float(loss) == pytest.approx(float(entropy[0] + dice[0]), rel=1e-5)


def test_metric_agrees_with_sklearn():
    random = np.random.default_rng(3)
    metric = masks.MeanIoU()
    batches = []
    for _ in range(3):
        labels = random.choice([0, 2, IGNORED], [2, 6, 5])  # class 1 doesn't occur, but is predicted
        logits = random.normal(size=[2, 6, 5, 3]).astype("float32")
        metric.update_state(target_of(labels), logits)
        batches.append((labels[labels != IGNORED], logits.argmax(-1)[labels != IGNORED]))
    labels, predictions = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    expected = sklearn_metrics.jaccard_score(labels, predictions, labels=[0, 2], average="macro")
    assert float(metric.result()) == pytest.approx(expected, rel=1e-6)
    metric.reset_state()
    assert float(metric.result()) == 0


def test_values_that_are_no_class_are_ignored():
    labels = masks.to_labels(tf.constant([[0, 1, 3, 4, 200, 255]], tf.uint8), 1, 3)
    np.testing.assert_array_equal(labels, [[IGNORED, 0, 2, IGNORED, IGNORED, IGNORED]])


@pytest.mark.parametrize("augment", ["none", "flip", "turn"])
@pytest.mark.parametrize("seed", range(6))
def test_windows_move_picture_and_mask_alike(augment, seed):
    # One grey value for each class: whatever is done to colours, away from edges a class keeps a single one.
    blocks = np.random.default_rng(seed).integers(0, 3, [5, 4])
    labels = np.kron(blocks, np.ones([16, 16], int))
    picture = np.repeat(100.0 + 25.0 * labels[..., np.newaxis], 3, -1).astype("float32")
    window, target = masks.cut_window(
        tf.constant(picture), tf.constant(labels, tf.int32), 64, augment, tf.constant([seed, 1]), [1.0, 2.0, 3.0]
    )
    classes, weights = target.numpy()[..., 0].astype(int), target.numpy()[..., 1]
    around = np.lib.stride_tricks.sliding_window_view(classes, [5, 5])
    inner = around.min((2, 3)) == around.max((2, 3))
    assert inner.mean() > 0.2
    shape = (slice(2, -2), slice(2, -2))
    grey, classes, weights = window.numpy()[..., 0][shape], classes[shape], weights[shape]
    seen = []
    for label in range(3):
        values = grey[inner & (classes == label)]
        assert len(values) > 20
        assert np.ptp(values) < 0.01
        seen.append(values.mean())
        np.testing.assert_array_equal(weights[classes == label], label + 1)
    assert seen == sorted(seen)
    assert seen[2] - seen[0] > 20
    assert not grey[inner & (classes == IGNORED)].any()
    assert not weights[classes == IGNORED].any()


def test_weights_of_classes_by_hand():
    # Of 100 pixels each: a is 149 of 200, b 50 of 100, c 1 of 100 of the pictures that hold it.
    counts = np.array([[50, 50, 0], [99, 0, 1]])
    roots = np.sqrt([200 / 149, 2, 100])
    roots[2] = min(roots[2], 10 * roots[0])
    mean = (roots * [149, 50, 1]).sum() / 200
    np.testing.assert_allclose(masks.weights_of_classes(counts), roots / mean, rtol=1e-6)
    # A class that never occurs is as heavy as allowed, and weighs on nothing.
    weights = masks.weights_of_classes(np.array([[60, 40, 0]]))
    assert weights[2] == pytest.approx(10 * min(weights))
    assert weights[0] * 0.6 + weights[1] * 0.4 == pytest.approx(1)
