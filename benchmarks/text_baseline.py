"""A linear classifier of words on the same split: what a text network must beat to be worth its electricity.

    python -m benchmarks.text_baseline --dataset=reuters_r8
    python -m benchmarks.text_baseline --dataset=vader_movies

scikit-learn's LinearSVC (C=1) on TfidfVectorizer(sublinear_tf=True): small words of two characters or more, once alone
and once with pairs beside them. It learns from the part that the apps train on and the one that they cut from it to
choose an epoch, since it chooses none; accuracy and macro-averaged F1 are those of apps.scores. Where
texts have a rating too, ridge regression (alpha=1) on the same features is scored as graded sentiment is.

Source: Wang and Manning 2012, ACL P12-2018 (how far linear models on words and pairs come).
"""

import sys

import numpy as np
from absl import app, flags
from sklearn import feature_extraction, linear_model, pipeline, svm

from apps import runner, scores, sets
from apps.text import encoder, sentiment, texts

_FEATURES = {"words": 1, "words and pairs": 2}  # words in the longest n-gram


def main() -> None:
    """Runs the program."""
    flags.DEFINE_string("dataset", "reuters_r8", "Set of texts with classes, and perhaps ratings: a TFDS name.")
    flags.DEFINE_string("data_dir", None, "Folder of prepared data sets. Default: TFDS's.")
    app.run(lambda argv: sys.exit(runner.exit_code(lambda argv: _run(flags.FLAGS), argv)))


def _run(options: flags.FlagValues) -> None:
    features = sets.describe(options).info.features
    text = "sentence" if "sentence" in features else "text"
    sets.require_features(options, "this baseline", {text: "Text", "label": "ClassLabel"})
    builder = sets.prepare(options)
    train, test = read_parts(options, builder, text, "label")
    for name, longest in _FEATURES.items():
        predictions = fit(svm.LinearSVC(C=1.0, random_state=0), longest, *train).predict(test[0])
        line = scores.in_words(scores.count(test[1], predictions))
        print(f"{options.dataset}, LinearSVC, {name}: {line}", flush=True)
    if "rating" not in features:
        return
    train, test = read_parts(options, builder, text, "rating")
    for name, longest in _FEATURES.items():
        predictions = fit(linear_model.Ridge(alpha=1.0), longest, *train).predict(test[0])
        line = sentiment.in_words(sentiment.compare(test[1], predictions))
        print(f"{options.dataset}, ridge regression, {name}: {line}", flush=True)


def read_parts(options, builder, text: str, target: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns texts and targets to learn from and to be scored on, without those that have no label.

    Args:
        options: the parsed flag `dataset`.
        builder: of the prepared data set.
        text: its feature that is the text.
        target: its feature that is wanted.
    """
    *_, test = encoder.read_parts(options, builder, text, target)
    names = sets.split_names(builder)
    # Of GLUE the apps cut a part from `train` too, though it has a `validation`: that is what they test on.
    split = "train" if names[1] == "validation" else "+".join(names[:2])
    columns = texts.read(builder, split, [text, target])
    chosen = encoder.is_labelled(columns[1])
    return [column[chosen] for column in columns], test


def fit(model, longest: int, lines: np.ndarray, targets: np.ndarray) -> pipeline.Pipeline:
    """Returns `model` behind the tf-idf of n-grams of up to `longest` words, both learned from texts and targets.

    Raises:
        AppError: there is nothing to learn.
    """
    tfidf = feature_extraction.text.TfidfVectorizer(sublinear_tf=True, ngram_range=(1, longest), decode_error="replace")
    try:
        return pipeline.make_pipeline(tfidf, model).fit(lines, targets)
    except ValueError as error:  # no text has a word, all have one class
        raise runner.AppError(f"the training part teaches nothing: {error}; choose another --dataset") from error


if __name__ == "__main__":
    main()
