"""Boxes: the places of a detector, which of them answers for which object, overlap, and COCO's metrics.

A box is ymin, xmin, ymax, xmax in pixels, edges and not pixel numbers. A place is the middle of a cell of a feature
map; a box is also told by its distances from a place: up, left, down, right, negative where the place lies outside. All
of it is float32: float16 counts pixels exactly to 2048 only, and an area overflows it at 256x256.

Sources: FCOS, Tian et al. 2019, arXiv:1904.01355 (places, centerness); generalised IoU, Rezatofighi et al. 2019,
arXiv:1902.09630; metrics, https://cocodataset.org/#detection-eval, by faster-coco-eval.
"""

import contextlib
import io

import numpy as np
import tensorflow as tf

# FCOS' centre sampling: a place answers for an object whose middle is within this many strides.
_RADIUS = 1.5
_TINY = 1e-6


def places(height, width, strides: tuple[int, ...]) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the places of all levels, float32 `[n, 2]` (y, x), and the stride of each, float32 `[n]`.

    Args:
        height: of the picture in pixels, a multiple of every stride; int or int32 scalar.
        width: likewise.
        strides: pixels between two places of a level, finest level first.
    """
    found, steps = [], []
    for stride in strides:
        y, x = (tf.range(length // stride, dtype=tf.float32) + 0.5 for length in (height, width))
        level = tf.reshape(tf.stack(tf.meshgrid(y, x, indexing="ij"), axis=-1), [-1, 2]) * stride
        found.append(level)
        steps.append(tf.fill([tf.shape(level)[0]], float(stride)))
    return tf.concat(found, axis=0), tf.concat(steps, axis=0)


def distances(boxes: tf.Tensor, points: tf.Tensor) -> tf.Tensor:
    """Returns how far a box's edges are from a place, float32 `[..., 4]`: up, left, down, right."""
    return tf.concat([points - boxes[..., :2], boxes[..., 2:] - points], axis=-1)


def from_distances(values: tf.Tensor, points: tf.Tensor) -> tf.Tensor:
    """Returns the boxes, `[..., 4]`, that lie at these distances around their places."""
    return tf.concat([points - values[..., :2], points + values[..., 2:]], axis=-1)


def assign(boxes: tf.Tensor, class_ids: tf.Tensor, points: tf.Tensor, steps: tf.Tensor, ranges) -> tf.Tensor:
    """Gives each place the object that it answers for, or none.

    A place answers for an object if it is near its middle (and in it, unless the object is smaller than a cell: then
    the nearest cells answer), and on the level that is for objects of this size. Of several the smallest counts.

    Args:
        boxes: float32 `[objects, 4]`; those without an area are left out.
        class_ids: int `[objects]`.
        points: float32 `[n, 2]`, as `places` gives them.
        steps: float32 `[n]`.
        ranges: pairs of a stride and the longest distance that its level is for, finest level first.

    Returns:
        float32 `[n, 5]`: class id (-1: none), and the box's distances from the place (0 where none).
    """
    sizes = boxes[:, 2:] - boxes[:, :2]
    kept = tf.reduce_all(sizes > 0, axis=-1)
    boxes, class_ids, sizes = (tf.boolean_mask(array, kept) for array in (boxes, class_ids, sizes))
    found = distances(boxes[tf.newaxis], points[:, tf.newaxis])  # [n, objects, 4]
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    cell = steps[:, tf.newaxis, tf.newaxis]
    reach = tf.maximum(tf.minimum(sizes[tf.newaxis] / 2, _RADIUS * cell), cell / 2)
    near = tf.reduce_all(tf.abs(points[:, tf.newaxis] - middle) <= reach, axis=-1)
    longest, low = tf.reduce_max(found, axis=-1), 0.0
    fits = tf.zeros_like(near)
    for stride, high in ranges:
        fits |= (steps[:, tf.newaxis] == stride) & (longest > low) & (longest <= high)
        low = high
    areas = tf.where(near & fits, sizes[:, 0] * sizes[:, 1], np.inf)
    # A column of infinite area answers where no object does; it also makes tables without an object valid.
    areas = tf.pad(areas, [[0, 0], [0, 1]], constant_values=np.inf)
    owner = tf.argmin(areas, axis=-1)
    positive = tf.reduce_min(areas, axis=-1) < np.inf
    owner = tf.where(positive, owner, tf.cast(tf.shape(boxes)[0], tf.int64))
    labels = tf.gather(tf.pad(tf.cast(class_ids, tf.float32), [[0, 1]], constant_values=-1.0), owner)
    values = distances(tf.gather(tf.pad(boxes, [[0, 1], [0, 0]]), owner), points)
    return tf.concat([labels[:, tf.newaxis], tf.where(positive[:, tf.newaxis], values, 0.0)], axis=-1)


