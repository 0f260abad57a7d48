"""The loss and the metrics against other implementations, what is served, the data, and what can go wrong with them."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from sklearn import metrics as sklearn_metrics

import tfhalf
from apps import runner
from apps.image import masks, segmentation
from benchmarks import colour_threshold
from tests import fakes
from tests.apps.image.test_masks import hard_cases, target_of
from tests.conftest import options_for
from tfhalf.datasets import blue_marble

NAMES = ["ocean", "land", "lake"]
IGNORED = 255


def data_for(channels: int = 3, multiple: int = 16, test=None, validation=None) -> runner.Data:
    about = {"class_names": NAMES, "class_weights": [1.0] * 3, "channels": channels, "multiple": multiple}
    return runner.Data(None, 10, validation, test, about)


# Loss and metrics


def test_score_agrees_with_sklearn():
    random = np.random.default_rng(4)
    labels = random.choice([0, 2, IGNORED], [6, 9, 8]).astype("int32")
    probabilities = random.dirichlet(np.ones(3), [6, 9, 8]).astype("float32")
    indices = np.arange(6, dtype="float32")
    dataset = tf.data.Dataset.from_tensor_slices(({"image": indices}, labels)).batch(4)
    choose = segmentation.decide(None, data_for())

    def call(image):
        return choose({"probabilities": tf.gather(probabilities, tf.cast(image, tf.int32))})

    scores = segmentation.score(call, data_for(test=dataset))
    inside = labels != IGNORED
    truth, seen = labels[inside], probabilities.argmax(-1)[inside]
    ious = sklearn_metrics.jaccard_score(truth, seen, labels=[0, 2], average=None)
    assert scores["iou_ocean"] == pytest.approx(ious[0])
    assert scores["iou_lake"] == pytest.approx(ious[1])
    assert "iou_land" not in scores
    assert scores["miou"] == pytest.approx(ious.mean())
    assert scores["dice"] == pytest.approx(sklearn_metrics.f1_score(truth, seen, labels=[0, 2], average="macro"))
    loss = sklearn_metrics.log_loss(truth, probabilities[inside], labels=[0, 1, 2])
    assert scores["loss"] == pytest.approx(loss, rel=1e-5)
    assert scores["total"] == len(truth)
    np.testing.assert_array_equal(
        masks.confusion(truth, seen, 3), sklearn_metrics.confusion_matrix(truth, seen, labels=[0, 1, 2])
    )


def test_line_of_the_summary():
    scores = {"loss": 0.0312, "miou": 0.75, "dice": 0.8, "iou_ocean": 0.99, "iou_lake": 0.51, "total": 168}
    assert segmentation.describe(scores) == "Test loss: 0.0312 | mIoU: 75.00% (ocean 99.00%, lake 51.00%)"


def test_part_without_labels_is_told():
    dataset = tf.data.Dataset.from_tensors(({"image": tf.zeros([1, 2, 2, 3])}, tf.fill([1, 2, 2], IGNORED)))
    outputs = {"class_map": np.zeros([1, 2, 2], int), "probabilities": np.full([1, 2, 2, 3], 1 / 3)}
    with pytest.raises(runner.AppError, match=r"no pixel of any class: .*choose another --dataset"):
        segmentation.score(lambda image: outputs, data_for(test=dataset))


# Model and what is served


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_model_in_each_policy(policy):
    options = options_for(segmentation.TASK, "--width=8", "--depth=3", f"--dtype_policy={policy}")
    model = runner.build(segmentation.TASK, options, data_for())
    assert tfhalf.left_alone(model) == {}
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert len(convolutions) == 2 * 3 + 2 + 2 * 3 + 2 + 1  # down, bottom, up, colours, logits
    pictures = np.random.default_rng(0).integers(0, 256, [2, 24, 40, 3]).astype("float32")
    assert model(pictures).shape == (2, 24, 40, 3)
    assert model(pictures).dtype == tf.float32
    encoded = keras.Model(model.input, model.get_layer("scales").output)(pictures)
    expected = np.concatenate([pictures / 127.5 - 1, np.log((pictures + 4) / 32)], -1)
    np.testing.assert_allclose(encoded, expected, atol=1e-5)
    assert np.isfinite(model(-pictures)).all()
    if policy != "float32":
        measured = tfhalf.coverage(model, pictures)
        assert measured.multiply_adds_in_half > 0.9
        normalisations = {layer.name for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)}
        assert set(measured.islands) == normalisations | {"logits"}


def test_steps_on_tiles_of_one_class_are_not_skipped():
    options = options_for(segmentation.TASK, "--width=4", "--depth=1", "--initial_scale=32768")
    model = runner.build(segmentation.TASK, options, data_for())
    pictures = np.full([2, 16, 16, 3], 12.0, "float32")
    for case in ("one class", "nothing but outside", "an object of one pixel"):
        targets = np.repeat(target_of(hard_cases()[case]), 2, axis=0)
        assert np.isfinite(model.train_on_batch(pictures, targets)[0])
    assert model.optimizer.steps_skipped == 0
    assert all(np.isfinite(weight.numpy()).all() for weight in model.weights)


def log_of_channels(pictures, training):
    """A model whose probabilities are the values of the picture itself."""
    assert all(size % 16 == 0 for size in pictures.shape[1:3])
    return tf.math.log(pictures)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (16, 32), (37, 50)])
def test_served_pixels_are_where_they_were(size):
    picture = np.random.default_rng(5).dirichlet(np.ones(3) * 3, [2, *size]).astype("float32")
    serve, _ = segmentation.serve(log_of_channels, data_for())
    np.testing.assert_allclose(serve(tf.constant(picture))["probabilities"], picture, atol=1e-6)


def test_large_picture_is_answered_in_its_own_size():
    truth = np.zeros([500, 3000], int)
    truth[100:200, 900:2100], truth[350:, :] = 1, 2
    picture = np.where(truth[..., np.newaxis] == np.arange(3), 0.98, 0.01).astype("float32")
    serve, _ = segmentation.serve(log_of_channels, data_for())
    outputs = segmentation.decide(None, data_for())(serve(tf.constant(picture[np.newaxis])))
    assert outputs["class_map"].dtype == tf.int32
    assert outputs["class_map"].shape == (1, 500, 3000)
    np.testing.assert_allclose(tf.reduce_sum(outputs["probabilities"], -1), 1, atol=1e-6)
    # It was computed on 1024 pixels: edges may be off by less than one of those, three of ours.
    assert np.mean(outputs["class_map"][0] == truth) > 0.99
    for y, x in [(103, 903), (196, 2096), (347, 5), (353, 5), (96, 1500), (204, 1500)]:
        assert outputs["class_map"][0, y, x] == truth[y, x]


def test_pictures_of_every_kind_are_served():
    model = runner.build(segmentation.TASK, options_for(segmentation.TASK, "--width=4", "--depth=2"), data_for())
    serve, signature = segmentation.serve(model, data_for())
    serve = tf.function(serve, autograph=False)
    picture = np.random.default_rng(6).integers(0, 256, [1, 20, 9, 3]).astype("uint8")
    expected = serve(tf.constant(picture, tf.float32))["probabilities"]
    assert expected.shape == (1, 20, 9, 3)
    np.testing.assert_allclose(tf.reduce_sum(expected, -1), 1, atol=1e-6)
    opaque = np.concatenate([picture, np.full_like(picture[..., :1], 255)], -1)
    for same in (picture, picture.astype("uint16") * 257, opaque):
        np.testing.assert_allclose(serve(tf.constant(same))["probabilities"], expected, atol=2e-3)
    grey = picture[..., :1]
    np.testing.assert_allclose(
        serve(tf.constant(grey))["probabilities"], serve(tf.constant(np.repeat(grey, 3, -1)))["probabilities"]
    )
    assert signature["image"].is_compatible_with(tf.constant(picture, tf.float32))


# Data


class TinySegments(tfds.core.GeneratorBasedBuilder):
    """Pictures of several sizes whose masks count from 1 and have no names, as oxford_iiit_pet's."""

    VERSION = tfds.core.Version("1.0.0")
    classes = (1, 2, 3)

    def _info(self):
        features = {"image": tfds.features.Image(), "segmentation_mask": tfds.features.Image(shape=(None, None, 1))}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(20), "test": self._generate_examples(3)}

    def _generate_examples(self, num):
        random = np.random.default_rng(num)
        for index in range(num):
            size = (30 + 5 * (index % 4), 50)
            mask = random.choice(self.classes, [*size, 1]).astype("uint8")
            yield index, {"image": np.repeat(mask * 50, 3, -1), "segmentation_mask": mask}


