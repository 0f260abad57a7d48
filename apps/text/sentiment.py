"""Sentiment: does the text like what it speaks of?

    python -m apps.text.sentiment --dataset=vader_movies
    python -m apps.text.sentiment --dataset=vader_movies --target=graded
    python -m apps.text.sentiment --dataset=glue/sst2

Expected of the first: 79.7% of the test part, where a LinearSVC has 81.0% (2026-11-26, RESULTS.md).

Binary: negative or positive. Graded: people's mean rating from -4 to 4, as the vader sets have it. Network and
vocabulary are those of `apps.text.encoder`, with pairs of pieces beside the encoder: "not good" is one.

Source of ratings and task: Hutto and Gilbert 2014, "VADER", ICWSM.
"""

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from absl import flags
from matplotlib.figure import Figure
from scipy import stats

from apps import figures, runner, scores, sets
from apps.text import classification, encoder, texts

_DROPOUT = 0.5
_WEIGHT_DECAY = 0.01
_MOST = 4.0  # the highest rating
_SURE = 2.0  # from this mean rating on a text counts as positive without a doubt
_EXAMPLES = 8


# Flags


def define_flags(values: flags.FlagValues) -> None:
    """Defines what this task adds to the shared flags."""
    encoder.define_flags(values, ngrams=2)
    target_help = "binary: negative or positive. graded: the mean rating, -4 to 4."
    flags.DEFINE_enum("target", "binary", ["binary", "graded"], target_help, flag_values=values)


# Model


def build_model(options, data: runner.Data) -> keras.Model:
    """Token ids (int32) to two logits, or to a rating as a share of the highest (float32)."""
    return encoder.build_model(options, data, 1 if data.about["graded"] else 2, _DROPOUT)


def build_optimizer(options, num_steps: int) -> keras.optimizers.Optimizer:
    """AdamW with warm-up and cosine decay."""
    return runner.adamw(options.learning_rate, num_steps, _WEIGHT_DECAY)


def build_loss(options) -> keras.losses.Loss:
    """Squared error of ratings, or cross-entropy with label smoothing."""
    return keras.losses.MeanSquaredError() if options.target == "graded" else classification.build_loss(options)


def build_metrics(options) -> list[keras.metrics.Metric]:
    """Pearson's correlation of ratings, or accuracy."""
    graded = options.target == "graded"
    pearson = keras.metrics.PearsonCorrelation(name="pearson", axis=0)
    return [pearson] if graded else classification.build_metrics(options)


# Data


def load_data(options) -> runner.Data:
    """Reads any TFDS set with a text (or sentence) and a label, or a rating."""
    encoder.check_options(options)
    graded = options.target == "graded"
    features = sets.describe(options).info.features
    text = "sentence" if "sentence" in features else "text"
    target, kind = ("rating", "Scalar") if graded or "rating" in features else ("label", "ClassLabel")
    sets.require_features(options, f"{options.target} sentiment", {text: "Text", target: kind})
    if target == "label" and features["label"].num_classes != 2:
        raise runner.AppError(
            f"--dataset={options.dataset} has {features['label'].num_classes} classes; sentiment needs two, negative "
            "first: for others there is apps.text.classification"
        )
    parts = encoder.read_parts(options, sets.prepare(options), text, target)
    if target == "rating" and not graded:
        for part in parts:
            signed = part[1] != 0
            runner.say(f"{np.sum(~signed):,} of {len(signed):,} texts have a rating of exactly 0 and are left out")
            part[:] = [column[signed] for column in part]
        parts[2][1] = (parts[2][1] > 0).astype("int64")
    encode = _to_share if graded else _to_probabilities
    return encoder.to_data(options, parts, encode, {"class_names": ["negative", "positive"], "graded": graded})


def _to_share(ratings: np.ndarray) -> np.ndarray:
    return ratings[:, np.newaxis] / np.float32(_MOST)


