"""The score against scikit-learn, the loss by hand, what is served and written, and which sets can't be used."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image
from sklearn import metrics as sklearn_metrics

from apps import runner
from apps.text import classification
from tests.conftest import options_for

NAMES = ["earn", "acq/merger", "crude oil", "never"]
TOPICS = {"earn": "profit dividend share", "acq/merger": "offer stake bid", "crude oil": "opec barrel well"}


# The score


def data_of(labels, lines=None, batch_size: int = 7) -> runner.Data:
    lines = [str(i) for i in range(len(labels))] if lines is None else lines
    test = tf.data.Dataset.from_tensor_slices(({"text": np.array(lines, object)}, labels)).batch(batch_size)
    return runner.Data(None, 1, None, test, {"class_names": NAMES})


def call_of(probabilities: np.ndarray):
    """What answers the text "17" with row 17."""
    return lambda text: {"probabilities": tf.gather(probabilities, tf.strings.to_number(text, tf.int32))}


@pytest.fixture
def answers():
    """Labels of 50 texts, without the last class, and probabilities that are often right."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 50)
    probabilities = random.dirichlet(np.ones(4), 50) + 0.4 * np.eye(4)[labels]
    return labels, (probabilities / probabilities.sum(axis=1, keepdims=True)).astype("float32")