class TinySegmentsOfOneClass(TinySegments):
    """Nothing to tell apart."""

    classes = (2,)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """TFDS's folder with a stand-in of blue_marble: 35 tiles to train, 5 to validate, 10 to test; masks at random."""
    folder = tmp_path_factory.mktemp("data")
    fakes.write_map(folder / "manual" / "map", 700)
    builder = blue_marble.BlueMarble(data_dir=folder)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=folder / "manual"))
    return str(folder)


def load(folder: str, *arguments: str) -> runner.Data:
    return segmentation.load_data(options_for(segmentation.TASK, f"--data_dir={folder}", *arguments))


def test_parts_of_blue_marble(folder):
    data = load(folder, "--image_size=96", "--batch_size=4", "--windows=2")
    assert data.about["class_names"] == NAMES
    assert (data.about["channels"], data.about["multiple"]) == (3, 16)
    np.testing.assert_allclose(data.about["class_weights"], 1, atol=0.02)  # the masks are a third of each
    assert data.steps_per_epoch == 35 * 2 // 4
    batches = list(data.train(0).as_numpy_iterator())
    assert len(batches) == data.steps_per_epoch
    assert all(picture.shape == (4, 96, 96, 3) and target.shape == (4, 96, 96, 2) for picture, target in batches)
    target = np.concatenate([target for _, target in batches])
    labels, weights = target[..., 0].astype(int), target[..., 1]
    assert set(np.unique(labels)) == {0, 1, 2, IGNORED}  # zoomed out, a window is larger than a tile
    np.testing.assert_array_equal(weights, np.append(data.about["class_weights"], 0).astype("float32")[labels % 252])
    validation = [target for _, target in data.validation.as_numpy_iterator()]
    assert sum(map(len, validation)) == 5 * 2
    assert IGNORED not in np.concatenate(validation)
    tiles = [(i["image"], labels) for i, labels in data.test.as_numpy_iterator()]
    assert [len(labels) for _, labels in tiles] == [4, 4, 2]
    assert tiles[0][0].shape == (4, 128, 128, 3)
    assert tiles[0][0].dtype == np.float32
    assert tiles[0][1].shape == (4, 128, 128)


