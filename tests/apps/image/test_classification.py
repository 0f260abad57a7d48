"""Pictures of every kind, the models, the data and the score."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn import metrics as sklearn_metrics

import tfhalf
from apps import runner
from apps.image import classification


def options_for(**changes) -> types.SimpleNamespace:
    plain = {
        "model": "convnet",
        "depth": 8,
        "image_size": 32,
        "augment": "none",
        "label_smoothing": 0.0,
        "weight_decay": 1e-4,
    }
    shared = {
        "batch_size": 8,
        "seed": 0,
        "learning_rate": 1e-3,
        "dataset": "mnist_5k",
        "data_dir": None,
        "given": set(),
    }
    return types.SimpleNamespace(**(plain | shared | changes))


def data_for(channels: int = 1, size: int = 32, num_classes: int = 10) -> runner.Data:
    about = {"class_names": [str(i) for i in range(num_classes)], "image_size": size, "channels": channels}
    return runner.Data(None, 1, None, None, about)


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 40), width=st.integers(1, 40), num=st.integers(1, 4),
    channels=st.sampled_from([1, 3]), seed=st.integers(0, 99),
)  # fmt: skip
def test_pictures_of_any_size_and_kind_fit(height, width, num, channels, seed):
    picture = np.random.default_rng(seed).integers(0, 256, [2, height, width, num]).astype("uint8")
    fitted = classification.fit_pictures(tf.constant(picture), 16, channels).numpy()
    assert fitted.shape == (2, 16, 16, channels)
    assert fitted.dtype == np.float32
    assert fitted.min() >= -1e-3
    assert fitted.max() <= 255.001


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("L", 3), ("LA", 1), ("RGB", 3), ("RGB", 1), ("RGBA", 3), ("RGBA", 1)]
)
def test_colours_and_alpha_agree_with_pillow(mode, channels):
    bands = len(mode)
    array = np.random.default_rng(0).integers(0, 256, [16, 16, bands]).astype("uint8")
    picture = Image.fromarray(array.squeeze(), mode)
    black = Image.new("RGBA", picture.size, "black")
    expected = Image.alpha_composite(black, picture.convert("RGBA")).convert("RGB")
    expected = np.asarray(expected.convert("L"))[..., np.newaxis] if channels == 1 else np.asarray(expected)
    fitted = classification.fit_pictures(tf.constant(array[np.newaxis]), 16, channels).numpy()[0]
    np.testing.assert_allclose(fitted, expected, atol=2)  # Pillow rounds to whole grey values, twice


def test_picture_is_kept_whole():
    wide = np.full([1, 10, 40, 1], 200, "float32")
    fitted = classification.fit_pictures(tf.constant(wide), 32, 1).numpy()[0, ..., 0]
    np.testing.assert_allclose(fitted[12:20], 200, rtol=1e-5)
    assert not fitted[:12].any()
    assert not fitted[20:].any()


def test_fitting_twice_changes_nothing():
    picture = tf.random.stateless_uniform([1, 32, 32, 3], [1, 2], 0, 255)
    np.testing.assert_allclose(classification.fit_pictures(picture, 32, 3), picture, atol=1e-4)


def test_resnet_is_the_one_in_the_paper():
    # He et al. 2016, table 6: ResNet-20 has 0.27 M and ResNet-56 0.85 M parameters (with option A shortcuts).
    for depth, millions in ((20, 0.27), (56, 0.85)):
        model = classification.build_model(options_for(model="resnet", depth=depth), data_for(3))
        assert model.count_params() / 1e6 == pytest.approx(millions, abs=0.015)
        weighted = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense)]
        assert len([layer for layer in weighted if "shortcut" not in layer.name]) == depth


def test_convnet_has_two_convolutions_and_three_dense_layers():
    model = classification.build_model(options_for(), data_for())
    kinds = [type(layer).__name__ for layer in model.layers]
    assert kinds.count("Conv2D") == 2
    assert kinds.count("Dense") == 3
    assert model.input_shape == (None, 32, 32, 1)
    assert model.output_shape == (None, 10)


@pytest.mark.parametrize("augment", ["none", "shift", "flip", "shift_flip"])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_augmentation_acts_in_training_only_and_in_float32(augment, policy):
    keras.utils.set_random_seed(0)  # else one run in 256 mirrors none of the eight pictures
    with tfhalf.PrecisionPlan(policy).scope():
        inputs = keras.Input([32, 32, 3])
        layer = keras.Model(inputs, classification._augment(inputs, options_for(augment=augment)), dtype="float32")
    pictures = tf.random.stateless_uniform([8, 32, 32, 3], [1, 2], 0, 255)
    np.testing.assert_array_equal(layer(pictures, training=False), pictures)
    changed = layer(pictures, training=True)
    assert changed.dtype == tf.float32
    assert bool(np.any(changed != pictures)) is (augment != "none")
    if augment == "flip":
        mirrored = pictures[:, :, ::-1]
        for before, mirror, after in zip(pictures, mirrored, changed, strict=True):
            assert np.array_equal(after, before) or np.array_equal(after, mirror)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_pictures_reach_the_first_convolution_with_one_rounding(policy):
    # A Sequential of augmentation layers once rounded them to half before they were scaled.
    with tfhalf.PrecisionPlan(policy).scope():
        model = classification.build_model(options_for(augment="shift_flip"), data_for(3))
    before = keras.Model(model.inputs, model.get_layer("scale").output)
    pictures = tf.random.stateless_uniform([4, 32, 32, 3], [1, 2], 0, 255)
    np.testing.assert_allclose(before(pictures, training=False), pictures / 127.5 - 1, atol=1e-6)


def test_pretrained_backbone_from_a_folder(tmp_path):
    keras_hub = pytest.importorskip("keras_hub")
    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64], input_conv_kernel_sizes=[3], stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[1, 1], stackwise_num_strides=[1, 2], block_type="basic_block",
        image_shape=(None, None, 3),
    )  # fmt: skip
    backbone.save_to_preset(str(tmp_path / "preset"))
    keras_hub.layers.ResNetImageConverter(scale=1 / 255).save_to_preset(str(tmp_path / "preset"))
    options = options_for(model=f"keras_hub:{tmp_path / 'preset'}")
    with tfhalf.PrecisionPlan().scope():
        model = classification.build_model(options, data_for(1))
    tfhalf.precision.require_float32_outputs(model)
    assert tfhalf.coverage(model).multiply_adds_in_half > 0.9
    loaded = next(layer for layer in model.layers if isinstance(layer, keras_hub.models.Backbone))
    for ours, theirs in zip(loaded.get_weights(), backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    serve, _ = classification.serve(model, data_for(1))
    served = serve(tf.zeros([2, 40, 30, 4]))["probabilities"]
    np.testing.assert_allclose(served.numpy().sum(-1), 1, rtol=1e-5)


def test_preset_that_cannot_be_had_is_told():
    with pytest.raises(
        runner.AppError, match=r"--model=keras_hub:/no/such can't be loaded: .*; it needs the web, or a folder"
    ):
        classification.build_model(options_for(model="keras_hub:/no/such"), data_for(3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "lenet"}, "must be convnet, resnet or keras_hub"),
        ({"model": "keras_hub:"}, "must be convnet, resnet or keras_hub"),
        ({"model": "resnet", "depth": 21}, "must be 6n"),
        ({"model": "convnet", "given": {"depth"}}, "--depth has no effect on --model=convnet"),
        ({"dataset": "mnist_6k"}, "did you mean mnist_5k"),
        ({"dataset": "imdb_reviews"}, "needs image"),
        ({"batch_size": 5000}, "more than the 3600 training pictures"),
    ],
)
def test_options_that_cannot_work_are_refused(changes, message, data_dir):
    with pytest.raises((runner.AppError, runner.datasets.DatasetError), match=message):
        classification.load_data(options_for(data_dir=data_dir, **changes))


def test_parts_do_not_overlap(data_dir):
    data = classification.load_data(options_for(data_dir=data_dir, batch_size=100))
    seen = []
    for part in (data.train(0), data.validation, data.test.map(lambda inputs, labels: (inputs["image"], labels))):
        seen.append({picture.tobytes() for pictures, _ in part.as_numpy_iterator() for picture in pictures})
    assert [len(part) for part in seen] == [3600, 400, 1000]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


def test_score_agrees_with_sklearn():
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 50)
    probabilities = random.dirichlet(np.ones(4), 50).astype("float32")
    dataset = tf.data.Dataset.from_tensor_slices(({"image": np.arange(50)}, labels)).batch(7)
    data = runner.Data(None, 1, None, dataset, {})
    scores = classification.score(lambda image: {"probabilities": probabilities[image.numpy()]}, data)
    assert scores["loss"] == pytest.approx(sklearn_metrics.log_loss(labels, probabilities), rel=1e-5)
    assert scores["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels, probabilities.argmax(-1)))
    line = classification.describe({"loss": 0.07, "accuracy": 0.98, "correct": 980, "total": 1000})
    assert line == "Test loss: 0.0700 | Accuracy: 98.00% (980/1000)"


def test_learning_rate_warms_up_and_falls_to_zero():
    schedule = classification.build_optimizer(options_for(learning_rate=0.1), 200)._learning_rate
    rates = [float(schedule(step)) for step in range(201)]
    assert rates[0] == pytest.approx(0.01)  # not 0: the first step counts
    assert np.argmax(rates) == 10
    assert max(rates) == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.0, abs=1e-6)
    assert all(np.diff(rates[10:]) <= 0)


def test_loss_is_smoothed_cross_entropy():
    loss = classification.build_loss(options_for(label_smoothing=0.1))
    logits = np.array([[2.0, 0.0, -1.0]])
    log_p = logits - np.log(np.exp(logits).sum())
    expected = -(np.array([0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3]) * log_p).sum()
    assert float(loss(np.array([[1.0, 0.0, 0.0]]), logits)) == pytest.approx(expected, rel=1e-6)
