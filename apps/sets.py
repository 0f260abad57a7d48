"""What every app asks of a data set: to be there, the features it needs, honest parts, an order for each epoch."""

import sys
import types

import numpy as np
import tensorflow_datasets as tfds

from apps import runner
from tfhalf import datasets


def describe(options: types.SimpleNamespace) -> tfds.core.DatasetBuilder:
    """Returns the builder of `--dataset` without fetching it, so that a set of the wrong kind is refused at once."""
    return datasets.describe(options.dataset, options.data_dir)


def prepare(options: types.SimpleNamespace) -> tfds.core.DatasetBuilder:
    """Returns the prepared builder of `--dataset`; fetches it if need be."""
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    return datasets.prepare(options.dataset, options.data_dir, runner.say)


def kinds(features: tfds.features.FeatureConnector) -> dict[str, str]:
    """Returns the name of each feature's kind, as "Text"."""
    found = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {"": features}
    return {name: type(feature).__name__ for name, feature in found.items()}


def in_words(found: dict[str, str]) -> str:
    """Returns features and their kinds as a part of a line."""
    return ", ".join(f"{name} ({kind})" for name, kind in found.items())


def require_features(options, task: str, wanted: dict[str, str]) -> tfds.features.FeaturesDict:
    """Returns the features of `--dataset`, without fetching it.

    Args:
        options: the parsed flags.
        task: as "image classification", for the error.
        wanted: feature to the names of its kinds, as "Image or LabeledImage".

    Raises:
        AppError: one is missing or of another kind.
    """
    features = describe(options).info.features
    found = kinds(features)
    if any(found.get(name) not in kind.split(" or ") for name, kind in wanted.items()):
        needed = " and ".join(f"{name} ({kind})" for name, kind in wanted.items())
        raise runner.AppError(f"--dataset={options.dataset} has the features {in_words(found)}; {task} needs {needed}")
    return features


def split_names(builder: tfds.core.DatasetBuilder) -> tuple[str, str, str]:
    """Train, validation and test; nobody chooses an epoch on the test part."""
    names = set(builder.info.splits)
    if "train" not in names:
        raise runner.AppError(f"{builder.name} has no train split; it has {', '.join(sorted(names))}")
    if {"validation", "test"} <= names:
        return "train", "validation", "test"
    for test in ("test", "validation"):
        if test in names:
            return "train[:90%]", "train[90%:]", test
    return "train[:80%]", "train[80%:90%]", "train[90%:]"


def epoch_seed(seed: int, epoch: int) -> int:
    """Returns the seed of one epoch's order and changes, 0 to 2^32-1."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
