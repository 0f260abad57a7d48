"""Places, overlap and metrics against numpy in float64, and cases that a hand can check."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.image import boxes

RANGES = ((8, 64.0), (16, 128.0), (32, np.inf))
STRIDES = (8, 16, 32)


def random_boxes(random, num: int, size: float) -> np.ndarray:
    corners = np.sort(random.uniform(0, size, [num, 2, 2]), axis=1)
    return corners.reshape(num, 4).astype("float32")


def assign_by_hand(true_boxes, class_ids, size: int):
    """FCOS' rules in plain loops."""
    rows = []
    for level, stride in enumerate(STRIDES):
        low, high = RANGES[level - 1][1] if level else 0.0, RANGES[level][1]
        for y in np.arange(stride / 2, size, stride):
            for x in np.arange(stride / 2, size, stride):
                best, row = np.inf, (-1, 0, 0, 0, 0)
                for (ymin, xmin, ymax, xmax), label in zip(true_boxes.tolist(), class_ids, strict=True):
                    height, width = ymax - ymin, xmax - xmin
                    if height <= 0 or width <= 0:
                        continue
                    edges = (y - ymin, x - xmin, ymax - y, xmax - x)
                    reach = [max(min(side / 2, 1.5 * stride), stride / 2) for side in (height, width)]
                    near = abs(y - (ymin + ymax) / 2) <= reach[0] and abs(x - (xmin + xmax) / 2) <= reach[1]
                    if near and low < max(edges) <= high and height * width < best:
                        best, row = height * width, (label, *edges)
                rows.append(row)
    return np.array(rows)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), num=st.integers(0, 6))
def test_every_place_gets_its_object(seed, num):
    random = np.random.default_rng(seed)
    true_boxes, class_ids = random_boxes(random, num, 128), random.integers(0, 5, num)
    points, steps = boxes.places(128, 128, STRIDES)
    assigned = boxes.assign(tf.constant(true_boxes), tf.constant(class_ids), points, steps, RANGES).numpy()
    np.testing.assert_allclose(assigned, assign_by_hand(true_boxes, class_ids, 128), atol=1e-3)


def test_places_are_the_middles_of_cells():
    points, steps = boxes.places(32, 64, (16, 32))
    assert points.numpy().tolist() == [
        [8, 8], [8, 24], [8, 40], [8, 56], [24, 8], [24, 24], [24, 40], [24, 56], [16, 16], [16, 48],
    ]  # fmt: skip
    assert steps.numpy().tolist() == [16] * 8 + [32] * 2


def test_an_object_of_one_pixel_is_answered_for():
    points, steps = boxes.places(64, 64, STRIDES)
    assigned = boxes.assign(tf.constant([[10.0, 20, 11, 21]]), tf.constant([3]), points, steps, RANGES).numpy()
    (row,) = np.flatnonzero(assigned[:, 0] >= 0)
    assert points[row].numpy().tolist() == [12, 20]
    assert assigned[row].tolist() == [3, 2, 0, -1, 1]  # the place lies outside: a negative distance


@pytest.mark.parametrize("box", [[5.0, 5, 5, 30], [5.0, 30, 30, 5], [7.0, 7, 7, 7]])
def test_a_box_without_area_is_left_out(box):
    points, steps = boxes.places(64, 64, STRIDES)
    assigned = boxes.assign(tf.constant([box]), tf.constant([0]), points, steps, RANGES).numpy()
    assert np.all(assigned == [-1, 0, 0, 0, 0])


def test_distances_lead_back():
    random = np.random.default_rng(1)
    true_boxes, points = random_boxes(random, 9, 100), random.uniform(0, 100, [9, 2]).astype("float32")
    back = boxes.from_distances(boxes.distances(true_boxes, points), points)
    np.testing.assert_allclose(back, true_boxes, atol=1e-4)


def test_generalised_iou_by_hand():
    one = tf.constant([[0.0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 4, 4], [1, 1, 1, 1]])
    two = tf.constant([[0.0, 0, 2, 2], [0, 1, 2, 3], [0, 3, 1, 4], [1, 1, 3, 3], [1, 1, 1, 1]])
    # Same; a third shared; apart, half of what is around them is empty; inside; two points.
    np.testing.assert_allclose(boxes.giou(one, two), [1, 1 / 3, -0.5, 0.25, 0], atol=1e-6)


def test_generalised_iou_has_gradients_that_are_finite():
    one = tf.constant([[0.0, 0, 0, 0], [5, 5, 5, 9], [-3, -3, 1e4, 1e4]])
    with tf.GradientTape() as tape:
        tape.watch(one)
        loss = tf.reduce_sum(boxes.giou(one, tf.constant([[1.0, 1, 2, 2], [5, 5, 6, 6], [0, 0, 1, 1]])))
    assert np.all(np.isfinite(tape.gradient(loss, one)))


