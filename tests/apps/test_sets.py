"""What an app asks of a set: its features, honest parts, an order for each epoch."""

import itertools
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds

from apps import runner, sets


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("train test", ("train[:90%]", "train[90%:]", "test")),
        ("train validation test", ("train", "validation", "test")),
        ("train validation", ("train[:90%]", "train[90%:]", "validation")),
        ("train", ("train[:80%]", "train[80%:90%]", "train[90%:]")),
    ],
)
def test_no_epoch_is_chosen_on_the_test_part(names, expected):
    builder = types.SimpleNamespace(name="x", info=types.SimpleNamespace(splits=dict.fromkeys(names.split())))
    assert sets.split_names(builder) == expected


def test_set_without_a_training_part_is_refused():
    builder = types.SimpleNamespace(name="x", info=types.SimpleNamespace(splits={"test": None, "extra": None}))
    with pytest.raises(runner.AppError, match="x has no train split; it has extra, test"):
        sets.split_names(builder)


# Features


class KindsOfFeatures(tfds.core.GeneratorBasedBuilder):
    """Never prepared: its features are enough."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["no", "yes"]),
            "rating": tfds.features.Scalar(np.float32),
            "mask": tfds.features.LabeledImage(labels=3, shape=(None, None, 1)),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        raise AssertionError("fetched")

    def _generate_examples(self):
        raise AssertionError("fetched")


class ListsOfTexts(KindsOfFeatures):
    """An example is a list, without names."""

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.Sequence({"text": tfds.features.Text()}))


@pytest.fixture
def ask(tmp_path):
    def ask(name: str, wanted: dict[str, str]):
        options = types.SimpleNamespace(dataset=name, data_dir=str(tmp_path))
        features = sets.require_features(options, "reading minds", wanted)
        assert not list(tmp_path.iterdir()), "nothing may be fetched for this"
        return features

    return ask


def test_features_that_are_there(ask):
    features = ask("kinds_of_features", {"text": "Text", "label": "ClassLabel"})
    assert features["label"].names == ["no", "yes"]
    assert set(features) == {"text", "label", "rating", "mask"}
    ask("kinds_of_features", {"mask": "Image or LabeledImage", "rating": "Scalar"})
    ask("reuters_r8", {"text": "Text", "label": "ClassLabel"})
    ask("vader_movies", {"text": "Text", "label": "ClassLabel", "rating": "Scalar"})
    ask("mnist_5k", {"image": "Image", "label": "ClassLabel"})


@pytest.mark.parametrize(
    ("name", "wanted", "listed"),
    [
        ("kinds_of_features", {"sentence": "Text"}, "text (Text), label (ClassLabel)"),
        ("kinds_of_features", {"text": "Text", "rating": "ClassLabel"}, "rating (Scalar)"),
        ("kinds_of_features", {"mask": "Image or Video"}, "mask (LabeledImage)"),
        ("lists_of_texts", {"text": "Text"}, "(Sequence)"),
        ("mnist_5k", {"text": "Text", "label": "ClassLabel"}, "image (Image), label (ClassLabel)"),
    ],
)
def test_features_that_are_not(ask, name, wanted, listed):
    with pytest.raises(runner.AppError) as caught:
        ask(name, wanted)
    message = str(caught.value)
    assert message.startswith(f"--dataset={name} has the features ")
    assert listed in message
    needed = " and ".join(f"{feature} ({kind})" for feature, kind in wanted.items())
    assert message.endswith(f"; reading minds needs {needed}")
    assert "\n" not in message


# Seeds


def test_every_epoch_has_a_seed_of_its_own():
    pairs = list(itertools.product([*range(40), 2**31 - 1], [*range(40), 10**6]))
    seeds = [sets.epoch_seed(*pair) for pair in pairs]
    assert len(set(seeds)) == len(pairs)  # seed + epoch would give the same to a run and the next one's neighbour
    assert all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    assert seeds == [sets.epoch_seed(*pair) for pair in pairs]
    # An interrupted run goes on with the same order, also with a NumPy to come: numbers of NumPy 2.4.
    assert [sets.epoch_seed(0, 0), sets.epoch_seed(1, 0), sets.epoch_seed(0, 1)] == [2968811710, 1835504127, 3964924996]
