"""Two classes and ratings: scores against scipy, what is served, which sets can't be used, and one real run."""

import json
import subprocess
import sys
from typing import ClassVar

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from scipy import stats
from sklearn import metrics as sklearn_metrics

from apps import runner
from apps.text import classification, sentiment
from tests.conftest import options_for, run_module

GOOD, BAD = ["great", "fine", "lovely"], ["awful", "poor", "dull"]


class RatedOpinions(tfds.core.GeneratorBasedBuilder):
    """Ratings are those of a text's words; where they are 0 there is no label."""

    VERSION = tfds.core.Version("1.0.0")
    text, names = "text", ("negative", "positive")
    sizes: ClassVar = {"train": 90, "test": 30}

    def _info(self):
        features = {
            self.text: tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=self.names),
            "rating": tfds.features.Scalar(np.float32),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(name, num) for name, num in self.sizes.items()}

    def _generate_examples(self, name, num):
        random = np.random.default_rng(num)
        for index in range(num):
            rating = [-4, -2, 0, 2, 4][index % 5]
            words = random.choice(GOOD if rating > 0 else BAD, abs(rating)).tolist() + ["film"] * (1 + index % 3)
            yield (
                index,
                {self.text: " ".join(words), "label": int(np.sign(rating) + 1) // 2 - (rating == 0), "rating": rating},
            )


class PublicOpinions(RatedOpinions):
    """As glue/sst2: `sentence`, no rating, and the labels of the test part are secret."""

    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name="sst2")]
    text, sizes = "sentence", {"train": 90, "validation": 30, "test": 20}

    def _info(self):
        features = {
            self.text: tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=self.names),
            "idx": tfds.features.Scalar(np.int32),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, name, num):
        for index, example in super()._generate_examples(name, num):
            label = -1 if name == "test" else max(0, example["label"])
            yield index, {"sentence": example["sentence"], "label": label, "idx": index}


class StarsOfOpinions(PublicOpinions):
    """Three classes."""

    BUILDER_CONFIGS: ClassVar = []
    names = ("bad", "fair", "good")


def load(folder, *arguments: str):
    flags = [f"--data_dir={folder}", "--dataset=rated_opinions", "--vocabulary_size=320", "--batch_size=8"]
    options = options_for(sentiment.TASK, *flags, "--width=32", "--depth=1", *arguments)
    return options, sentiment.load_data(options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=["binary", "graded"])
def learned(request, folder):
    """A small model that has learned the words, its data, and what clients get of it."""
    options, data = load(folder, f"--target={request.param}", "--learning_rate=1e-2", "--epochs=10")
    model = runner.build(sentiment.TASK, options, data)
    for epoch in range(options.epochs):
        model.fit(data.train(epoch), verbose=0)
    return model, data, runner.answering(sentiment.TASK, model, data)


# Scores


def rated(expected, batch_size: int = 7) -> runner.Data:
    lines = np.array([str(i) for i in range(len(expected))], object)
    test = tf.data.Dataset.from_tensor_slices(({"text": lines}, np.asarray(expected, "float32"))).batch(batch_size)
    return runner.Data(None, 1, None, test, {"graded": True, "class_names": ["negative", "positive"]})


def rates(seen: np.ndarray):
    return lambda text: {"rating": tf.gather(np.asarray(seen, "float32"), tf.strings.to_number(text, tf.int32))}


