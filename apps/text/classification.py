"""Text classification: what is the text about?

    python -m apps.text.classification --dataset=reuters_r8
    python -m apps.text.classification --dataset=reuters_r52
    python -m apps.text.classification --dataset=imdb_reviews --model=keras_hub:bert_tiny_en_uncased

Expected of the first: 96.1% of the test part, where a LinearSVC has 97.6% (2026-11-26, RESULTS.md).

Network and vocabulary are those of `apps.text.encoder`, which sentiment shares.
"""

import re
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from absl import flags
from sklearn import metrics

from apps import figures, runner, scores, sets
from apps.text import encoder, texts

_DROPOUT = 0.4
_LABEL_SMOOTHING = 0.05
_WEIGHT_DECAY = 0.01


# Flags


def define_flags(values: flags.FlagValues) -> None:
    """Defines what this task adds to the shared flags."""
    encoder.define_flags(values, ngrams=1)


# Model


def build_model(options, data: runner.Data) -> keras.Model:
    """Token ids (int32) to logits (float32)."""
    return encoder.build_model(options, data, len(data.about["class_names"]), _DROPOUT)


def build_optimizer(options, num_steps: int) -> keras.optimizers.Optimizer:
    """AdamW with warm-up and cosine decay."""
    return runner.adamw(options.learning_rate, num_steps, _WEIGHT_DECAY)


def build_loss(options) -> keras.losses.Loss:
    """Cross-entropy with label smoothing."""
    return keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=_LABEL_SMOOTHING)


def build_metrics(options) -> list[keras.metrics.Metric]:
    """Accuracy."""
    return [keras.metrics.CategoricalAccuracy(name="accuracy")]


# Data


def load_data(options) -> runner.Data:
    """Reads any TFDS set with a text and a class."""
    encoder.check_options(options)
    features = sets.require_features(options, "text classification", {"text": "Text", "label": "ClassLabel"})
    parts = encoder.read_parts(options, sets.prepare(options), "text", "label")
    class_names = features["label"].names
    one_hot = np.eye(len(class_names), dtype="float32")
    return encoder.to_data(options, parts, lambda labels: one_hot[labels], {"class_names": class_names})


# What is served, how it is scored and shown


def serve(model: keras.Model, data: runner.Data):
    """The exported function: texts to probabilities."""
    (reader,) = data.resources

    def classify(text):
        return {"probabilities": tf.nn.softmax(model(reader(text), training=False))}

    return classify, {"text": tf.TensorSpec([None], tf.string)}


def score(call: runner.Call, data: runner.Data) -> dict[str, float]:
    """Cross-entropy, accuracy and macro-averaged F1 over the test part."""
    probabilities, labels = predict(call, data.test)
    return scores.of_probabilities(labels, probabilities)


def describe(counts: dict[str, float]) -> str:
    """The line that ends a run."""
    return f"Test loss: {counts['loss']:.4f} | {scores.in_words(counts)}"


def show(model: keras.Model, data: runner.Data) -> dict[str, str]:
    """The first validation texts with what the model says of them."""
    (reader,), names = data.resources, data.about["class_names"]
    lines, targets = next(data.shown.as_numpy_iterator())
    probabilities = tf.nn.softmax(model(texts.pad(reader.encode(lines)), training=False)).numpy()
    rows = (
        (line, names[target.argmax()], f"{names[row.argmax()]} {row.max():.0%}")
        for line, target, row in zip(texts.shortened(lines), targets, probabilities, strict=True)
    )
    return {"predictions": figures.to_table(["text", "is", "predicted"], rows)}


def conclude(call: runner.Call, data: runner.Data, folder: Path) -> dict[str, bytes]:
    """The confusion matrix of the test part; and files to try apps/predict.py on, one of each class."""
    probabilities, labels = predict(call, data.test)
    names = data.about["class_names"]
    lines = np.concatenate([inputs["text"].numpy() for inputs, _ in data.test])
    _, first = np.unique(labels, return_index=True)
    for row in first:
        name = re.sub(r"\W+", "_", names[labels[row]]).strip("_")
        (folder / f"{name}.txt").write_bytes(lines[row] + b"\n")
    counts = metrics.confusion_matrix(labels, probabilities.argmax(axis=-1), labels=range(len(names)))
    return {"confusion_matrix": figures.to_png(figures.confusion_matrix(counts, names, "texts"))}


def predict(call: runner.Call, dataset: tf.data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Returns probabilities, float32 `[texts, classes]`, and labels."""
    rows = [(np.asarray(call(**inputs)["probabilities"]), labels.numpy()) for inputs, labels in dataset]
    return np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows])


# Main

TASK = runner.Task(
    name="text_classification",
    define_flags=define_flags,
    defaults={"dataset": "reuters_r8", "batch_size": 32, "epochs": 6, "learning_rate": 1e-3},
    load_data=load_data,
    build_model=build_model,
    build_optimizer=build_optimizer,
    build_loss=build_loss,
    build_metrics=build_metrics,
    monitor="val_loss",
    serve=serve,
    score=score,
    metric="accuracy",
    margin=0.002,
    describe=describe,
    show=show,
    conclude=conclude,
    short={"width": 64, "depth": 1, "epochs": 3},
)

if __name__ == "__main__":
    runner.main(TASK)
