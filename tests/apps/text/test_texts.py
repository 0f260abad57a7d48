"""Texts and their padding, the vocabulary that is learned from them, files of examples."""

import collections

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from apps import runner
from apps.text import classification, pieces, texts
from tests.conftest import options_for


def options(*arguments: str):
    return options_for(classification.TASK, *arguments)


# Padding


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 33), min_size=1, max_size=5))
def test_rows_are_filled_up_with_pad_to_a_multiple_of_8(lengths):
    rows = [np.arange(4, 4 + length, dtype="int32") for length in lengths]
    ragged = texts.to_ragged(iter(rows))
    assert ragged.to_list() == [row.tolist() for row in rows]
    padded = texts.pad(ragged)
    assert padded.dtype == tf.int32
    assert padded.shape == (len(lengths), 8 * -(-max(lengths) // 8))
    for row, seen in zip(rows, padded.numpy(), strict=True):
        np.testing.assert_array_equal(seen[: len(row)], row)
        assert (seen[len(row) :] == pieces.PAD).all()


def test_no_rows():
    assert texts.to_ragged([]).shape == (0, None)
    assert texts.pad(texts.to_ragged([])).shape == (0, 0)


def test_shortest_texts_first():
    lines, labels = np.array([b"ccc", b"a", b"", b"bb", b"d"], object), np.arange(5)
    ordered, followed = texts.by_length(lines, labels)
    assert ordered.tolist() == [b"", b"a", b"d", b"bb", b"ccc"]
    assert followed.tolist() == [2, 1, 4, 3, 0]


# Vocabulary


@pytest.mark.parametrize(
    ("size", "lines", "message"),
    [
        (300, [bytes(chr(0x4E00 + i), "utf-8") * 3 for i in range(500)], "--vocabulary_size=300: .*300 pieces"),
        (8000, [b"", b"  \n"], "--vocabulary_size=8000: .*no text other than spaces"),
    ],
)
def test_vocabulary_that_cannot_be_learned_names_the_flag(size, lines, message):
    with pytest.raises(runner.AppError, match=message):
        texts.learn_pieces(options(f"--vocabulary_size={size}"), np.array(lines, object), lowercase=True)


def test_vocabulary_of_some_texts():
    lines = np.array([b"Kettle kettles"] * 20 + [b"Zombie zombies"] * 3, object)
    for lowercase in (True, False):
        vocabulary = texts.learn_pieces(options("--vocabulary_size=300"), lines, lowercase)
        assert vocabulary.size <= 300
        found = b"".join(vocabulary.detokenize(vocabulary.tokenize(tf.constant(["Kettle zombie"]))).numpy())
        assert found == (b"kettle zombie" if lowercase else b"Kettle zombie")
        # Both are spelled in pieces; what no text has is spelled in bytes.
        assert max(map(len, vocabulary.encode([b"kettle", b"zombie"]))) < 6 < len(vocabulary.encode(["жжжж"])[0])


def test_vocabulary_of_more_texts_than_are_needed():
    many = np.array([b"kettle", b"qqqq", b"qqqq"] * 140_000, object)  # every third is taken
    vocabulary = texts.learn_pieces(options("--vocabulary_size=300"), many, lowercase=True)
    # Ids below 260 are bytes: no piece has such a letter.
    in_bytes = [bool(np.any(row < 260)) for row in vocabulary.encode(["kettle", "qqqq"])]
    assert in_bytes == [False, True]


# Reading


class FewTexts(tfds.core.GeneratorBasedBuilder):
    """Four texts."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "number": tfds.features.Scalar(np.int32), "other": np.int64}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index, text in enumerate(["", "naïve\n", "\x00|", "text " * 900]):
            yield index, {"text": text, "number": len(text), "other": 0}


def test_read(tmp_path):
    builder = FewTexts(data_dir=tmp_path)
    builder.download_and_prepare()
    lines, numbers = texts.read(builder, "train", ["text", "number"])
    assert {type(line) for line in lines} == {bytes}
    assert numbers.dtype == np.int32
    assert collections.Counter(lines) == collections.Counter([b"", "naïve\n".encode(), b"\x00|", b"text " * 900])
    assert [len(line.decode()) for line in lines] == numbers.tolist()
    again, _ = texts.read(builder, "train[:50%]", ["text", "number"])
    np.testing.assert_array_equal(again, lines[:2])
    with pytest.raises(runner.AppError, match=r"few_texts: the part train\[90%:\] is empty"):
        texts.read(builder, "train[90%:]", ["text"])  # a tenth of four


# Tables and files


def test_what_is_shown_of_long_and_broken_texts():
    shown = texts.shortened([b"x" * 999, "é".encode() * 300, b"a\xff", b""])
    assert shown == ["x" * 200, "é" * 200, "a\ufffd", ""]


def test_examples(tmp_path):
    texts.write_examples([b"one", "zwölf".encode(), b"\xff"], tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files == {"text1.txt": b"one\n", "text2.txt": "zwölf\n".encode(), "text3.txt": b"\xff\n"}
