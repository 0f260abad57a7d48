"""vader_movies, _tweets, _amazon and _nyt, from tiny stand-ins and from the real package."""

import re
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from tests import fakes
from tfhalf import datasets
from tfhalf.datasets import DatasetError, packages, vader

FILES = {
    "vader_movies": "movieReviewSnippets_GroundTruth.txt",
    "vader_tweets": "tweets_GroundTruth.txt",
    "vader_amazon": "amazonReviewSnippets_GroundTruth.txt",
    "vader_nyt": "nytEditorialSnippets_GroundTruth.txt",
}


def prepare(manual_dir, data_dir, builder=vader.VaderMovies) -> dict[str, dict]:
    builder = builder(data_dir=data_dir)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    return read(builder)


def read(builder) -> dict[str, dict]:
    """Split to text to (rating, label); of a text that is there more often, the last one's."""
    return {
        split: {
            e["text"].decode(): (float(e["rating"]), int(e["label"]))
            for e in builder.as_dataset(split=split).as_numpy_iterator()
        }
        for split in builder.info.splits
    }


def test_stand_in_ratings_and_labels(tmp_path):
    sentences = [
        ("1", 2.5, "Añejo y bueno"),
        ("2", -0.25, " odd "),
        ("3", 0, "so &amp; so"),
        ("4", -4, "a"),
        ("5", 4, "b"),
    ]
    fakes.write_ratings(tmp_path / FILES["vader_movies"], sentences)
    parts = prepare(tmp_path, tmp_path / "data")
    assert parts == {
        "train": {"Añejo y bueno": (2.5, 1), "odd": (-0.25, 0), "so &amp; so": (0, -1), "a": (-4, 0)},
        "test": {"b": (4, 1)},
    }


def test_every_fifth_text_tests_and_a_repeated_one_does_not_count(tmp_path):
    # The third and the sixth differ from the first by case and marks only; so do no others.
    texts = ["It was good", "b", "it was GOOD!!", "c", "d", "It was good.", "e", "f", ":)", ":(", ":-)", "g"]
    fakes.write_ratings(tmp_path / FILES["vader_movies"], [(str(i), 1, text) for i, text in enumerate(texts, 1)])
    parts = prepare(tmp_path, tmp_path / "data")
    # Groups: good 0, b 1, c 2, d 3, e 4, f 5, :) 6, :( 7, :-) 8, g 9.
    assert sorted(parts["test"]) == ["e", "g"]
    assert len(parts["train"]) == 10


def test_documents_stay_together_and_those_that_share_a_text_too(tmp_path):
    # Document 6 shares a text with 2, 7 with 6: they are one group. 1_1 and 11_1 are two documents.
    ids = ["1_1", "1_2", "2_1", "3_1", "4_1", "5_1", "5_2", "6_1", "6_2", "7_1", "11_1", "8_1", "9_1", "10_1", "12_1"]
    texts = {"6_1": "Text 2_1!", "7_1": "text 6_2"}
    fakes.write_ratings(tmp_path / FILES["vader_amazon"], [(i, 1, texts.get(i, f"text {i}")) for i in ids])
    parts = prepare(tmp_path, tmp_path / "data", vader.VaderAmazon)
    # Groups: 1, 2 with 6 and 7, 3, 4, 5, 11, 8, 9, 10, 12.
    assert sorted(parts["test"]) == ["text 12_1", "text 5_1", "text 5_2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"2\t1.0 good", r"movieReviewSnippets_GroundTruth\.txt, line 2: id, rating and text with tabs between"),
        (b"2\tgood\tgood", "line 2: id, rating and text with tabs between expected, found b'2.*good'"),
        (b"2\t1.0\tgood\tbad", "line 2: id, rating and text"),
        (b"2\t1.0\t ", "line 2: a text and a rating of -4 to 4 expected"),
        (b"2\t4.5\tgood", "line 2: a text and a rating of -4 to 4 expected"),
        (b"2\tnan\tgood", "line 2: a text and a rating of -4 to 4 expected"),
        (b"2\t1.0\tclich\xe9", "line 2: isn't UTF-8; remove the file and fetch again"),
        (b"", "line 2: id, rating and text"),
    ],
)
def test_other_files_are_refused_with_file_and_line(tmp_path, line, message):
    (tmp_path / FILES["vader_movies"]).write_bytes(b"1\t1.0\ta\r\n" + line + b"\r\n3\t1.0\tb")
    with pytest.raises(DatasetError, match=message):
        prepare(tmp_path, tmp_path / "data")


def test_real_movies(data_dir):
    parts = read(tfds.builder("vader_movies", data_dir=data_dir))
    text = "Absorbing character study by André Turpin."
    raw = Path(data_dir, "downloads/manual/vader_movies", FILES["vader_movies"]).read_text(encoding="utf-8")
    rating = float(re.search(rf"\t(\S+)\t{re.escape(text)}", raw).group(1))
    (found,) = (part[text] for part in parts.values() if text in part)
    assert found == (pytest.approx(rating, abs=1e-6), 1)
    assert not parts["train"].keys() & parts["test"].keys()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """All four, from one download: name to (builder, its file)."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "sdist").mkdir()
    content = packages.fetch_sdist(vader._PACKAGE, vader._SDIST_SHA256, folder / "sdist")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packages, "fetch_sdist", lambda *arguments: content)
        return {
            name: (datasets.prepare(name, str(folder)), folder / "downloads" / "manual" / name / file)
            for name, file in FILES.items()
        }


@pytest.mark.parametrize(
    ("name", "train", "test", "num_zero"),
    [
        ("vader_movies", 8485, 2120, 37),
        ("vader_tweets", 3361, 839, 4),
        ("vader_amazon", 2952, 756, 98),
        ("vader_nyt", 4180, 1010, 244),
    ],
)
def test_real_counts_and_nothing_on_both_sides(real, name, train, test, num_zero):
    builder, path = real[name]
    parts = {
        split: [
            (e["text"].decode(), round(float(e["rating"]), 4), int(e["label"]))
            for e in builder.as_dataset(split=split).as_numpy_iterator()
        ]
        for split in ("train", "test")
    }
    assert (len(parts["train"]), len(parts["test"])) == (train, test)
    labels = [label for part in parts.values() for _, _, label in part]
    assert labels.count(-1) == num_zero
    # Second reading: where each line of the file went, found by its text, and which document it is of.
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    expected = sorted(
        (text.strip(), round(float(rating), 4), -1 if float(rating) == 0 else int(float(rating) > 0))
        for _, rating, text in rows
    )
    got = sorted(example for part in parts.values() for example in part)
    assert [(text, label) for text, _, label in got] == [(text, label) for text, _, label in expected]
    texts = {split: {text.strip().lower() for text, _, _ in part} for split, part in parts.items()}
    assert not texts["train"] & texts["test"]
    documents = {
        split: {i.split("_")[0] for i, _, text in rows if text.strip().lower() in texts[split]} for split in texts
    }
    assert not documents["train"] & documents["test"]
    assert 0.18 < len(documents["test"]) / sum(map(len, documents.values())) < 0.22


def test_damaged_file_is_fetched_again(real, tmp_path):
    _, path = real["vader_nyt"]
    (tmp_path / "scratch").mkdir()
    (tmp_path / path.name).write_bytes(b"half a downl")
    vader.VaderNyt.fetch(tmp_path, tmp_path / "scratch")
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    vader.VaderNyt.fetch(tmp_path, tmp_path / "nowhere")