def test_ratings_are_scored_as_scipy_and_sklearn_do():
    random = np.random.default_rng(1)
    expected = random.choice(np.arange(-4, 4.5, 0.5), 200).astype("float32")
    seen = (expected * 0.5 + random.normal(0, 1, 200)).astype("float32")
    scores = sentiment.score(rates(seen), rated(expected))
    assert scores["pearson"] == pytest.approx(stats.pearsonr(seen, expected).statistic, abs=1e-6)
    assert scores["pearson"] == pytest.approx(np.corrcoef(seen.astype(float), expected.astype(float))[0, 1], abs=1e-9)
    assert scores["mae"] == pytest.approx(sklearn_metrics.mean_absolute_error(expected, seen), rel=1e-6)
    # As the loss in training, where ratings are shares of 4.
    assert scores["loss"] == pytest.approx(sklearn_metrics.mean_squared_error(expected, seen) / 16, rel=1e-6)
    signed = expected != 0
    assert not signed.all()
    truth, sides = expected[signed] > 0, seen[signed] > 0
    assert scores["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(truth, sides))
    assert scores["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(truth, sides, average="macro"))
    assert scores["total"] == signed.sum()
    assert scores["correct"] == np.sum(truth == sides)
    assert {type(value) for value in scores.values()} == {int, float}


def test_ratings_of_0_do_not_count_for_accuracy():
    scores = sentiment.score(rates([1, -2, 3, -3, 0.5]), rated([2, -1, 0, 0, -0.1]))
    assert (scores["correct"], scores["total"]) == (2, 3)
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["mae"] == pytest.approx((1 + 1 + 3 + 3 + 0.6) / 5, rel=1e-6)  # here they do


def test_two_classes_are_scored_as_classification_does():
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]], "float32")
    lines = np.array(["0", "1", "2"], object)
    test = tf.data.Dataset.from_tensor_slices(({"text": lines}, [0, 0, 1])).batch(2)
    data = runner.Data(None, 1, None, test, {"graded": False, "class_names": ["negative", "positive"]})

    def call(text):
        return {"probabilities": tf.gather(probabilities, tf.strings.to_number(text, tf.int32))}

    scores = sentiment.score(call, data)
    assert scores == classification.score(call, data)
    assert scores["loss"] == pytest.approx(-np.log([0.9, 0.4, 0.8]).mean(), rel=1e-5)


def test_lines_of_the_summary():
    scores = {"loss": 0.05, "accuracy": 0.75, "macro_f1": 0.7, "correct": 3, "total": 4}
    line = "Test loss: 0.0500 | Accuracy: 75.00% (3/4) | Macro-F1: 70.00%"
    assert sentiment.describe(scores) == line
    graded = sentiment.describe(scores | {"pearson": 0.61234, "mae": 0.8127})
    assert graded == line + " | Pearson's r: 0.6123 | Mean absolute error: 0.813"


def test_losses_and_metrics_follow_the_target():
    random = np.random.default_rng(2)
    targets, outputs = random.normal(size=[9, 1]).astype("float32"), random.normal(size=[9, 1]).astype("float32")
    graded = options_for(sentiment.TASK, "--target=graded")
    assert float(sentiment.build_loss(graded)(targets, outputs)) == pytest.approx(np.mean((targets - outputs) ** 2))
    (metric,) = sentiment.build_metrics(graded)
    for rows in (slice(0, 4), slice(4, 9)):
        metric.update_state(targets[rows], outputs[rows])
    assert np.isfinite(metric.result()).all()
    whole = keras.metrics.PearsonCorrelation(axis=0)
    whole.update_state(targets, outputs)
    expected = stats.pearsonr(targets[:, 0], outputs[:, 0]).statistic
    assert float(np.squeeze(whole.result())) == pytest.approx(expected, abs=1e-5)
    binary = options_for(sentiment.TASK)
    assert isinstance(sentiment.build_loss(binary), keras.losses.CategoricalCrossentropy)
    (metric,) = sentiment.build_metrics(binary)
    metric.update_state(np.eye(2)[[0, 1]], np.array([[1.0, 2.0], [1.0, 2.0]]))
    assert float(metric.result()) == 0.5


# Data


def test_targets_of_ratings(folder):
    options, data = load(folder, "--target=graded")
    assert data.about["graded"] is True
    targets = np.concatenate([target for _, target in data.train(0).as_numpy_iterator()])
    assert targets.dtype == np.float32
    assert targets.shape == (80, 1)
    assert set(targets[:, 0]) == {-1, -0.5, 0, 0.5, 1}  # -4 to 4, as shares of the highest
    labels = np.concatenate([labels for _, labels in data.test.as_numpy_iterator()])
    assert sorted(labels) == sorted([-4.0, -2.0, 0.0, 2.0, 4.0] * 6)
    assert runner.build(sentiment.TASK, options, data).output_shape == (None, 1)


