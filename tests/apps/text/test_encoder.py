"""Serving against training, n-grams against scikit-learn, presets against KerasHub, and what half precision may do."""

import itertools
import json
import subprocess
import sys
from typing import ClassVar

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from sklearn.feature_extraction.text import TfidfVectorizer

import tfhalf
from apps import runner, sets
from apps.text import classification, encoder, pieces, texts
from apps.text.wordpieces import WordPieces
from tests.conftest import options_for

POLICIES = ["float32", "mixed_float16", "mixed_bfloat16"]
HALF = POLICIES[1:]
# Probabilities after about four roundings of their own size, of the policy's unit roundoff.
ATOL = {"float32": 1e-5, "mixed_float16": 2**-11 * 4, "mixed_bfloat16": 2**-8 * 4}
WORDS = ["the", "big", "red", "old", "house", "tree", "dog", "cat", "sees", "knows", "and", "small"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WHOLE = ["the", "good", "bad", "film", "was", "not", "a", "plot", "un", "é", "w", ",", ".", "!", "?"]
NAMES = [*SPECIAL, *WHOLE, "##un", "##ing", "##s", "##ed", "##a"]
LONG = b"the old dog sees the cat and " * 80
HAZARDS = {
    "empty": b"",
    "spaces": b" \t\r\n \xc2\xa0",
    "one token": b"the",
    "longer than the limit": LONG,
    "one long word": b"x" * 3000,
    "unknown scripts": "שלום мир 世界 ไทย".encode(),
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 the dog 🤷🏽‍♀️".encode(),
    "control characters": "the\x00\x01\x07dog\x1b[31m\u202e\ufeff".encode(),
    "special ones": "[PAD] [CLS] <s> </s> <pad> ▁the".encode(),
    "bytes that aren't UTF-8": b"\xff\xfe the \xc3",
}
PLAIN = b"the dog sees a cat, not bad!"


def build_reader(kind: str) -> encoder.Reader:
    if kind == "wordpieces":
        return encoder.Reader(WordPieces(NAMES, True, False), [2], [3])
    lines = [" ".join(np.random.default_rng(i).permutation(WORDS)) for i in range(50)]
    return encoder.Reader(pieces.train(lines, 320, lowercase=True), [pieces.START], [])


@pytest.fixture(scope="module", params=["pieces", "wordpieces"])
def reader(request) -> encoder.Reader:
    return build_reader(request.param)


@pytest.fixture(scope="module")
def served(reader):
    """The reader as a bundle has it: in a graph, for any number of texts."""
    return tf.function(reader, autograph=False, input_signature=[tf.TensorSpec([None], tf.string)])


# Texts to token ids


@pytest.mark.parametrize("name", [*HAZARDS, "all together"])
def test_what_is_served_is_what_was_trained(reader, served, name):
    lines = np.array([*HAZARDS.values()] if name == "all together" else [HAZARDS[name], PLAIN], object)
    token_ids = served(tf.constant(lines))
    encoded = reader.encode(lines)
    assert (token_ids.dtype, encoded.dtype) == (tf.int32, tf.int32)
    np.testing.assert_array_equal(token_ids, texts.pad(encoded))
    assert token_ids.shape[1] % 8 == 0
    for line, row in zip(lines, encoded.to_list(), strict=True):
        (alone,) = reader.vocabulary.encode([line])
        room = 256 - len(reader.first) - len(reader.last)
        assert row == [*reader.first, *alone[:room], *reader.last]
        assert pieces.PAD not in row  # else the mask would hide it
        np.testing.assert_array_equal(served(tf.constant([line]))[0], texts.pad(tf.ragged.constant([row]))[0])


def test_long_texts_are_cut_to_256_ids_with_the_special_ones(reader, served):
    token_ids = served(tf.constant([LONG, b""])).numpy()
    assert token_ids.shape == (2, 256)
    assert (token_ids[0] != pieces.PAD).all()
    assert token_ids[0, 0] == reader.first[0]
    assert token_ids[0, -1] == (reader.last[0] if reader.last else reader.encode(np.array([LONG])).to_list()[0][255])
    framed = reader.first + reader.last
    assert token_ids[1].tolist() == framed + [pieces.PAD] * (256 - len(framed))
    # What comes after the limit changes nothing.
    np.testing.assert_array_equal(served(tf.constant([LONG + b"dog cat", b""])), token_ids)


def test_no_texts(served):
    assert served(tf.constant([], tf.string)).shape[0] == 0


# The network in each policy


def parts_of(num: int = 60, seed: int = 0):
    """Texts whose first word is their class; their number is in them."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, num)
    lines = [" ".join([WORDS[label], *random.choice(WORDS, random.integers(0, 30))]) for label in labels]
    return [np.array([line.encode() for line in lines], object), labels]


def options_of(*arguments: str):
    return options_for(classification.TASK, "--width=32", "--depth=1", "--vocabulary_size=320", *arguments)


def data_of(options) -> runner.Data:
    def one_hot(labels):
        return np.eye(3, dtype="float32")[labels]

    parts = [parts_of(60, 0), parts_of(19, 1), parts_of(21, 2)]
    return encoder.to_data(options, parts, one_hot, {"class_names": ["a", "b", "c"]})


@pytest.fixture(scope="module")
def data() -> runner.Data:
    return data_of(options_of("--batch_size=8"))


@pytest.fixture(scope="module")
def build(data):
    """A function that builds the network with n-grams that count."""
    built = {}

    def build(policy: str, *arguments: str) -> keras.Model:
        if (policy, *arguments) not in built:
            options = options_of(f"--dtype_policy={policy}", "--ngrams=2", *arguments)
            model = runner.build(classification.TASK, options, data)
            table = model.get_layer("ngram_logits").embeddings
            table.assign(np.random.default_rng(0).normal(0, 0.1, table.shape))
            built[policy, *arguments] = model
        return built[policy, *arguments]

    return build


def random_ids(shape, size: int = 260, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, size, shape).astype("int32")


@pytest.mark.parametrize("policy", POLICIES)
def test_model_in_each_policy(policy, build):
    model = build(policy)
    assert tfhalf.left_alone(model) == {}
    token_ids = random_ids([2, 16])
    assert model(token_ids).dtype == tf.float32
    assert model(token_ids).shape == (2, 3)
    by_path = tfhalf.precision.layers_by_path(model)
    # Of n-grams nothing is in half, and of the ids nothing anywhere.
    for path in ("embedding", "ngram_logits", "branch_dropout", "mean", "encoder_logits"):
        assert by_path[path].compute_dtype == "float32", path
    assert by_path["encoder0"].compute_dtype == policy.removeprefix("mixed_")
    assert model.get_layer("ngram_logits")(token_ids).dtype == tf.float32
    assert model.get_layer("embedding")(token_ids).dtype == tf.float32


@pytest.mark.parametrize("policy", POLICIES)
def test_batch_of_mixed_lengths_answers_as_one_by_one(policy, build, data):
    serve, _ = classification.serve(build(policy), data)
    serve = tf.function(serve, autograph=False, input_signature=[tf.TensorSpec([None], tf.string)])
    lines = [*HAZARDS.values(), PLAIN, *parts_of(5, 7)[0]]
    together = serve(tf.constant(lines))["probabilities"].numpy()
    assert np.isfinite(together).all()
    np.testing.assert_allclose(together.sum(axis=1), 1, rtol=1e-5)
    for line, row in zip(lines, together, strict=True):
        np.testing.assert_allclose(serve(tf.constant([line]))["probabilities"][0], row, atol=ATOL[policy])
    assert np.ptp(together, axis=0).max() > 0.1  # or they would agree whatever happens


@pytest.mark.parametrize("policy", POLICIES)
def test_padding_changes_nothing(policy, build):
    model = build(policy)
    token_ids = random_ids([3, 8])
    token_ids[1, 5:] = pieces.PAD
    alone = tf.nn.softmax(model(token_ids))
    padded = tf.nn.softmax(model(np.pad(token_ids, [[0, 0], [0, 120]])))
    np.testing.assert_allclose(padded, alone, atol=ATOL[policy])
    other = tf.nn.softmax(model(np.pad(token_ids, [[0, 0], [0, 120]], constant_values=5)))
    assert np.abs(other - alone).max() > 2 * ATOL["mixed_bfloat16"]


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_of_padding_only_are_finite(policy, build):
    model = build(policy)
    nothing, some = np.full([1, 8], pieces.PAD, "int32"), random_ids([1, 8])
    both = model(np.concatenate([nothing, some])).numpy()
    assert np.isfinite(both).all()
    np.testing.assert_allclose(both[1], model(some)[0], atol=20 * ATOL[policy])
    one = np.where(np.arange(8) == 0, some, pieces.PAD)
    assert np.isfinite(model(one)).all()


def test_steps_on_padding_and_single_tokens_are_not_skipped(data):
    options = options_of("--dtype_policy=mixed_float16", "--ngrams=2", "--initial_scale=32768")
    model = runner.build(classification.TASK, options, data)
    some, targets = random_ids([32, 8]), np.eye(3, dtype="float32")[np.arange(32) % 3]
    one = np.where(np.arange(8) == 0, some, pieces.PAD)
    for token_ids in (some, one, np.full([32, 8], pieces.PAD, "int32")):
        assert np.isfinite(model.train_on_batch(token_ids, targets)[0])
    assert model.optimizer.steps_skipped == 0
    assert all(np.isfinite(weight.numpy()).all() for weight in model.weights)


@pytest.mark.parametrize("policy", POLICIES)
def test_large_ids_pick_their_own_rows(policy):
    # float16 has no 2049 and nothing from 65,520 on; bfloat16 has no 257.
    size = 66_000
    token_ids = np.array([[257, 2049, 2051, 4097, 63999, 65505, 65519, 65999]], "int32")
    batch = tf.data.Dataset.from_tensors((token_ids, np.eye(2)[:1]))
    data = runner.Data(lambda epoch: batch, 1, None, None, {"vocabulary_size": size, "class_names": ["a", "b"]})
    model = runner.build(classification.TASK, options_of(f"--dtype_policy={policy}", "--ngrams=2"), data)
    embedding, ngrams = model.get_layer("embedding"), model.get_layer("ngram_logits")
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(model(token_ids)[:, 0])
    gradients = tape.gradient(total, [embedding.embeddings.value, ngrams.embeddings.value])
    used = [np.flatnonzero(np.any(tf.convert_to_tensor(gradient) != 0, axis=1)) for gradient in gradients]
    np.testing.assert_array_equal(used[0], token_ids[0])
    np.testing.assert_array_equal(used[1][used[1] < size], token_ids[0])
    assert len(used[1]) == 8 + 7
    counted = np.flatnonzero(ngrams.idf.numpy() < 1.1)  # others weigh log(2) + 1
    np.testing.assert_array_equal(counted[counted != pieces.PAD], used[1])
    positions, rates = np.arange(8)[:, np.newaxis], 10000.0 ** (-2 * np.arange(16) / 32)
    sines = np.concatenate([np.sin(positions * rates), np.cos(positions * rates)], axis=1)
    table = embedding.embeddings.numpy().astype(np.float64)
    np.testing.assert_allclose(embedding(token_ids)[0], 32**0.5 * table[token_ids[0]] + sines, atol=1e-5)


# N-grams


def make_ngrams(longest: int, batches):
    layer = encoder.NgramLogits(3, 40, longest, dtype="float32")
    layer.build([None, None])
    layer.adapt(batches)
    layer.embeddings.assign(np.random.default_rng(3).normal(size=layer.embeddings.shape))
    return layer


def documents(num: int, seed: int, repeats: bool) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [
        random.choice(np.arange(2, 38), random.integers(1, 14), replace=repeats).tolist() for _ in range(num)
    ]  # 38 and 39 are in no text


def padded(rows: list[list[int]]) -> np.ndarray:
    return texts.pad(tf.ragged.constant(rows, tf.int32)).numpy()


def ngrams_of(row: list[int], longest: int) -> list[tuple[int, ...]]:
    return [tuple(row[at : at + n]) for n in range(1, longest + 1) for at in range(len(row) - n + 1)]


def rows_of(layer, ngrams) -> list[int]:
    """The rows of the table that n-grams of any lengths have."""
    rows = {}
    for length in {len(ngram) for ngram in ngrams}:
        alike = [ngram for ngram in ngrams if len(ngram) == length]
        found = np.asarray(layer._ngrams(tf.constant(alike, tf.int32))).reshape([len(alike), layer.longest, length])
        rows |= dict(zip(alike, found[:, length - 1, 0], strict=True))
    return [rows[ngram] for ngram in ngrams]


@pytest.mark.parametrize("longest", [1, 2])
def test_tf_idf_agrees_with_sklearn(longest):
    training = documents(100, 0, repeats=True)  # a text counts once, however often it has an n-gram
    layer = make_ngrams(longest, [padded(training[:30]), padded(training[30:31]), padded(training[31:])])
    vectorizer = TfidfVectorizer(
        analyzer=lambda row: ngrams_of(row, longest), norm="l2", smooth_idf=True, sublinear_tf=False
    )
    vectorizer.fit(training)
    features = sorted(vectorizer.vocabulary_, key=vectorizer.vocabulary_.get)
    rows = rows_of(layer, features)
    assert len(set(rows)) == len(features)  # so few don't meet
    np.testing.assert_allclose(layer.idf.numpy()[rows], vectorizer.idf_, rtol=1e-6)
    assert layer.idf.numpy()[39] == pytest.approx(np.log(101) + 1)
    known = [row for row in documents(400, 1, repeats=False) if set(ngrams_of(row, longest)) <= set(features)]
    known += [training[0][:1], *[list(feature) for feature in features[:9]]]
    known = [row for row in known if len(set(row)) == len(row)]
    assert len(known) > 9
    coefficients = layer.embeddings.numpy()[rows].astype(np.float64)
    expected = encoder._GAIN * vectorizer.transform(known).toarray() @ coefficients
    np.testing.assert_allclose(layer(padded(known)), expected, atol=1e-5)


@pytest.mark.parametrize("longest", [1, 2, 4])
def test_repeats_by_hand(longest):
    layer = make_ngrams(longest, [padded(documents(50, 0, repeats=True))])
    rows = [[5, 5, 5, 6, 5, 5], [7], [8, 9], [9, 8, 9]]
    table, idf = layer.embeddings.numpy().astype(np.float64), layer.idf.numpy().astype(np.float64)
    for row, seen in zip(rows, layer(padded(rows)).numpy(), strict=True):
        where = rows_of(layer, ngrams_of(row, longest))
        expected = encoder._GAIN * idf[where] @ table[where] / np.sqrt(np.sum(idf[where] ** 2))
        np.testing.assert_allclose(seen, expected, rtol=1e-5, atol=1e-5)


def test_different_pairs_have_rows_of_their_own():
    layer = make_ngrams(2, [padded([[5, 6]])])
    pairs = list(itertools.product(range(1, 40), repeat=2))
    rows = rows_of(layer, pairs)
    assert 40 <= min(rows) <= max(rows) < 40 + 2**18 == layer.embeddings.shape[0]
    assert len(set(rows)) == len(pairs)
    # Of many that share 2^18 rows no more meet than by chance: m^2 / 2n of them.
    random = np.random.default_rng(0)
    wide = encoder.NgramLogits(1, 8000, 2, dtype="float32")
    some = np.unique(random.integers(1, 8000, [20_000, 2]), axis=0).astype("int32")
    met = len(some) - len(np.unique(np.asarray(wide._ngrams(some))[:, 2]))
    assert met < 1.3 * len(some) ** 2 / 2**19


def test_padding_makes_no_ngram():
    layer = make_ngrams(3, [padded([[5, 6, 7]])])
    token_ids = padded([[5, 6, 7], [5]])
    found = np.asarray(layer._ngrams(token_ids))
    assert (found != pieces.PAD).sum(axis=1).tolist() == [3 + 2 + 1, 1]
    wider = np.pad(token_ids, [[0, 0], [0, 24]])
    np.testing.assert_allclose(layer(wider), layer(token_ids), rtol=1e-6)
    narrow = token_ids[1:, :1]  # one token has no pair
    np.testing.assert_allclose(layer(narrow), layer(token_ids)[1:], rtol=1e-6)


def test_order_matters_to_pairs_only():
    rows = padded([[5, 6, 7, 8], [8, 7, 6, 5]])
    for longest, differs in ((1, False), (2, True)):
        one, other = make_ngrams(longest, [rows])(rows).numpy()
        assert bool(np.abs(one - other).max() > 0.1) is differs


def test_size_of_the_table():
    assert make_ngrams(1, []).embeddings.shape == (40, 3)
    assert make_ngrams(2, []).embeddings.shape == make_ngrams(4, []).embeddings.shape == (40 + 2**18, 3)
    assert not make_ngrams(2, []).idf.trainable


@pytest.mark.parametrize("policy", POLICIES)
def test_branches_are_left_out_in_training_only(policy, build):
    model = build(policy)
    token_ids = random_ids([5, 8])
    branches = [keras.Model(model.input, model.get_layer(name).output) for name in ("encoder_logits", "ngram_logits")]
    plain = np.stack([branch(token_ids, training=False) for branch in branches], axis=1)
    np.testing.assert_allclose(model(token_ids, training=False), plain.sum(axis=1), atol=1e-5)
    keras.utils.set_random_seed(0)
    both = np.random.default_rng(0).normal(size=[4000, 2, 3]).astype("float32")
    layer = model.get_layer("branch_dropout")
    np.testing.assert_array_equal(layer(both, training=False), both)
    dropped = layer(both, training=True).numpy()
    assert dropped.dtype == np.float32
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], 2 * both[kept])
    np.testing.assert_array_equal(kept, np.repeat(kept[..., :1], 3, axis=-1))  # all outputs of a branch, or none
    shares = [np.mean((kept[:, 0, 0] == one) & (kept[:, 1, 0] == other)) for one in (0, 1) for other in (0, 1)]
    np.testing.assert_allclose(shares, 0.25, atol=4 * (0.25 * 0.75 / 4000) ** 0.5)


def test_network_knows_ngrams_of_the_training_part(build, data):
    layer = build("float32").get_layer("ngram_logits")
    rows = [row[row != pieces.PAD].tolist() for inputs, _ in data.train(0).as_numpy_iterator() for row in inputs]
    assert len(rows) == 56
    counts = np.zeros(layer.idf.shape)
    for row in rows:
        counts[[*set(rows_of(layer, ngrams_of(row, 2)))]] += 1
    seen = layer.idf.numpy()
    np.testing.assert_allclose(seen[1:], (np.log(57 / (1 + counts)) + 1)[1:], rtol=1e-6)
    assert counts[pieces.START] == 56


@pytest.mark.parametrize("ngrams", [0, 1, 3])
def test_number_of_ngrams_is_a_flag(data, ngrams):
    model = runner.build(classification.TASK, options_of(f"--ngrams={ngrams}"), data)
    names = [layer.name for layer in model.layers]
    assert ("ngram_logits" in names) is bool(ngrams)
    if ngrams:
        assert model.get_layer("ngram_logits").longest == ngrams
    assert model(random_ids([2, 8])).shape == (2, 3)


def test_width_and_depth_are_flags(data):
    model = runner.build(classification.TASK, options_of("--width=64", "--depth=3", "--ngrams=0"), data)
    layers = [layer for layer in model.layers if isinstance(layer, keras_hub.layers.TransformerEncoder)]
    # Of each: attention 4 (w^2 + w), two normalisations of 2 w, 8 w^2 + 5 w between them.
    assert [layer.count_params() for layer in layers] == [12 * 64**2 + 13 * 64] * 3
    vocabulary = data.about["vocabulary_size"]
    assert model.count_params() == vocabulary * 64 + 3 * (12 * 64**2 + 13 * 64) + 2 * 64 + 64 * 3 + 3


# Flags


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=bert"], "--model=bert must be transformer or keras_hub:<preset>"),
        (["--model=keras_hub:"], "--model=keras_hub: must be transformer or keras_hub:<preset>"),
        (["--width=100"], "--width=100 must be a multiple of 32"),
        (["--model=keras_hub:x", "--width=64"], "--width has no effect on --model=keras_hub:x; leave it out"),
        (["--model=keras_hub:x", "--depth=2"], "--depth has no effect on --model=keras_hub:x; leave it out"),
        (["--model=keras_hub:x", "--ngrams=1"], "--ngrams has no effect on --model=keras_hub:x; leave it out"),
        (["--model=keras_hub:x", "--vocabulary_size=8000"], "--vocabulary_size has no effect on --model=keras_hub:x"),
    ],
)
def test_flags_that_cannot_be_or_have_no_effect(arguments, message):
    with pytest.raises(runner.AppError, match=message):
        encoder.check_options(options_for(classification.TASK, *arguments))


@pytest.mark.parametrize("arguments", [[], ["--width=96", "--ngrams=0"], ["--model=keras_hub:bert_tiny_en_uncased"]])
def test_flags_that_can_be(arguments):
    encoder.check_options(options_for(classification.TASK, *arguments))


# Data


def test_data(data):
    batches = list(data.train(0).as_numpy_iterator())
    assert len(batches) == data.steps_per_epoch == 60 // 8
    assert {len(token_ids) for token_ids, _ in batches} == {8}
    (reader,) = data.resources
    assert data.about == {"class_names": ["a", "b", "c"], "vocabulary_size": reader.vocabulary.size}

    def pairs(batches):
        """Rows of ids without padding, and their classes."""
        return [
            (tuple(row[row != pieces.PAD].tolist()), int(target.argmax()))
            for token_ids, targets in batches
            for row, target in zip(token_ids, targets, strict=True)
        ]

    def expected(part):
        return [(tuple(row), int(label)) for row, label in zip(reader.encode(part[0]).to_list(), part[1], strict=True)]

    train, validation, test = parts_of(60, 0), parts_of(19, 1), parts_of(21, 2)
    assert set(pairs(batches)) <= set(expected(train))
    assert sorted(pairs(data.validation.as_numpy_iterator())) == sorted(expected(validation))
    widths = [token_ids.shape[1] for token_ids, _ in data.validation.as_numpy_iterator()]
    assert widths == sorted(widths)
    answers = [(inputs["text"], labels) for inputs, labels in data.test.as_numpy_iterator()]
    assert [len(labels) for _, labels in answers] == [8, 8, 5]
    lines, labels = (np.concatenate(column) for column in zip(*answers, strict=True))
    assert sorted(zip(lines, labels, strict=True)) == sorted(zip(*test, strict=True))
    assert [len(line) for line in lines] == sorted(map(len, lines))
    shown, targets = next(data.shown.as_numpy_iterator())
    np.testing.assert_array_equal(shown, validation[0][:16])
    np.testing.assert_array_equal(targets, np.eye(3)[validation[1][:16]])


class SecretLabels(tfds.core.GeneratorBasedBuilder):
    """As GLUE's sets: the labels of the test part are secret; one of the others is missing too."""

    VERSION = tfds.core.Version("1.0.0")
    sizes: ClassVar = {
        "train": (40, 1),
        "validation": (6, 0),
        "test": (7, 7),
    }  # texts, and how many of them have no label

    def _info(self):
        features = {
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["no", "yes"]),
            "rating": tfds.features.Scalar(np.float32),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(name, *sizes) for name, sizes in self.sizes.items()}

    def _generate_examples(self, name, num, num_secret):
        for index in range(num):
            label = -1 if index < num_secret else index % 2
            yield index, {"text": f"{name} {index}", "label": label, "rating": np.nan if label < 0 else label - 0.5}


