"""The detector's loss against numpy, its windows, what it serves for every kind of picture, hazards of boxes."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image
from sklearn import metrics as sklearn_metrics

import tfhalf
from apps import runner
from apps.image import boxes, detection
from tests.conftest import options_for

ABOUT = {"class_names": ["tree", "bush"], "channels": 3}


def options_of(**changes) -> types.SimpleNamespace:
    return types.SimpleNamespace(**({"width": 8, "depth": "18", "image_size": 64} | changes))


@pytest.fixture
def model() -> keras.Model:
    keras.utils.set_random_seed(1)
    with tfhalf.PrecisionPlan("mixed_float16").scope():
        return detection.build_model(options_of(), runner.Data(None, 1, None, None, ABOUT))


def example_of(height: int, width: int, true_boxes, labels=None, channels: int = 3) -> dict:
    """An example as TFDS gives it."""
    pixels = np.random.default_rng(0).integers(0, 256, [height, width, channels]).astype("uint8")
    rows = np.reshape(np.array(true_boxes, "float32"), [-1, 4]) / np.array([height, width] * 2, "float32")
    labels = np.zeros(len(rows), "int64") if labels is None else labels
    return {"image": tf.constant(pixels), "objects": {"bbox": tf.constant(rows), "label": tf.constant(labels)}}


def test_model_tells_something_of_each_place(model):
    points, _ = boxes.places(96, 64, detection.STRIDES)
    rows = model(np.zeros([2, 96, 64, 3], "float32"))
    assert rows.shape == (2, len(points), 2 + 5)
    assert rows.dtype == tf.float32
    assert np.all(rows[..., 2:6] > 0), "distances are positive"
    # Focal loss starts where nearly every place is background.
    assert np.mean(tf.sigmoid(rows[..., :2])) == pytest.approx(0.01, rel=0.7)
    assert tfhalf.left_alone(tfhalf.accelerate(model)) == {}
    tfhalf.decelerate(model)


def loss_by_hand(targets: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """The three losses in float64, place by place."""
    totals = []
    for picture_targets, picture_outputs in zip(targets, outputs.astype("float64"), strict=True):
        total = 0.0
        for (label, *true), row in zip(picture_targets, picture_outputs, strict=True):
            for index, logit in enumerate(row[:-5]):
                p = 1 / (1 + np.exp(-logit))
                total += -0.25 * (1 - p) ** 2 * np.log(p) if index == label else -0.75 * p**2 * np.log(1 - p)
            if label < 0:
                continue
            up, left, down, right = true
            centre = (
                np.sqrt(min(up, down) / max(up, down) * min(left, right) / max(left, right)) if min(true) > 0 else 0
            )
            shared = np.prod([max(0, min(true[i], row[2 + i]) + min(true[i + 2], row[4 + i])) for i in (0, 1)])
            around = np.prod([max(true[i], row[2 + i]) + max(true[i + 2], row[4 + i]) for i in (0, 1)])
            union = (up + down) * (left + right) + (row[2] + row[4]) * (row[3] + row[5]) - shared
            total += 2 * max(centre, 0.1) * (1 - (shared / union - (around - union) / around))
            p = 1 / (1 + np.exp(-row[-1]))
            total += -centre * np.log(p) - (1 - centre) * np.log(1 - p)
        totals.append(total / 64)
    return np.array(totals)


def test_loss_agrees_with_numpy():
    random = np.random.default_rng(2)
    outputs = random.normal(size=[3, 40, 7]).astype("float32")
    outputs[..., 2:6] = random.uniform(1, 60, [3, 40, 4])
    targets = np.concatenate([random.integers(-1, 2, [3, 40, 1]), random.uniform(1, 60, [3, 40, 4])], axis=-1)
    targets[0, :5, 1] = -2  # a place outside of its object
    targets = targets.astype("float32")
    seen = detection.DetectionLoss(reduction=None)(targets, outputs)
    np.testing.assert_allclose(seen, loss_by_hand(targets, outputs), rtol=1e-4)


def test_loss_is_smallest_for_the_truth():
    points, steps = boxes.places(64, 64, detection.STRIDES)
    true_boxes = tf.constant([[8.0, 8, 40, 40], [30, 40, 50, 60]])
    targets = boxes.assign(true_boxes, tf.constant([0, 1]), points, steps, detection._RANGES)
    logits = 20 * tf.one_hot(tf.cast(targets[:, 0], tf.int32), 2) - 10
    centre = boxes.centerness(targets[:, 1:])[:, tf.newaxis]
    centre = tf.math.log((centre + 1e-6) / (1 - centre + 1e-6))
    exact = tf.concat([logits, targets[:, 1:], centre], axis=-1)[tf.newaxis]
    loss = detection.DetectionLoss()
    best = float(loss(targets[tf.newaxis], exact))
    for change in ([-20.0, 0] + [0] * 5, [0, 0, 3.0, 0, 0, 0, 0], [0] * 6 + [3.0]):
        assert float(loss(targets[tf.newaxis], exact + tf.constant(change))) > best


@pytest.mark.parametrize(
    "true_boxes", [[], [[10, 10, 11, 11]], [[0, 0, 64, 64]], [[10, 10, 10, 30]], [[-9, -9, -1, -1]]]
)
@pytest.mark.parametrize("scale", [1.0, 2.0**15])
def test_hazards_of_boxes_leave_the_gradients_finite(model, true_boxes, scale):
    """No object, one pixel, the whole window, no area, outside of the picture: in half, with the first loss scale."""
    picture, targets = detection._window(example_of(64, 64, true_boxes), tf.constant([0, 1]), 64, 3, "none")
    assert bool(np.any(targets[:, 0] >= 0)) is (true_boxes in ([[10, 10, 11, 11]], [[0, 0, 64, 64]]))
    with tf.GradientTape() as tape:
        loss = detection.DetectionLoss()(targets[tf.newaxis], model(picture[tf.newaxis], training=True)) * scale
    assert np.isfinite(loss)
    gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
    assert all(gradient is not None and np.all(np.isfinite(gradient)) for gradient in gradients)


def test_a_window_without_changes_is_the_picture():
    true_boxes = [[4, 6, 30, 40], [60, 60, 63, 64]]
    example = example_of(64, 64, true_boxes, np.array([1, 0]))
    picture, targets = detection._window(example, tf.constant([5, 5]), 64, 3, "none")
    np.testing.assert_array_equal(picture, tf.cast(example["image"], tf.float32))
    points, _ = boxes.places(64, 64, detection.STRIDES)
    for label, box in zip((1, 0), true_boxes, strict=True):
        rows = np.flatnonzero(targets[:, 0] == label)
        assert len(rows)
        found = boxes.from_distances(tf.gather(targets[:, 1:], rows), tf.gather(points, rows))
        np.testing.assert_allclose(found, [box] * len(rows), atol=1e-3)


def test_an_object_of_which_little_is_seen_is_no_target():
    # The picture is far larger than the window: whatever the window shows, its targets are three quarters hidden.
    example = example_of(4000, 4000, [[0, 0, 4000, 4000]])
    _, targets = detection._window(example, tf.constant([1, 1]), 64, 3, "none")
    assert not np.any(targets[:, 0] >= 0)


def served(model, picture: np.ndarray, about=ABOUT):
    data = runner.Data(None, 1, None, None, about)
    detect, _ = detection.serve(model, data)
    raw = detect(tf.constant(picture))
    return raw, detection.decide(None, data)(raw)


@pytest.mark.parametrize("shape", [(1, 1, 3), (31, 77, 1), (64, 64, 4), (40, 50, 2), (2000, 300, 3)])
def test_pictures_of_any_size_and_kind_are_served(model, shape):
    picture = np.random.default_rng(0).uniform(0, 255, [2, *shape]).astype("float32")
    raw, found = served(model, picture)
    assert found["boxes"].shape == (2, 100, 4)
    assert found["scores"].shape == found["class_ids"].shape == (2, 100)
    assert {name: value.dtype for name, value in found.items()} == {
        "boxes": tf.float32, "scores": tf.float32, "class_ids": tf.int32, "count": tf.int32,
    }  # fmt: skip
    assert np.all(np.isfinite(raw["scores"]))
    assert np.min(raw["boxes"]) >= 0
    assert np.all(raw["boxes"] <= np.array([*shape[:2]] * 2) + 1e-3)


def test_nothing_is_found_in_what_was_padded(model):
    raw, _ = served(model, np.zeros([1, 40, 50, 3], "float32"))
    points, _ = boxes.places(64, 64, detection.STRIDES)
    outside = np.any(points.numpy() >= [40, 50], axis=-1)
    assert not np.any(raw["scores"][0][outside])
    assert np.all(raw["scores"][0][~outside] > 0)


class Oracle:
    """Stands in for a model: finds one object, given in pixels of what it is shown."""

    def __init__(self, box, label: int):
        self.box, self.label = box, label

    def __call__(self, pictures, training):
        points, steps = boxes.places(tf.shape(pictures)[1], tf.shape(pictures)[2], detection.STRIDES)
        targets = boxes.assign(tf.constant([self.box]), tf.constant([self.label]), points, steps, detection._RANGES)
        logits = 20 * tf.one_hot(tf.cast(targets[:, 0], tf.int32), 2) - 10
        row = tf.concat([logits, targets[:, 1:], tf.fill([len(points), 1], 9.0)], axis=-1)
        return tf.repeat(row[tf.newaxis], tf.shape(pictures)[0], axis=0)


def test_boxes_come_back_in_pixels_of_the_picture():
    _, found = served(Oracle([20.0, 30, 60, 90], 1), np.zeros([1, 100, 120, 3], "float32"))
    assert found["count"].numpy().tolist() == [1]
    np.testing.assert_allclose(found["boxes"][0, 0], [20, 30, 60, 90], atol=1e-3)
    assert found["class_ids"][0, 0] == 1
    # A picture of twice the largest size is shrunk to half: its boxes are twice as large.
    _, found = served(Oracle([20.0, 30, 60, 90], 0), np.zeros([1, 400, 2 * detection._LONGEST, 3], "float32"))
    np.testing.assert_allclose(found["boxes"][0, 0], [40, 60, 120, 180], atol=1e-2)


class SixteenBits(tfds.core.GeneratorBasedBuilder):
    """Two grey pictures of 16 bits, with an object each."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        objects = {"bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(names=["tree"])}
        image = tfds.features.Image(shape=(None, None, 1), dtype=np.uint16)
        features = tfds.features.FeaturesDict({"image": image, "objects": tfds.features.Sequence(objects)})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "validation": self._generate_examples(),
                "test": self._generate_examples()}  # fmt: skip

    def _generate_examples(self):
        box = {"bbox": tfds.features.BBox(0.25, 0.25, 0.75, 0.75), "label": "tree"}
        for index, size in enumerate((40, 64)):
            yield index, {"image": np.full([size, size, 1], 257 * 100, np.uint16), "objects": [box]}