def test_score_agrees_with_sklearn(answers):
    labels, probabilities = answers
    scores = classification.score(call_of(probabilities), data_of(labels))
    seen = probabilities.argmax(axis=1)
    assert 3 in seen  # a class that is only predicted counts as an error, but is none of the mean's
    assert scores["loss"] == pytest.approx(sklearn_metrics.log_loss(labels, probabilities, labels=range(4)), rel=1e-5)
    assert scores["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels, seen))
    each = sklearn_metrics.f1_score(labels, seen, labels=[0, 1, 2], average=None)
    assert scores["macro_f1"] == pytest.approx(each.mean())
    by_hand = [2 * np.sum((seen == c) & (labels == c)) / (np.sum(seen == c) + np.sum(labels == c)) for c in range(3)]
    assert scores["macro_f1"] == pytest.approx(np.mean(by_hand))
    assert (scores["correct"], scores["total"]) == (np.sum(seen == labels), 50)
    assert {type(value) for value in scores.values()} <= {int, float}  # JSON values


def test_probability_of_0_is_a_large_loss_and_no_infinite_one():
    probabilities = np.array([[1, 0, 0, 0], [0, 1, 0, 0]], "float32")
    scores = classification.score(call_of(probabilities), data_of([0, 0]))
    assert scores["loss"] == pytest.approx(-np.log(np.finfo(np.float32).tiny) / 2, rel=1e-5)
    assert scores["accuracy"] == 0.5


def test_line_of_the_summary():
    line = classification.describe({"loss": 0.1234, "accuracy": 0.975, "macro_f1": 0.9, "correct": 39, "total": 40})
    assert line == "Test loss: 0.1234 | Accuracy: 97.50% (39/40) | Macro-F1: 90.00%"


def test_loss_is_smoothed_cross_entropy():
    loss = classification.build_loss(None)
    logits = np.array([[2.0, 0.0, -1.0], [0.5, 1.0, 3.0]])
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    targets = np.eye(3)[[0, 1]]
    expected = -np.sum((0.95 * targets + 0.05 / 3) * log_p, axis=1).mean()
    assert float(loss(targets, logits)) == pytest.approx(expected, rel=1e-6)
    (metric,) = classification.build_metrics(None)
    metric.update_state(targets, logits)
    assert float(metric.result()) == pytest.approx(0.5)


# Figures and files


def test_confusion_matrix_and_example_files(answers, tmp_path):
    labels, probabilities = answers
    figures = classification.conclude(call_of(probabilities), data_of(labels), tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    # One of each class that there is, by a name that a file system takes.
    firsts = [np.flatnonzero(labels == c)[0] for c in range(3)]
    assert files == {
        f"{name}.txt": f"{first}\n".encode()
        for name, first in zip(["earn", "acq_merger", "crude_oil"], firsts, strict=True)
    }
    assert list(figures) == ["confusion_matrix"]
    assert tf.io.decode_png(figures["confusion_matrix"]).shape[-1] == 4


def test_confusion_matrix_has_true_classes_in_rows(tmp_path):
    # All texts are of class 0 and taken for class 2: the only dark cell is in the first row, third column.
    probabilities = np.tile(np.eye(4, dtype="float32")[2], [6, 1])
    figures = classification.conclude(call_of(probabilities), data_of([0] * 6), tmp_path)
    (tmp_path / "matrix.png").write_bytes(figures["confusion_matrix"])
    pixels = np.asarray(Image.open(tmp_path / "matrix.png").convert("RGB")).astype(int)
    dark = (pixels[..., 2] - pixels[..., 0] > 80) & (pixels[..., 0] < 40)  # matplotlib's darkest blue
    light = np.all(np.abs(pixels - [247, 251, 255]) < 3, axis=-1)  # and its lightest
    (top, bottom), (left, right) = ((np.flatnonzero(light.any(axis=axis))[[0, -1]]) for axis in (1, 0))
    y, x = np.argwhere(dark).mean(axis=0)
    assert int(4 * (y - top) / (bottom - top)) == 0
    assert int(4 * (x - left) / (right - left)) == 2


# Data, and what is served


class TopicsOfTexts(tfds.core.GeneratorBasedBuilder):
    """Texts of three classes, each with words of its own; and a class that no text has."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=NAMES)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(80, 0), "test": self._generate_examples(21, 1)}

    def _generate_examples(self, num, seed):
        random = np.random.default_rng(seed)
        for index in range(num):
            name = NAMES[index % 3]
            yield index, {"text": " ".join(random.choice(TOPICS[name].split(), 1 + index % 7)), "label": name}


class NumbersOfTexts(TopicsOfTexts):
    """The label is a number without names."""

    def _info(self):
        features = {"text": tfds.features.Text(), "label": tfds.features.Scalar(np.int64)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))


def load(folder, *arguments: str):
    flags = [f"--data_dir={folder}", "--dataset=topics_of_texts", "--vocabulary_size=320", "--batch_size=8"]
    options = options_for(classification.TASK, *flags, "--width=32", "--depth=1", *arguments)
    return options, classification.load_data(options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def learned(folder):
    """A small model that has learned which words each class has, and its data."""
    options, data = load(folder, "--learning_rate=1e-2", "--epochs=6")
    model = runner.build(classification.TASK, options, data)
    for epoch in range(options.epochs):
        model.fit(data.train(epoch), verbose=0)
    return model, data


def test_labels_follow_their_texts(folder):
    _, data = load(folder)
    assert data.about["class_names"] == NAMES
    classes = {word: index for index, name in enumerate(NAMES[:3]) for word in TOPICS[name].split()}
    for inputs, labels in data.test.as_numpy_iterator():
        assert [classes[line.split()[0].decode()] for line in inputs["text"]] == labels.tolist()
    (reader,) = data.resources
    for token_ids, targets in [*data.train(0).as_numpy_iterator(), *data.validation.as_numpy_iterator()]:
        assert targets.shape == (len(token_ids), 4)
        assert targets.dtype == np.float32
        lines = reader.vocabulary.detokenize(tf.RaggedTensor.from_tensor(token_ids[:, 1:], padding=0)).numpy()
        expected = np.eye(4)[[classes[line.split()[0].decode()] for line in lines]]
        np.testing.assert_array_equal(targets, expected)


def test_it_learns_classes(learned):
    model, data = learned
    answer = runner.answering(classification.TASK, model, data)
    scores = classification.score(answer, data)
    assert scores["accuracy"] > 0.95
    assert scores["macro_f1"] > 0.95
    assert scores["total"] == 21
    _, signature = classification.serve(model, data)
    assert signature == {"text": tf.TensorSpec([None], tf.string)}
    probabilities = answer(text=tf.constant(["OPEC  barrel", "", "stake"]))["probabilities"]
    assert probabilities.dtype == tf.float32
    np.testing.assert_allclose(probabilities.numpy().sum(axis=1), 1, rtol=1e-5)
    assert probabilities.numpy().argmax(axis=1)[[0, 2]].tolist() == [2, 1]


def test_what_is_shown_is_what_is_served(learned):
    model, data = learned
    lines, targets = next(data.shown.as_numpy_iterator())
    served = runner.answering(classification.TASK, model, data)(text=tf.constant(lines))["probabilities"].numpy()
    header, rule, *rows = classification.show(model, data)["predictions"].splitlines()
    assert header == "| text | is | predicted |"
    assert rule == "| --- | --- | --- |"
    assert len(rows) == len(lines) == 8  # a tenth of 80
    for row, line, label, probabilities in zip(rows, lines, targets.argmax(axis=1), served, strict=True):
        text, is_, predicted = row.strip("| ").split(" | ")
        assert (text, is_) == (line.decode(), NAMES[label])
        name, _, share = predicted.rpartition(" ")
        assert name == NAMES[probabilities.argmax()]
        assert int(share.rstrip("%")) == pytest.approx(100 * probabilities.max(), abs=1)


def test_optimizer_does_not_decay_biases(folder, learned):
    model, _ = learned
    optimizer = classification.build_optimizer(options_for(classification.TASK, "--learning_rate=0.1"), 200)
    assert isinstance(optimizer, keras.optimizers.AdamW)
    optimizer.build(model.trainable_variables)
    decayed = {
        weight.path.split("/")[-1] for weight in model.trainable_variables if optimizer._use_weight_decay(weight)
    }
    assert decayed == {"embeddings", "kernel"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--dataset=mnist_5k"],
            "--dataset=mnist_5k has .*text classification needs text .Text. and label .ClassLabel.",
        ),
        (["--dataset=numbers_of_texts"], r"label \(Scalar\); text classification needs"),
        (["--dataset=reuters_r9"], "did you mean reuters_r8"),
        (["--batch_size=73"], "--batch_size=73 is more than the 72 training examples"),
        (["--model=lstm"], "--model=lstm must be transformer"),
        (["--width=33"], "--width=33 must be a multiple of 32"),
    ],
)
def test_what_cannot_work_is_refused(folder, arguments, message):
    with pytest.raises((runner.AppError, runner.datasets.DatasetError), match=message):
        load(folder, *arguments)