class PublicLabels(SecretLabels):
    """Some labels of each part are missing."""

    sizes: ClassVar = {"train": (40, 2), "validation": (6, 1), "test": (7, 3)}


class MissingLabels(SecretLabels):
    """No label in the part that would be the test part."""

    sizes: ClassVar = {"train": (40, 0), "test": (7, 7)}


class NoLabels(SecretLabels):
    """No label at all."""

    sizes: ClassVar = {"train": (40, 40), "validation": (6, 6), "test": (7, 7)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("data"))


def read_parts(folder: str, name: str, target: str = "label"):
    options = options_for(classification.TASK, f"--dataset={name}", f"--data_dir={folder}")
    return encoder.read_parts(options, sets.prepare(options), "text", target)


def names_of(part) -> dict[str, int]:
    """How many of a part's texts come from which of the set's."""
    names = [line.split()[0].decode() for line in part[0]]
    return {name: names.count(name) for name in sorted(set(names))}


@pytest.mark.parametrize("target", ["label", "rating"])
def test_texts_without_label_are_left_out_and_told(folder, capsys, target):
    parts = read_parts(folder, "public_labels", target)
    assert [names_of(part) for part in parts] == [{"train": 38}, {"validation": 5}, {"test": 4}]
    for lines, targets in parts:
        assert len(lines) == len(targets)
        for line, value in zip(lines, targets, strict=True):
            assert value == int(line.split()[1]) % 2 - (0.5 if target == "rating" else 0)
    told = capsys.readouterr().out.splitlines()
    assert "2 of 40 texts in train have no label and are left out" in told
    assert "1 of 6 texts in validation have no label and are left out" in told
    assert "3 of 7 texts in test have no label and are left out" in told


