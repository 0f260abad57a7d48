"""Scores against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn import metrics

from apps import scores


def test_probabilities_are_scored_as_sklearn_does():
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 50)  # without the last class
    probabilities = random.dirichlet(np.ones(4), 50)
    counts = scores.of_probabilities(labels, probabilities)
    predictions = probabilities.argmax(axis=1)
    assert counts["loss"] == pytest.approx(metrics.log_loss(labels, probabilities, labels=range(4)))
    assert counts["accuracy"] == metrics.accuracy_score(labels, predictions)
    f1 = metrics.f1_score(labels, predictions, average=None, labels=range(4))
    assert counts["macro_f1"] == pytest.approx(f1[:3].mean())


def test_a_class_held_for_impossible_has_a_finite_loss():
    assert scores.of_probabilities(np.array([1]), np.array([[1.0, 0.0]]))["loss"] == pytest.approx(87.3, abs=0.1)


def test_in_words():
    counts = scores.count(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 3]))
    assert scores.in_words(counts) == "Accuracy: 50.00% (2/4) | Macro-F1: 44.44%"