def test_masks_without_names_that_count_from_1(tmp_path):
    data = load(str(tmp_path), "--dataset=tiny_segments", "--image_size=32", "--batch_size=5", "--augment=none")
    assert data.about["class_names"] == ["1", "2", "3"]
    assert data.steps_per_epoch == 18 // 5  # a tenth validates
    for pictures, targets in data.train(0).as_numpy_iterator():
        counted = targets[..., 1] > 0
        np.testing.assert_array_equal(pictures[..., 0][counted], 50 * (targets[..., 0][counted] + 1))
        assert set(np.unique(targets[..., 0])) <= {0, 1, 2, IGNORED}
    shapes = [labels.shape for _, labels in data.test.as_numpy_iterator()]
    assert sorted(shapes) == [(1, 30, 50), (1, 35, 50), (1, 40, 50)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image_size=100"], r"--image_size=100 can't be halved 4 times \(--depth\); choose a multiple of 16"),
        (["--dataset=mnist_5k"], r"--dataset=mnist_5k has .*segmentation needs image .*segmentation_mask"),
        (["--dataset=blue_marbles"], "did you mean blue_marble"),
        (["--batch_size=36"], r"--batch_size=36 is more than the 35 windows .*lower it or raise --windows"),
        (
            ["--dataset=tiny_segments_of_one_class"],
            "hold 1 classes of 1; segmentation needs 2 to 255 .a value",
        ),
    ],
)
def test_what_cannot_work_is_refused(folder, arguments, message):
    with pytest.raises((runner.AppError, runner.datasets.DatasetError), match=message):
        load(folder, *arguments)


def test_figures_and_files(folder, tmp_path):
    data = load(folder, "--batch_size=4")
    model = runner.build(segmentation.TASK, options_for(segmentation.TASK, "--width=4", "--depth=1"), data)
    serve, _ = segmentation.serve(model, data)
    choose = segmentation.decide(None, data)
    figures = segmentation.show(model, data) | segmentation.conclude(lambda image: choose(serve(image)), data, tmp_path)
    for png in figures.values():
        assert tf.io.decode_png(png).shape[-1] == 4
    files = sorted(tmp_path.glob("*.png"))
    assert [file.name for file in files] == [f"picture{number}.png" for number in (1, 2, 3, 4)]
    tiles = {picture.astype("uint8").tobytes() for i, _ in data.test.as_numpy_iterator() for picture in i["image"]}
    assert all(tf.io.decode_png(file.read_bytes()).numpy().tobytes() in tiles for file in files)


# The baseline


def test_threshold_is_the_best_there_is():
    random = np.random.default_rng(7)
    colours = random.integers(0, 256, [400, 3]).astype("uint8")
    difference = colours[:, 2].astype(int) - colours[:, 0]
    labels = np.where(random.random(400) < 0.1, 2, (difference + random.normal(0, 60, 400) < 20).astype(int))
    predict = colour_threshold.fit_threshold(colours, labels, 3)
    sides = [np.where(difference >= threshold, a, 1 - a) for threshold in range(-255, 257) for a in (0, 1)]
    assert np.sum(predict(colours) == labels) == max(np.sum(side == labels) for side in sides)


def test_table_knows_its_cells_and_guesses_others():
    colours = np.array([[0, 0, 0], [7, 7, 7], [7, 0, 0], [255, 255, 255], [8, 0, 0]], "uint8")
    predict = colour_threshold.fit_table(colours, np.array([2, 2, 1, 0, IGNORED]), 3)
    queries = np.array([[3, 3, 3], [248, 248, 248], [8, 0, 0], [100, 0, 0]], "uint8")
    np.testing.assert_array_equal(predict(queries), [2, 0, 2, 2])