def giou(first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
    """Returns the generalised IoU of boxes `[..., 4]`, from -1 (far apart) to 1 (the same)."""
    overlap = tf.minimum(first[..., 2:], second[..., 2:]) - tf.maximum(first[..., :2], second[..., :2])
    overlap = tf.reduce_prod(tf.maximum(overlap, 0.0), axis=-1)
    union = sum(tf.reduce_prod(tf.maximum(b[..., 2:] - b[..., :2], 0.0), axis=-1) for b in (first, second)) - overlap
    around = tf.maximum(first[..., 2:], second[..., 2:]) - tf.minimum(first[..., :2], second[..., :2])
    around = tf.reduce_prod(around, axis=-1)
    return overlap / tf.maximum(union, _TINY) - (around - union) / tf.maximum(around, _TINY)


def centerness(values: tf.Tensor) -> tf.Tensor:
    """Returns 1 where a place is in the middle of its box, 0 at its edge or outside; of distances `[..., 4]`."""
    up, left, down, right = tf.unstack(tf.maximum(values, 0.0), axis=-1)
    across = tf.minimum(left, right) / tf.maximum(tf.maximum(left, right), _TINY)
    along = tf.minimum(up, down) / tf.maximum(tf.maximum(up, down), _TINY)
    return tf.sqrt(across * along)


def suppress(boxes: tf.Tensor, scores: tf.Tensor, most: int, lowest: float, overlap: float) -> dict[str, tf.Tensor]:
    """Keeps the best box of those that overlap, class by class.

    Args:
        boxes: float32 `[batch, n, 4]`.
        scores: float32 `[batch, n, classes]`, 0 to 1.
        most: detections that stay in a picture.
        lowest: score below which nothing is a detection.
        overlap: IoU above which the lower score goes.

    Returns:
        boxes float32 `[batch, most, 4]`, scores float32 `[batch, most]`, falling, class_ids int32 `[batch, most]`, and
        count int32 `[batch]`; rows from count on are 0.
    """
    kept = tf.image.combined_non_max_suppression(
        boxes[:, :, tf.newaxis],
        scores,
        max_output_size_per_class=most,
        max_total_size=most,
        iou_threshold=overlap,
        score_threshold=lowest,
        clip_boxes=False,
    )
    class_ids = tf.cast(kept.nmsed_classes, tf.int32)
    return {"boxes": kept.nmsed_boxes, "scores": kept.nmsed_scores, "class_ids": class_ids,
            "count": kept.valid_detections}  # fmt: skip


class CocoScores:
    """Collects true and detected boxes picture by picture, and scores them as COCO does.

    Args:
        num_classes: number of classes.
    """

    def __init__(self, num_classes: int):
        self._images: list[dict] = []
        self._truth: list[dict] = []
        self._found: list[dict] = []
        self._categories = [{"id": index + 1, "name": str(index)} for index in range(num_classes)]

    def add(self, true_boxes, true_ids, boxes, class_ids, scores) -> None:
        """Adds one picture: float `[n, 4]` and int `[n]` of the truth; the same and scores of what was found."""
        image = len(self._images) + 1
        self._images.append({"id": image})
        for box, label in zip(np.asarray(true_boxes, float), true_ids, strict=True):
            entry = _coco(image, box, label) | {"id": len(self._truth) + 1, "iscrowd": 0}
            if entry["area"] > 0:
                self._truth.append(entry)
        rows = zip(np.asarray(boxes, float), class_ids, scores, strict=True)
        self._found += [_coco(image, box, label) | {"score": float(score)} for box, label, score in rows]

    def scores(self) -> dict[str, float]:
        """Returns mAP (mean of IoU 0.50 to 0.95), AP50 and AR (100 detections), 0 to 1, and the total of true boxes.

        Raises:
            ValueError: no true box was added.
        """
        stats = self._evaluate().stats
        return {"mAP": float(stats[0]), "AP50": float(stats[1]), "AR": float(stats[8]), "total": len(self._truth)}

    def precision_recall(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns recall and precision at IoU 0.5 with it, float `[101]` each; the mean of the classes with objects."""
        table = self._evaluate().eval["precision"][0, :, :, 0, -1]
        return np.linspace(0, 1, 101), table[:, table.max(axis=0) > -1].mean(axis=1)

    def _evaluate(self):
        import faster_coco_eval  # here: it is needed for scoring only

        if not self._truth:
            raise ValueError("there is no true box: nothing can be scored")
        dataset = {"images": self._images, "categories": self._categories, "annotations": self._truth}
        with contextlib.redirect_stdout(io.StringIO()):
            truth = faster_coco_eval.COCO(dataset)
            found = truth.loadRes(self._found or [_coco(1, np.zeros(4), 0) | {"score": 0.0}])
            evaluation = faster_coco_eval.COCOeval_faster(truth, found, "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation


def _coco(image: int, box: np.ndarray, label) -> dict:
    ymin, xmin, ymax, xmax = (float(value) for value in box)
    height, width = max(0.0, ymax - ymin), max(0.0, xmax - xmin)
    return {"image_id": image, "category_id": int(label) + 1, "bbox": [xmin, ymin, width, height],
            "area": height * width}  # fmt: skip