@pytest.mark.parametrize("target", ["label", "rating"])
def test_test_part_without_labels_is_replaced_by_the_validation_part(folder, target):
    train, validation, test = read_parts(folder, "secret_labels", target)
    assert names_of(test) == {"validation": 6}
    assert [*names_of(train), *names_of(validation)] == ["train", "train"]
    assert len(train[0]) + len(validation[0]) == 39
    assert not set(train[0]) & set(validation[0])
    assert 3 <= len(validation[0]) <= 4  # a tenth, and one may have no label


@pytest.mark.parametrize(("name", "part"), [("missing_labels", "test"), ("no_labels", r"train\[:90%\]")])
def test_part_without_labels_is_told(folder, name, part):
    with pytest.raises(runner.AppError, match=f"--dataset={name}: no text in {part} has a label; choose another one"):
        read_parts(folder, name)


# Presets


def save_preset(folder, tokenizer, size: int = len(NAMES)) -> str:
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=size, num_layers=1, num_heads=2, hidden_dim=32, intermediate_dim=64, max_sequence_length=256
    )
    backbone.save_to_preset(str(folder))
    tokenizer.save_to_preset(str(folder))
    return f"--model=keras_hub:{folder}"


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> str:
    return save_preset(tmp_path_factory.mktemp("preset"), keras_hub.tokenizers.BertTokenizer(NAMES, lowercase=True))