def test_two_classes_of_ratings(folder):
    options, data = load(folder)
    assert data.about["graded"] is False
    assert data.about["class_names"] == ["negative", "positive"]
    answers = [
        pair for inputs, labels in data.test.as_numpy_iterator() for pair in zip(inputs["text"], labels, strict=True)
    ]
    assert len(answers) == 24  # of 30: a rating of 0 is neither
    assert all(label == any(word in line.decode() for word in GOOD) for line, label in answers)
    # A network learns how sure people are: about -2 less than about -4, and both sides alike.
    (reader,) = data.resources
    seen = {}
    for token_ids, targets in [*data.train(0).as_numpy_iterator(), *data.validation.as_numpy_iterator()]:
        assert targets.dtype == np.float32
        np.testing.assert_allclose(targets.sum(axis=1), 1)
        lines = reader.vocabulary.detokenize(tf.RaggedTensor.from_tensor(token_ids[:, 1:], padding=0)).numpy()
        for line, (_, positive) in zip(lines, targets, strict=True):
            words = line.decode().split()
            rating = sum(word in GOOD for word in words) - sum(word in BAD for word in words)
            assert seen.setdefault(rating, positive) == positive
    assert sorted(seen) == [-4, -2, 2, 4]
    for rating, positive in seen.items():
        assert positive == pytest.approx(np.clip(0.5 + rating / (2 * sentiment._SURE), 0, 1))
    assert 0 <= seen[-4] <= seen[-2] < 0.5 < seen[2] <= seen[4] <= 1
    assert runner.build(sentiment.TASK, options, data).output_shape == (None, 2)


def test_set_as_glue_has_it(folder):
    _, data = load(folder, "--dataset=public_opinions/sst2")
    pairs = [
        pair for inputs, labels in data.test.as_numpy_iterator() for pair in zip(inputs["text"], labels, strict=True)
    ]
    assert len(pairs) == 30  # the validation part: the labels of the test part are secret
    assert all(label == any(word in line.decode() for word in GOOD) for line, label in pairs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--dataset=public_opinions/sst2", "--target=graded"],
            r"--dataset=public_opinions/sst2 has .*graded sentiment needs sentence \(Text\) and rating \(Scalar\)",
        ),
        (
            ["--dataset=reuters_r8", "--target=graded"],
            r"--dataset=reuters_r8 has the features .*; graded sentiment needs text \(Text\) and rating \(Scalar\)",
        ),
        (
            ["--dataset=reuters_r8"],
            "--dataset=reuters_r8 has 8 classes; sentiment needs two, .*apps.text.classification",
        ),
        (["--dataset=stars_of_opinions"], "--dataset=stars_of_opinions has 3 classes; sentiment needs two"),
        (["--dataset=mnist_5k"], "--dataset=mnist_5k has .*; binary sentiment needs text"),
        (["--width=33"], "--width=33 must be a multiple of 32"),
    ],
)
def test_what_cannot_work_is_refused(folder, arguments, message):
    with pytest.raises(runner.AppError, match=message):
        load(folder, *arguments)


# What is served


def test_it_learns_what_words_mean(learned):
    model, data, answer = learned
    graded = data.about["graded"]
    scores = sentiment.score(answer, data)
    assert scores["accuracy"] > 0.9
    assert scores["total"] == 24  # of 30: a fifth are neither
    outputs = answer(text=tf.constant(["great lovely FINE great film", "awful dull poor awful film", ""]))
    assert list(outputs) == ["rating" if graded else "probabilities"]
    values = outputs["rating" if graded else "probabilities"]
    assert values.dtype == tf.float32
    assert values.shape == ([3] if graded else [3, 2])
    if graded:
        assert scores["pearson"] > 0.8
        assert scores["mae"] < 1
        assert values[0] > 2  # of 4, not of 1
        assert values[1] < -2
    else:
        np.testing.assert_allclose(values.numpy().sum(axis=1), 1, rtol=1e-5)
        assert values.numpy().argmax(axis=1)[:2].tolist() == [1, 0]
    assert sentiment.serve(model, data)[1] == {"text": tf.TensorSpec([None], tf.string)}


