"""How classifiers are scored, of whatever: pictures have their own words."""

import numpy as np
from sklearn import metrics


def of_probabilities(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Returns cross-entropy, and what `count` returns of the likeliest classes.

    Args:
        labels: int `[examples]`.
        probabilities: float `[examples, classes]`.
    """
    likelihood = probabilities[np.arange(len(labels)), labels]
    loss = float(np.mean(-np.log(np.maximum(likelihood, np.finfo(np.float32).tiny))))
    return {"loss": loss} | count(labels, probabilities.argmax(axis=-1))


def count(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Returns accuracy, macro-averaged F1 of the classes that `labels` has, and the numbers behind them."""
    correct = int(np.sum(predictions == labels))
    return {
        "accuracy": correct / len(labels),
        "macro_f1": float(metrics.f1_score(labels, predictions, average="macro", labels=np.unique(labels))),
        "correct": correct,
        "total": len(labels),
    }


def in_words(counts: dict[str, float]) -> str:
    """Returns what `count` returned as a part of a line."""
    return (
        f"Accuracy: {100 * counts['accuracy']:.2f}% ({counts['correct']:.0f}/{counts['total']:.0f}) | "
        f"Macro-F1: {100 * counts['macro_f1']:.2f}%"
    )