def test_centerness_by_hand():
    values = tf.constant([[5.0, 5, 5, 5], [1, 4, 4, 4], [0, 5, 5, 5], [-1, 2, 2, 2], [2, 8, 8, 2]])
    np.testing.assert_allclose(boxes.centerness(values), [1, 0.5, 0, 0, 0.25], atol=1e-6)


def suppress_by_hand(candidates, scores, most, lowest, overlap):
    """Greedy suppression, one class."""
    kept = []
    for index in np.argsort(-scores, kind="stable"):
        a = candidates[index]
        if scores[index] <= lowest or len(kept) == most:
            break
        for other in kept:
            b = candidates[other]
            sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
            shared = np.prod(np.maximum(sides, 0))
            if shared / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared) > overlap:
                break
        else:
            kept.append(index)
    return kept


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), num=st.integers(1, 30), most=st.integers(1, 12))
def test_suppression_keeps_the_best(seed, num, most):
    random = np.random.default_rng(seed)
    candidates, scores = random_boxes(random, num, 40), random.permutation(num).astype("float32") / num
    kept = suppress_by_hand(candidates.astype("float64"), scores, most, 0.2, 0.4)
    found = boxes.suppress(tf.constant(candidates[None]), tf.constant(scores[None, :, None]), most, 0.2, 0.4)
    assert found["count"].numpy().tolist() == [len(kept)]
    assert found["class_ids"].dtype == tf.int32
    np.testing.assert_array_equal(found["boxes"][0, : len(kept)], candidates[kept])
    np.testing.assert_array_equal(found["scores"][0, : len(kept)], scores[kept])
    assert not np.any(found["scores"][0, len(kept) :])
    assert found["boxes"].shape == (1, most, 4)


def test_classes_do_not_suppress_each_other():
    same = tf.constant([[[0.0, 0, 10, 10], [0, 0, 10, 10]]])
    found = boxes.suppress(same, tf.constant([[[0.9, 0.0], [0.0, 0.8]]]), 5, 0.1, 0.5)
    assert found["count"].numpy().tolist() == [2]
    assert found["class_ids"].numpy()[0, :2].tolist() == [0, 1]


def scored(truth, found, num_classes: int = 2) -> dict[str, float]:
    """`truth` and `found` are lists of pictures, lists of (box, class[, score])."""
    scores = boxes.CocoScores(num_classes)
    for there, seen in zip(truth, found, strict=True):
        scores.add([row[0] for row in there], [row[1] for row in there], [row[0] for row in seen],
                   [row[1] for row in seen], [row[2] for row in seen])  # fmt: skip
    return scores.scores()


def test_scores_by_hand():
    square, far = [0, 0, 10, 10], [50, 50, 60, 60]
    perfect = scored([[(square, 0), (far, 1)]], [[(square, 0, 0.9), (far, 1, 0.8)]])
    assert perfect == {"mAP": pytest.approx(1), "AP50": pytest.approx(1), "AR": pytest.approx(1), "total": 2}
    # IoU 0.8 counts at 0.50 to 0.80, seven of ten thresholds (0.8 is one of them in float64).
    shrunk = scored([[(square, 0)]], [[([0, 0, 10, 8], 0, 0.9)]])
    assert shrunk["AP50"] == pytest.approx(1)
    assert shrunk["mAP"] == pytest.approx(0.7)
    # The better score is wrong: precision is a half at every recall.
    assert scored([[(square, 0)]], [[(far, 0, 0.9), (square, 0, 0.8)]])["AP50"] == pytest.approx(0.5)
    assert scored([[(square, 0)]], [[(square, 1, 0.9)]])["AP50"] == 0
    assert scored([[(square, 0)], []], [[(square, 0, 0.5)], [(far, 0, 0.9)]])["AP50"] == pytest.approx(0.5)
    assert scored([[(square, 0)]], [[]]) == {"mAP": 0, "AP50": 0, "AR": 0, "total": 1}


def test_true_boxes_without_area_do_not_count():
    square = [0, 0, 10, 10]
    assert scored([[(square, 0), ([5, 5, 5, 9], 0)]], [[(square, 0, 0.9)]])["AP50"] == pytest.approx(1)
    with pytest.raises(ValueError, match="no true box"):
        scored([[([5, 5, 5, 9], 0)]], [[]])


def test_precision_falls_with_recall():
    scores = boxes.CocoScores(1)
    squares = [[0, 20 * i, 10, 20 * i + 10] for i in range(4)]
    scores.add(squares, [0] * 4, [squares[0], [90, 90, 95, 95], squares[1]], [0] * 3, [0.9, 0.8, 0.7])
    recall, precision = scores.precision_recall()
    assert precision[recall <= 0.25].tolist() == [1] * 26
    np.testing.assert_allclose(precision[(recall > 0.25) & (recall <= 0.5)], 2 / 3)
    assert not np.any(precision[recall > 0.5])