def test_scored_ratings_are_the_served_ones(learned):
    _, data, answer = learned
    lines = np.concatenate([inputs["text"] for inputs, _ in data.test.as_numpy_iterator()])
    labels = np.concatenate([labels for _, labels in data.test.as_numpy_iterator()])
    scores = sentiment.score(answer, data)
    values = next(iter(answer(text=tf.constant(lines)).values())).numpy()
    if data.about["graded"]:
        # Other batches, so within what float16 rounds.
        assert scores["mae"] == pytest.approx(np.mean(np.abs(values - labels)), abs=1e-2)
    else:
        assert scores["accuracy"] == np.mean(values.argmax(axis=1) == labels)


def test_what_is_shown_and_written(learned, tmp_path):
    model, data, answer = learned
    graded = data.about["graded"]
    lines, truth = next(data.shown.as_numpy_iterator())
    header, _, *rows = sentiment.show(model, data)["predictions"].splitlines()
    assert header == f"| text | {'rating' if graded else 'is'} | predicted |"
    assert len(rows) == len(lines)
    if graded:
        seen = answer(text=tf.constant(lines))["rating"].numpy()
        for row, line, rating, predicted in zip(rows, lines, 4 * truth[:, 0], seen, strict=True):
            cells = row.strip("| ").split(" | ")
            assert cells[:2] == [line.decode(), f"{rating:+.1f}"]
            assert float(cells[2]) == pytest.approx(predicted, abs=0.1)
    figures = sentiment.conclude(answer, data, tmp_path)
    assert list(figures) == ["ratings" if graded else "confusion_matrix"]
    assert tf.io.decode_png(next(iter(figures.values()))).shape[-1] == 4
    files = {path.name: path.read_bytes().rstrip(b"\n") for path in tmp_path.iterdir()}
    by_text = {
        line: label
        for inputs, labels in data.test.as_numpy_iterator()
        for line, label in zip(inputs["text"], labels, strict=True)
    }
    if graded:  # from the lowest rating to the highest
        found = [by_text[files[f"text{number}.txt"]] for number in range(1, 9)]
        assert len(files) == 8
        assert found == sorted(found)
        assert (found[0], found[-1]) == (-4, 4)
    else:
        assert {name: by_text[text] for name, text in files.items()} == {"negative.txt": 0, "positive.txt": 1}


# The command line

SERVE = """
import json, sys
for name in ("keras", "tfhalf", "apps", "sentencepiece", "tensorflow_text"):
    sys.modules[name] = None
import tensorflow as tf
loaded = tf.saved_model.load(sys.argv[1])
outputs = loaded.signatures["serving_default"](text=tf.constant(["A wonderful film!", "", "\\U0001f600 \\u05e9"]))
print(json.dumps({name: tensor.numpy().tolist() for name, tensor in outputs.items()}))
"""


@pytest.mark.soak
def test_graded_from_the_command_line_to_a_server(data_dir, tmp_path):
    flags = [
        f"--data_dir={data_dir}",
        "--target=graded",
        "--steps_per_epoch=5",
        "--epochs=1",
        "--width=32",
        "--depth=1",
    ]
    flags += ["--vocabulary_size=1000", f"--workdir={tmp_path}/run", f"--saved_model_dir={tmp_path}/saved_models"]
    result = run_module("apps.text.sentiment", *flags)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "sentiment on vader_movies, mixed_float16" in result.stdout
    summary = [line for line in result.stdout.splitlines() if line.startswith("Test loss: ")]
    bundle = tmp_path / "saved_models" / "sentiment_vader_movies" / "1"
    manifest = json.loads((bundle / "assets.extra" / "manifest.json").read_text())
    scores = manifest["metadata"]["metrics"]
    assert summary == [sentiment.describe(scores["trained"])]
    assert " | Pearson's r: " in summary[0]
    assert {"trained", "trained, in float32", "serving_default", "serving_float32"} <= set(scores)
    assert scores["trained"]["total"] > 1000
    examples = sorted((tmp_path / "run" / "examples").glob("*.txt"))
    assert [path.name for path in examples] == [f"text{number}.txt" for number in range(1, 9)]
    command = [sys.executable, "-c", SERVE, str(bundle)]
    result = subprocess.run(command, cwd=bundle, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    ratings = np.array(json.loads(result.stdout)["rating"])
    assert ratings.shape == (3,)
    assert np.isfinite(ratings).all()