def _to_probabilities(targets: np.ndarray) -> np.ndarray:
    """Labels to 0 and 1; ratings to how sure they are: people who don't agree have a mean near 0."""
    positive = targets if targets.dtype.kind in "iu" else np.clip(0.5 + targets / (2 * _SURE), 0, 1)
    return np.stack([1 - positive, positive], axis=1).astype("float32")


# What is served, how it is scored and shown


def serve(model: keras.Model, data: runner.Data):
    """The exported function: texts to probabilities of negative and positive, or to ratings."""
    (reader,) = data.resources
    classify, signature = classification.serve(model, data)

    def rate(text):
        return {"rating": _MOST * model(reader(text), training=False)[:, 0]}

    return rate if data.about["graded"] else classify, signature


def score(call: runner.Call, data: runner.Data) -> dict[str, float]:
    """Of the test part: loss, accuracy and macro-averaged F1; of ratings also Pearson's r and mean absolute error.

    A rating counts as right where its sign is; where people's mean is exactly 0 there is no right one.
    """
    if not data.about["graded"]:
        return classification.score(call, data)
    seen, expected = _rate(call, data.test)
    return {"loss": float(np.mean(((seen - expected) / _MOST) ** 2))} | compare(expected, seen)


def compare(ratings: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Returns how well signs are told (where a rating isn't 0), Pearson's r and mean absolute error."""
    signed = ratings != 0
    return scores.count(ratings[signed] > 0, predictions[signed] > 0) | {
        "pearson": float(stats.pearsonr(predictions, ratings).statistic),
        "mae": float(np.mean(np.abs(predictions - ratings))),
    }


def _rate(call: runner.Call, dataset: tf.data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true ratings, float64 `[texts]`."""
    rows = [(np.asarray(call(**inputs)["rating"]), targets.numpy()) for inputs, targets in dataset]
    seen, expected = (np.concatenate(column).astype(np.float64) for column in zip(*rows, strict=True))
    return seen, expected


def describe(counts: dict[str, float]) -> str:
    """The line that ends a run."""
    return f"Test loss: {counts['loss']:.4f} | {in_words(counts)}"


def in_words(counts: dict[str, float]) -> str:
    """Returns what `compare` or `scores.count` returned as a part of a line."""
    line = scores.in_words(counts)
    if "pearson" in counts:
        line += f" | Pearson's r: {counts['pearson']:.4f} | Mean absolute error: {counts['mae']:.3f}"
    return line


def show(model: keras.Model, data: runner.Data) -> dict[str, str]:
    """The first validation texts with what the model says of them."""
    if not data.about["graded"]:
        return classification.show(model, data)
    (reader,) = data.resources
    lines, targets = next(data.shown.as_numpy_iterator())
    outputs = model(texts.pad(reader.encode(lines)), training=False).numpy()
    columns = (map("{:+.1f}".format, _MOST * shares[:, 0]) for shares in (targets, outputs))
    rows = zip(texts.shortened(lines), *columns, strict=True)
    return {"predictions": figures.to_table(["text", "rating", "predicted"], rows)}


def conclude(call: runner.Call, data: runner.Data, folder: Path) -> dict[str, bytes | str]:
    """The confusion matrix of the test part, or ratings against people's; and files to try apps/predict.py on."""
    if not data.about["graded"]:
        return classification.conclude(call, data, folder)
    lines = np.concatenate([inputs["text"].numpy() for inputs, _ in data.test])
    seen, expected = _rate(call, data.test)
    order = np.argsort(expected)
    texts.write_examples(lines[order[np.linspace(0, len(order) - 1, _EXAMPLES, dtype=int)]], folder)
    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="people's mean rating", ylabel="predicted", title="Test part")
    axes.plot(expected, seen, ".", markersize=3, alpha=0.5)
    axes.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    return {"ratings": figures.to_png(figure)}


# Main

TASK = runner.Task(
    name="sentiment",
    define_flags=define_flags,
    defaults={"dataset": "vader_movies", "batch_size": 32, "epochs": 8, "learning_rate": 1e-3},
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
