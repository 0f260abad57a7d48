"""The one way to data."""

import os

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tfhalf import datasets


def test_prepared_set_is_left_alone(data_dir):
    lines = []
    builder = datasets.prepare("mnist_5k", data_dir, lines.append)
    assert builder.info.splits["train"].num_examples == 4000
    assert lines == []


def test_tfds_finds_our_builder_by_name(data_dir):
    assert tfds.builder("mnist_5k", data_dir=data_dir).info.features["label"].num_classes == 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minst_5k", "unknown data set 'minst_5k'; did you mean .*mnist_5k"),
        (
            "zzzzqqqq",
            "did you mean bible_en_es, blue_marble, composites, deepforest, fillets_cs, fillets_nl, fillets_noisy, "
            "gcin_tones, gnome_docs, mnist_5k, newsgroups_20, reuters_r52, reuters_r8, spoken_words_en, "
            r"vader_amazon, vader_movies, vader_nyt, vader_tweets\?",
        ),
        ("20newsgroups", "data set '20newsgroups'"),
        ("gnome_docs/pl", "data set 'gnome_docs/pl': .*pl"),
        ("mnist_5k/large", "mnist_5k/large"),
        ("", "data set ''"),
    ],
)
def test_unknown_names_are_told_with_the_nearest(name, message, tmp_path):
    with pytest.raises(datasets.DatasetError, match=message):
        datasets.describe(name, str(tmp_path))


def test_what_was_tried_is_listed(tmp_path):
    # .invalid never resolves (RFC 2606), so this is a machine without the web.
    class Unreachable(tfds.core.GeneratorBasedBuilder):
        name = "unreachable_for_test"
        VERSION = tfds.core.Version("1.0.0")
        url_infos = {"http://data.invalid/file.zip": None}  # noqa: RUF012

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"x": tfds.features.Scalar(np.int32)})
            )

        def _split_generators(self, dl_manager):
            raise AssertionError("TFDS was asked to download")

        def _generate_examples(self):
            yield from ()

    with pytest.raises(
        datasets.DatasetError, match=r"no package carries it; tried http://data\.invalid/file\.zip: .*known"
    ):
        datasets.prepare("unreachable_for_test", str(tmp_path))


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(datasets.DatasetError, match="choose another data_dir"):
        datasets.prepare("mnist_5k", str(tmp_path / "file"))


def test_nothing_is_left_beside_the_data(data_dir):
    assert not [
        name for _, folders, _ in os.walk(data_dir) for name in folders if "incomplete" in name or ".fetch" in name
    ]