LINES = [b"The good film was not bad!", b"a plot, UNUNING", "café é".encode(), b"", LONG, b"zzz the"]


def preset_data(*arguments: str) -> runner.Data:
    options = options_for(classification.TASK, "--batch_size=2", *arguments)
    part = [np.array(LINES, object), np.arange(len(LINES)) % 2]
    return encoder.to_data(options, [part, part, part], lambda labels: np.eye(2)[labels], {"class_names": ["n", "y"]})


def test_ids_of_a_preset_are_keras_hubs(preset):
    (reader,) = preset_data(preset).resources
    tokenizer = keras_hub.tokenizers.BertTokenizer(NAMES, lowercase=True)
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=256)
    expected = preprocessor(tf.constant(LINES))["token_ids"].numpy()
    served = reader(tf.constant(LINES)).numpy()
    np.testing.assert_array_equal(served, expected)
    np.testing.assert_array_equal(texts.pad(reader.encode(np.array(LINES, object))), expected)
    assert (served[:, 0] == NAMES.index("[CLS]")).all()
    assert (np.sum(served == NAMES.index("[SEP]"), axis=1) == 1).all()
    assert reader.vocabulary.size == len(NAMES)


@pytest.mark.parametrize("policy", POLICIES)
def test_model_of_a_preset(preset, policy):
    data = preset_data(preset)
    options = options_for(classification.TASK, preset, f"--dtype_policy={policy}")
    model = runner.build(classification.TASK, options, data)
    loaded = next(layer for layer in model.layers if isinstance(layer, keras_hub.models.Backbone))
    saved = keras_hub.models.Backbone.from_preset(options.model.removeprefix("keras_hub:"), dtype="float32")
    for ours, theirs in zip(loaded.get_weights(), saved.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    token_ids = texts.pad(data.resources[0].encode(np.array(LINES, object)))
    inputs = {"token_ids": token_ids, "padding_mask": token_ids != 0, "segment_ids": tf.zeros_like(token_ids)}
    first = saved(inputs)["sequence_output"].numpy()[:, 0].astype(np.float64)
    head = model.get_layer("encoder_logits")
    expected = first @ head.kernel.numpy() + head.bias.numpy()
    tolerance = {"float32": 1e-5, "mixed_float16": 2**-11 * 16, "mixed_bfloat16": 2**-8 * 16}[policy]
    np.testing.assert_allclose(model(token_ids), expected, atol=tolerance)
    assert model(token_ids).dtype == tf.float32
    tfhalf.precision.require_float32_outputs(model)
    if policy != "mixed_float16":
        return
    assert tfhalf.coverage(model, token_ids).multiply_adds_in_half > 0.9
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(model(token_ids)[:, 0])
    gradients = tape.gradient(total, [weight.value for weight in loaded.trainable_variables])
    learns = [gradient is not None and np.any(tf.convert_to_tensor(gradient) != 0) for gradient in gradients]
    assert np.mean(learns) > 0.8  # the pretrained layers learn too; the pooler has nothing to do


SERVE = """
import json, sys
sys.modules["keras"] = sys.modules["keras_hub"] = sys.modules["tensorflow_text"] = None
import tensorflow as tf
loaded = tf.saved_model.load(sys.argv[1])
lines = [bytes.fromhex(line) for line in json.loads(sys.argv[2])]
outputs = loaded.signatures["serving_float32"](text=tf.constant(lines))
print(json.dumps(outputs["probabilities"].numpy().tolist()))
"""


@pytest.mark.slow
@pytest.mark.soak  # test_wordpieces.py serves its tokenizer alone, the contract our own encoder
def test_bundle_of_a_preset_needs_nothing_but_tensorflow(preset, tmp_path):
    data = preset_data(preset)
    model = runner.build(classification.TASK, options_for(classification.TASK, preset), data)
    serve, signature = classification.serve(model, data)
    lines = np.array([*LINES, *HAZARDS.values()])
    tfhalf.export_saved_model(
        model,
        tmp_path / "1",
        inputs={"text": lines},
        serve=serve,
        input_signature=signature,
        resources=data.resources,
    )
    given = json.dumps([line.hex() for line in [*LINES, *HAZARDS.values()]])
    command = [sys.executable, "-c", SERVE, str(tmp_path / "1"), given]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    with tfhalf.precision.computing_in(model, "float32"):
        expected = serve(tf.constant(lines))["probabilities"]
    np.testing.assert_allclose(json.loads(result.stdout), expected, atol=5e-3)  # weights are stored in float16


def test_presets_that_cannot_be_used(tmp_path):
    vocabulary = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}
    tokenizer = keras_hub.tokenizers.GPT2Tokenizer(vocabulary=vocabulary, merges=["a b"])
    flag = save_preset(tmp_path / "gpt2", tokenizer)
    message = "keras_hub:.*gpt2: its tokenizer is GPT2Tokenizer, and only WordPiece .*choose another preset"
    with pytest.raises(runner.AppError, match=message):
        preset_data(flag)
    tokenizer = keras_hub.tokenizers.BertTokenizer(["[UNK]", *[name for name in NAMES if name != "[UNK]"]])
    flag = save_preset(tmp_path / "other_pad", tokenizer)
    with pytest.raises(runner.AppError, match="other_pad: its padding has the id 1, not 0"):
        preset_data(flag)
    with pytest.raises(runner.AppError) as caught:
        preset_data("--model=keras_hub:/no/such")
    message = str(caught.value)
    assert message.startswith("--model=keras_hub:/no/such can't be loaded: ")
    assert message.endswith("; it needs the web, or a folder")
    assert "\n" not in message
    (tmp_path / "empty").mkdir()
    with pytest.raises(runner.AppError, match=r"empty can't be loaded: .*; it needs the web, or a folder"):
        preset_data(f"--model=keras_hub:{tmp_path / 'empty'}")