def test_sixteen_bits_reach_every_part_as_eight(tmp_path):
    SixteenBits(data_dir=tmp_path).download_and_prepare()
    small = ["--image_size=64", "--windows=4", "--batch_size=4", "--augment=none"]
    data = detection.load_data(options_for(detection.TASK, "--dataset=sixteen_bits", f"--data_dir={tmp_path}", *small))
    assert data.about == {"class_names": ["tree"], "channels": 1}
    pictures = [next(iter(data.train(0)))[0], next(iter(data.validation))[0]]
    pictures += [inputs["image"] for part in (data.test, data.shown) for inputs, _ in part]
    assert {float(np.max(picture)) for picture in pictures} == {100.0}
    truth = [truth["boxes"][0].numpy().tolist() for _, truth in data.test]
    assert sorted(truth) == [[[10, 10, 30, 30]], [[16, 16, 48, 48]]]


def test_sixteen_bits_and_palettes_are_the_same_picture(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, [40, 50]).astype("uint8")
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype("uint16") * 257).save(tmp_path / "sixteen.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "palette.png")
    windows = []
    for name, dtype in (("grey", tf.uint8), ("sixteen", tf.uint16), ("palette", tf.uint8)):
        image = tf.io.decode_png((tmp_path / f"{name}.png").read_bytes(), dtype=dtype)
        objects = {"bbox": tf.zeros([0, 4]), "label": tf.zeros([0], tf.int64)}
        windows.append(detection._window({"image": image, "objects": objects}, tf.constant([0, 0]), 64, 3, "none")[0])
    for window in windows[1:]:
        np.testing.assert_allclose(window, windows[0], atol=1e-3)


@pytest.mark.parametrize(("num_boxes", "expected"), [(1, "test"), (0, "validation")])
def test_a_test_part_without_boxes_is_not_scored(num_boxes, expected):
    """As coco's: its labels are kept by those who ask."""
    examples = tf.data.Dataset.from_tensors(example_of(64, 64, [[1, 1, 9, 9]] * num_boxes))
    info = types.SimpleNamespace(splits=dict.fromkeys(("train", "validation", "test")))
    builder = types.SimpleNamespace(name="x", info=info, as_dataset=lambda split, shuffle_files: examples)
    assert detection._splits(builder)[2] == expected


def test_score_is_that_of_whole_pictures():
    truth = {"boxes": [[0.0, 0, 10, 10], [20, 20, 30, 30]], "class_ids": [0, 1]}
    rows = {name: tf.constant([value]) for name, value in truth.items()}
    test = tf.data.Dataset.from_tensors(({"image": tf.zeros([1, 40, 40, 3])}, rows))

    def call(image):
        found = {"boxes": truth["boxes"][:1] + [[0.0] * 4], "scores": [0.9, 0.0], "class_ids": [0, 0]}
        return {name: np.array([value]) for name, value in found.items()} | {"count": np.array([1])}

    scores = detection.score(call, runner.Data(None, 1, None, test, ABOUT))
    assert scores == {"mAP": pytest.approx(0.5), "AP50": pytest.approx(0.5), "AR": pytest.approx(0.5), "total": 2}
    assert detection.describe(scores) == "Test mAP: 0.500 | AP50: 0.500 | AR: 0.500"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image_size=100"], "--image_size=100 must be a multiple of 32"),
        (["--width=20"], "--width=20 must be a multiple of 8"),
        (["--dataset=mnist_5k"], "object detection needs image .Image. and objects .Sequence."),
    ],
)
def test_options_that_cannot_work_are_refused(arguments, message, data_dir):
    with pytest.raises(runner.AppError, match=message):
        detection.load_data(options_for(detection.TASK, *arguments, f"--data_dir={data_dir}"))


def test_ranking_of_places_agrees_with_sklearn():
    random = np.random.default_rng(3)
    targets = np.zeros([4, 50, 5], "float32")
    targets[..., 0] = random.integers(-1, 2, [4, 50])
    outputs = random.normal(size=[4, 50, 7]).astype("float32")
    outputs[..., :2] += 2 * (targets[..., :1] == [0, 1])
    metric = detection.build_metrics(None)[0]
    for half in (slice(0, 2), slice(2, 4)):
        metric.update_state(targets[half], outputs[half])
    expected = sklearn_metrics.average_precision_score((targets[..., :1] == [0, 1]).ravel(), outputs[..., :2].ravel())
    assert float(metric.result()) == pytest.approx(expected, abs=0.01)  # 200 thresholds
    again = detection.PlacePrecision.from_config(metric.get_config())
    assert again.name == "place_precision"
