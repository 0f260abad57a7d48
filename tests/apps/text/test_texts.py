"""Order and padding of batches, and tables that TensorBoard itself renders."""

import collections
import html
import re

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tensorboard import plugin_util

from apps import runner
from apps.text import classification, pieces, texts
from tests.conftest import options_for


def options(*arguments: str):
    return options_for(classification.TASK, *arguments)


def lengths_of(num: int, seed: int = 0) -> np.ndarray:
    """Many short texts and a few long ones, as everywhere."""
    return np.random.default_rng(seed).geometric(0.05, num)


def padding(batches: np.ndarray, lengths: np.ndarray) -> float:
    """The share of a batch's positions that hold no token."""
    rows = lengths[batches]
    return 1 - rows.sum() / (rows.max(axis=1) * rows.shape[1]).sum()


# Order


@settings(max_examples=40, deadline=None)
@given(num=st.integers(1, 400), size=st.integers(1, 9), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 10**6))
def test_every_epoch_has_the_same_number_of_batches_and_no_row_twice(num, size, seed, epoch):
    flags = options(f"--batch_size={min(num, size)}", f"--seed={seed}")
    order, steps = texts.training_order(flags, lengths_of(num))
    assert steps == num // flags.batch_size
    for each in (0, epoch):
        rows = order(each)
        assert rows.shape == (steps, flags.batch_size)
        assert len(np.unique(rows)) == rows.size
        assert 0 <= rows.min() <= rows.max() < num


def test_order_is_a_pure_function_of_seed_and_epoch():
    flags, lengths = options("--batch_size=8", "--seed=5"), lengths_of(1000)
    order, _ = texts.training_order(flags, lengths)
    first = [order(epoch) for epoch in range(4)]
    np.random.seed(123)  # whatever was drawn meanwhile, and in another order of epochs
    again, _ = texts.training_order(flags, lengths.copy())
    for epoch in (3, 0, 2, 1):
        np.testing.assert_array_equal(again(epoch), first[epoch])
    other, _ = texts.training_order(options("--batch_size=8", "--seed=6"), lengths)
    different = [*first, *(other(epoch) for epoch in range(4))]
    assert len({rows.tobytes() for rows in different}) == 8
    # Not the same batches in another order either.
    assert not {frozenset(row) for row in first[0]} & {frozenset(row) for row in first[1]}


def test_what_an_epoch_leaves_out_is_another_each_time():
    order, steps = texts.training_order(options("--batch_size=8"), lengths_of(15))
    assert steps == 1
    assert {row for epoch in range(40) for row in order(epoch).ravel()} == set(range(15))


def test_rows_of_a_batch_have_similar_lengths():
    lengths = lengths_of(4000)
    order, steps = texts.training_order(options("--batch_size=16"), lengths)
    drawn = np.random.default_rng(0).permutation(4000).reshape([steps, 16])
    assert padding(drawn, lengths) > 0.6
    for epoch in range(3):
        rows = order(epoch)
        assert padding(rows, lengths) < 0.1
        # But short batches don't come first, or last.
        assert abs(stats.spearmanr(np.arange(steps), lengths[rows].mean(axis=1)).statistic) < 0.2


def test_batch_larger_than_the_part_is_refused():
    message = "--batch_size=8 is more than the 7 training examples; lower it"
    with pytest.raises(runner.AppError, match=message):
        texts.training_order(options("--batch_size=8"), lengths_of(7))


def test_batches():
    squares = np.arange(20) ** 2

    def make(rows):
        return tf.gather(squares, rows), -rows

    validation = list(texts.in_batches(np.array([4, 2, 9, 11, 0]), make, 2).as_numpy_iterator())
    assert [batch[0].tolist() for batch in validation] == [[16, 4], [81, 121], [0]]
    assert [batch[1].tolist() for batch in validation] == [[-4, -2], [-9, -11], [0]]
    training = texts.in_batches(np.array([[4, 2], [9, 11]]), make, 2)
    assert [batch[0].tolist() for batch in training.as_numpy_iterator()] == [[16, 4], [81, 121]]
    assert training.element_spec[0].shape == [2]


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

HAZARDS = [
    "plain", "a|b", "|", "a\\|b", "\\", "ends with \\", "a\nb", "a\r\n\r\n| b | c |\n", "<script>alert(1)</script>",
    "<table>", "</td></tr></table>", "&lt;b&gt;", "***", "`", "a`b|c", "---|---", "# x", "", " ", "\x00\x1b[31m",
    "ünï|côde 世界",    "[x](javascript:alert(1))", "<img src=x onerror=alert(1)>",
]  # fmt: skip


def cells_of(rendered: str) -> list[list[str]]:
    """What a browser shows of the only table."""
    assert len(re.findall("<table>", rendered)) == 1
    (table,) = re.findall(r"^\s*<table>(.*)</table>\s*$", rendered, re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    cells = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[html.unescape(cell) for cell in row] for row in cells]


@pytest.mark.parametrize("hazard", HAZARDS)
def test_no_text_breaks_a_table(hazard):
    rows = [[hazard, "is", "predicted"], ["the", "next", "row"], ["x", hazard, hazard]]
    rendered = plugin_util.markdown_to_safe_html(texts.to_table(["text", "a", "b"], rows))
    cells = cells_of(rendered)
    assert [len(row) for row in cells] == [3, 3, 3, 3]
    assert cells[0] == ["text", "a", "b"]
    assert cells[1][1:] == ["is", "predicted"]
    assert cells[2] == ["the", "next", "row"]
    assert not re.search(r"<(script|img|table[^>])", rendered)
    if hazard in ("plain", "a|b", "|", "a\\|b", "ends with \\", "<script>alert(1)</script>", "</td></tr></table>"):
        assert cells[1][0] == cells[3][1] == cells[3][2] == hazard
    if hazard == "a\nb":
        assert cells[1][0] == "a b"


def test_what_is_shown_of_long_and_broken_texts():
    shown = texts.shortened([b"x" * 999, "é".encode() * 300, b"a\xff", b""])
    assert shown == ["x" * 200, "é" * 200, "a\ufffd", ""]


def test_examples(tmp_path):
    texts.write_examples([b"one", "zwölf".encode(), b"\xff"], tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files == {"text1.txt": b"one\n", "text2.txt": "zwölf\n".encode(), "text3.txt": b"\xff\n"}
