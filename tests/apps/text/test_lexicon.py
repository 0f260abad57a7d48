"""The dictionary against a textbook's and against loops, looking up against numpy in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from apps.text import lexicon, pieces
from benchmarks import phrase_table

POLICIES = ["float32", "mixed_float16", "mixed_bfloat16"]
GERMAN = ["das Haus", "das Buch", "ein Buch", "ein Haus"]
ENGLISH = ["the house", "the book", "a book", "a house"]
DICTIONARY = {"das": "the", "ein": "a", "haus": "house", "buch": "book"}


# Counting


def numbered(lines):
    numbers = {}
    return phrase_table.number([line.lower().split() for line in lines], numbers), ["", *numbers]


def test_model_1_finds_the_dictionary():
    (source, german), (target, english) = numbered(GERMAN), numbered(ENGLISH)
    assert source.words.tolist() == [0, 1, 2, 0, 1, 3, 0, 4, 3, 0, 4, 2, 0]
    assert [source.words[start] for start in source.starts] == [1, 1, 4, 4]
    grid = lexicon.make_grid(source, target)
    assert len(grid.pair) == 4 * 2 * 2
    likely, alone = lexicon.ibm_model_1(target.words, grid.target_places, grid.pair, grid.source_words)
    assert alone.sum() == pytest.approx(1)
    for word in range(1, source.size):
        mine = grid.source_words == word
        assert likely[mine].sum() == pytest.approx(1)
        best = grid.target_words[mine][likely[mine].argmax()]
        assert english[best] == DICTIONARY[german[word]]


def test_model_1_agrees_with_loops():
    random = np.random.default_rng(0)
    lines = [[" ".join(random.choice(list("abcdef"), random.integers(1, 6))) for _ in range(20)] for _ in range(2)]
    (source, sources), (target, targets) = map(numbered, lines)
    grid = lexicon.make_grid(source, target)
    likely, alone = lexicon.ibm_model_1(target.words, grid.target_places, grid.pair, grid.source_words)
    # Brown et al. 1993, section 4.1, with None as the word in front of each source.
    pairs = [([None, *left.split()], right.split()) for left, right in zip(*lines, strict=True)]
    expected = {(e, f): 1.0 for left, right in pairs for e in left for f in right}
    for _ in range(5):
        counts = dict.fromkeys(expected, 0.0)
        for left, right in pairs:
            for f in right:
                total = sum(expected[e, f] for e in left)
                for e in left:
                    counts[e, f] += expected[e, f] / total
        totals = {e: sum(count for (other, _), count in counts.items() if other == e) for e, _ in counts}
        expected = {pair: count / totals[pair[0]] for pair, count in counts.items()}
    for value, e, f in zip(likely, grid.source_words, grid.target_words, strict=True):
        assert value == pytest.approx(expected[sources[e], targets[f]], rel=1e-9)
    for f in range(1, target.size):
        assert alone[f] == pytest.approx(expected[None, targets[f]], rel=1e-9)


def test_likeliest_translations_are_kept():
    # 4 is das, 5 Haus, 6 Buch, 7 ein; 8 is the, 9 house, 10 book, 11 a.
    source = tf.ragged.constant([[4, 5], [4, 6], [7, 6], [7, 5]], dtype=tf.int32)
    target = tf.ragged.constant([[8, 9], [8, 10], [11, 10], [11, 9]], dtype=tf.int32)
    learned = lexicon.learn(source, target, [12, 3000], 2)
    translations, probabilities = learned.translations.numpy(), learned.probabilities.numpy()
    assert (learned.size, translations.shape, probabilities.shape) == (3000, (12, 2), (12, 2))
    assert translations[[4, 5, 6, 7, pieces.END], 0].tolist() == [8, 9, 10, 11, pieces.END]
    assert np.all(probabilities[:, 0] >= probabilities[:, 1])
    known = translations[:, 0] != pieces.PAD
    assert np.flatnonzero(known).tolist() == sorted([pieces.END, 4, 5, 6, 7])
    assert np.all(probabilities[known, 0] > 0.5)
    assert np.all(probabilities.sum(axis=1) < 1 + 1e-6)
    np.testing.assert_array_equal(probabilities[~known], 0)
    (only,) = lexicon.learn(source[:1], target[:1], [20, 12], 8).translations.numpy()[4:5]
    assert sorted(only.tolist()) == [0] * 5 + sorted([8, 9, pieces.END])


def test_of_many_pairs_some_are_counted():
    source = tf.RaggedTensor.from_row_lengths(tf.range(10, 110), [1] * 100)
    learned = lexicon.learn(source, source + 100, [110, 210], 1, most_pairs=30)
    known = np.flatnonzero(learned.translations.numpy())
    assert known.tolist() == [pieces.END, *range(10, 110, 4)]


# Looking up


def looking_up(policy, size=3000, width=32):
    random = np.random.default_rng(3)
    probabilities = random.dirichlet(np.ones(4), size)[:, :3]
    probabilities[pieces.PAD] = 0
    known = lexicon.Lexicon(random.integers(4, size + 10, [size, 3]), probabilities, size + 10)
    keras.utils.set_random_seed(1)
    layer = lexicon.LexiconLogits(known, width, dtype=policy)
    x, encoded = (random.normal(size=[2, length, width]).astype("float32") for length in (4, 5))
    source_ids = random.integers(2049, size, [2, 5]).astype("int32")
    source_ids[1, 3:] = pieces.PAD
    return layer, known, x, encoded, source_ids


@pytest.mark.parametrize("policy", POLICIES)
def test_looked_up_is_added_up(policy):
    layer, known, x, encoded, source_ids = looking_up(policy)
    logits = layer(x, encoded, source_ids)
    assert logits.dtype == tf.float32
    kernel, bias = (weight.numpy().astype("float64") for weight in layer.projection.weights)
    expected = np.full([2, 4, known.size], 1e-3)
    for row in range(2):
        length = np.count_nonzero(source_ids[row])
        keys = encoded[row, :length] @ kernel + bias
        scores = (x[row] @ kernel + bias) @ keys.T / 32**0.5
        attention = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        for place in range(4):
            for share, token in zip(attention[place], source_ids[row], strict=False):
                for other, probability in zip(known.translations[token], known.probabilities[token], strict=True):
                    expected[row, place, int(other)] += share * probability
    # Scores of about 6 from two roundings in half; a probability is off by as much of itself.
    atol = {"float32": 1e-4, "mixed_float16": 2**-11 * 24, "mixed_bfloat16": 2**-8 * 24}[policy]
    np.testing.assert_allclose(logits, np.log(expected), atol=atol)


def test_gradient_is_that_of_the_plain_sum():
    layer, known, x, encoded, source_ids = looking_up("float32", size=2100)
    table = np.zeros([2100, known.size], "float32")
    for row in range(3):
        np.add.at(table, (np.arange(2100), known.translations[:, row].numpy()), known.probabilities[:, row].numpy())
    upstream = np.random.default_rng(4).normal(size=[2, 4, known.size]).astype("float32")
    x, encoded = tf.constant(x), tf.constant(encoded)
    layer(x, encoded, source_ids)

    def plain():
        scores = tf.matmul(layer.projection(x), layer.projection(encoded), transpose_b=True) / 32**0.5
        attention = tf.nn.softmax(tf.where(source_ids[:, None] > 0, scores, -1e9))
        return tf.math.log(tf.matmul(attention, tf.gather(table, source_ids)) + 1e-3)

    found = []
    for compute in (lambda: layer(x, encoded, source_ids), plain):
        with tf.GradientTape() as tape:
            tape.watch([x, encoded])
            logits = compute()
        found.append([logits, *tape.gradient(logits, [x, encoded, layer.projection.kernel], upstream)])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        assert np.abs(theirs).max() > 1


def test_padding_and_rows_without_text():
    layer, _, x, encoded, source_ids = looking_up("mixed_float16")
    alone = layer(x, encoded, source_ids)
    longer = np.pad(encoded, [[0, 0], [0, 7], [0, 0]], constant_values=9)
    np.testing.assert_allclose(layer(x, longer, np.pad(source_ids, [[0, 0], [0, 7]])), alone, atol=1e-6)
    nothing = layer(x, encoded, np.zeros_like(source_ids))
    np.testing.assert_allclose(nothing, np.log(1e-3), rtol=1e-6)
