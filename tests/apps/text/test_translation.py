"""The loss against Keras', the cached decoder against the whole one, hostile texts, data, and a language learned."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

import tfhalf
from apps import runner
from apps.text import pieces, translation
from tests.apps.text.test_decoder import ATOL, POLICIES, build, ids
from tests.conftest import options_for

WORDS = dict(
    zip(
        ["the", "big", "red", "old", "house", "tree", "dog", "cat", "sees", "knows", "and", "small"],
        ["la", "grande", "rojo", "vieja", "casa", "árbol", "perro", "gato", "ve", "conoce", "y", "pequeño"],
        strict=True,
    )
)
HAZARDS = {
    "empty": "",
    "spaces": " \t\n ",
    "one token": "the",
    "longer than the limit": "the old dog sees the cat and " * 60,
    "one long word": "x" * 500,
    "unknown scripts": "שלום мир 世界 ไทย",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 the dog",
    "control characters": "the\x00\x01\x07dog\x1b[31m\u202e\ufeff",
    "PAD and START": "[PAD] <s> </s> <pad> ▁the",
    "bytes that aren't UTF-8": b"\xff\xfe the \xc3",
}


class TinyPairs(tfds.core.GeneratorBasedBuilder):
    """Word-for-word translations, and beside them what isn't a language."""

    VERSION = tfds.core.Version("1.0.0")
    languages = ("en", "es")

    def _info(self):
        names = (*self.languages, "reference")
        features = tfds.features.FeaturesDict({name: tfds.features.Text() for name in names})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        sizes = {"train": 1000, "validation": 20, "test": 30}
        return {split: self._generate_examples(num, seed) for seed, (split, num) in enumerate(sizes.items())}

    def _generate_examples(self, num, seed):
        random = np.random.default_rng(seed)
        for index in range(num):
            words = random.choice(list(WORDS), random.integers(1, 7))
            texts = [" ".join(words), " ".join(WORDS[word] for word in words)]
            if num == 1000 and index in (3, 4):  # of no use: one has no translation, one is too long
                texts = [texts[0], ""] if index == 3 else ["the " * 200, "la " * 200]
            texts += [texts[1]] * (len(self.languages) - 2)
            yield index, dict(zip((*self.languages, "reference"), [*texts, "Ruth 1"], strict=True))


class TinyTriples(TinyPairs):
    """A third language."""

    languages = ("en", "es", "pt-br")


class TinyAlone(TinyPairs):
    """One language."""

    languages = ("en",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("data"))


def arguments(folder: str, *more: str) -> list[str]:
    return [f"--data_dir={folder}", "--dataset=tiny_pairs", "--vocabulary_size=320", "--width=64", "--depth=1", *more]


def load(folder: str, *more: str) -> runner.Data:
    return translation.load_data(options_for(translation.TASK, *arguments(folder, *more)))


@pytest.fixture(scope="module")
def learned(folder):
    """A small model that has learned the language, its data, and its losses."""
    options = options_for(
        translation.TASK, *arguments(folder, "--batch_size=40", "--epochs=16", "--learning_rate=5e-3")
    )
    data = translation.load_data(options)
    model = runner.build(translation.TASK, options, data)
    losses = [model.fit(data.train(epoch), verbose=0).history["loss"][0] for epoch in range(options.epochs)]
    return model, data, losses


@pytest.fixture(scope="module")
def answer(learned):
    """What clients get of it: texts to (translations, scores)."""
    model, data, _ = learned
    call = runner.answering(translation.TASK, model, data)

    def answer(lines):
        outputs = call(text=tf.constant(lines, tf.string))
        assert outputs["score"].dtype == tf.float32
        return [text.decode() for text in outputs["translation"].numpy()], outputs["score"].numpy()

    return answer


# Loss, metric, schedule


def test_loss_agrees_with_keras():
    random = np.random.default_rng(0)
    targets, logits = ids([3, 7], 11), (3 * random.normal(size=[3, 7, 11])).astype("float32")
    targets[0, 4:], targets[1, 1:], targets[2, :] = pieces.PAD, pieces.PAD, pieces.PAD
    losses = translation.SmoothedCrossEntropy(reduction=None)(targets, logits)
    oracle = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1, reduction=None)
    each = oracle(np.eye(11)[targets], logits).numpy() * (targets != pieces.PAD)
    np.testing.assert_allclose(losses, each.sum(1) / 32, rtol=1e-5)
    assert losses[2] == 0.0
    wider = np.pad(targets, [[0, 0], [0, 5]]), np.pad(logits, [[0, 0], [0, 5], [0, 0]], constant_values=7)
    np.testing.assert_allclose(translation.SmoothedCrossEntropy(reduction=None)(*wider), losses, rtol=1e-6)
    copied = keras.losses.deserialize(keras.losses.serialize(translation.build_loss(None)))
    assert float(copied(targets, logits)) == pytest.approx(np.mean(losses), rel=1e-6)


def test_pairs_are_sorted_by_their_longer_side():
    source, target = (tf.RaggedTensor.from_row_lengths([1] * sum(row), row) for row in ([3, 1, 2], [1, 4, 2]))
    np.testing.assert_array_equal(translation._lengths([source, target]), [3, 4, 2])


def test_accuracy_does_not_count_pad():
    targets = np.array([[5, 6, 7, 0], [5, 0, 0, 0]])
    logits = np.eye(9, dtype="float32")[[[5, 6, 8, 0], [4, 0, 0, 0]]]
    (metric,) = translation.build_metrics(None)
    metric.update_state(targets, logits)
    assert float(metric.result()) == pytest.approx(2 / 4)


def test_rate_of_a_short_and_of_a_long_run():
    options = options_for(translation.TASK, "--learning_rate=0.003")
    for steps, warmup, cooldown in ((1, 1, 1), (1000, 40, 250), (10**6, 4000, 250_000)):
        optimizer = translation.build_optimizer(options, steps)
        assert optimizer._learning_rate.get_config() == {
            "learning_rate": 0.003,
            "warmup_steps": warmup,
            "cooldown_steps": cooldown,
            "num_steps": steps,
        }


# Model


@pytest.mark.parametrize("policy", POLICIES)
def test_model_in_each_policy(policy):
    model = build(policy, 4000)
    assert tfhalf.left_alone(model) == {}
    assert {weight.dtype for weight in model.weights} == {"float32"}
    tables = [tuple(weight.shape) for weight in model.weights if weight.shape[0] > 3000]
    assert tables == [(3990, 64), (4000, 64)]  # one for the source, one for target and output
    batch = {"source_ids": ids([2, 9], 3990), "target_ids": ids([2, 6], 4000)}
    assert model(batch).shape == (2, 6, 4000)
    assert model(batch).dtype == tf.float32
    if policy != "float32":
        measured = tfhalf.coverage(model, batch)
        assert measured.multiply_adds_in_half > 0.99
        norms = {path for path in tfhalf.precision.layers_by_path(model) if path.endswith("norm")}
        assert set(measured.islands) == norms | {"source_embedding", "target_embedding", "lexicon"}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("side", ["source", "target"])
def test_ids_and_positions_are_not_rounded(side, policy):
    embedding = build(policy, 4000).get_layer(f"{side}_embedding")
    # float16 has no 2049 and bfloat16 no 257; the sine of a position near 120 in half is off by up to 0.4.
    for start in (0, 120):
        seen = embedding(tf.constant([[257, 2049, 3989]]), start=start)
        assert seen.dtype == tf.float32
        positions, rates = np.arange(start, start + 3)[:, None], 10000.0 ** (-2 * np.arange(32) / 64)
        sines = np.concatenate([np.sin(positions * rates), np.cos(positions * rates)], axis=1)
        table = embedding.embeddings.numpy().astype("float64")
        np.testing.assert_allclose(seen[0], 8 * table[[257, 2049, 3989]] + sines, atol=3e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_padding_changes_nothing(policy):
    model = build(policy)
    source_ids, target_ids = ids([2, 9], 40), ids([2, 6])
    alone = model({"source_ids": source_ids, "target_ids": target_ids})
    padded = model({"source_ids": np.pad(source_ids, [[0, 0], [0, 40]]), "target_ids": target_ids})
    np.testing.assert_allclose(padded, alone, atol=ATOL[policy])
    other = np.pad(source_ids, [[0, 0], [0, 40]], constant_values=5)
    assert np.abs(model({"source_ids": other, "target_ids": target_ids}) - alone).max() > 2 * ATOL["mixed_float16"]


def test_steps_on_padding_and_single_tokens_are_not_skipped():
    model = build("mixed_float16", 50, "--initial_scale=32768")
    nothing, some = np.full([2, 4], pieces.PAD, "int32"), ids([2, 4], 40)
    one = np.where(np.arange(4) == 0, some, pieces.PAD)
    for source, target in ((nothing, nothing), (one, one), (nothing, some), (some, nothing)):
        inputs = {"source_ids": source, "target_ids": target}
        assert np.isfinite(model(inputs)).all()
        assert np.isfinite(model.train_on_batch(inputs, target)[0])
    assert model.optimizer.steps_skipped == 0
    assert all(np.isfinite(weight.numpy()).all() for weight in model.weights)


# What is served


def test_it_learns_a_language(learned, answer):
    model, data, losses = learned
    assert losses[-1] < losses[len(losses) // 2] < losses[0] / 2
    texts = ["the dog sees the cat", "the house", "dog"]
    assert answer(texts)[0] == [" ".join(WORDS[word] for word in text.split()) for text in texts]
    assert translation.score(runner.answering(translation.TASK, model, data), data)["bleu"] > 80


def test_batch_of_mixed_lengths_answers_as_one_by_one(answer):
    random = np.random.default_rng(9)
    lines = [" ".join(random.choice(list(WORDS), length)) for length in (1, 30, 2, 8, 5, 1, 14)] + [""]
    translations, scores = answer(lines)
    for line, translated, value in zip(lines, translations, scores, strict=True):
        (alone,), (score,) = answer([line])
        assert score == pytest.approx(value, abs=2e-2)
        assert alone == translated


@pytest.mark.parametrize("name", HAZARDS)
def test_hostile_texts(answer, name):
    texts = [HAZARDS[name], "the dog sees the cat", "the house"]
    translations, scores = answer(texts)
    assert np.isfinite(scores).all()
    assert (scores <= 0).all()
    assert translations[1:] == answer(texts[1:])[0]
    if name in ("empty", "spaces"):
        assert translations[0] == ""
        assert scores[0] == 0
    if name == "one token":
        assert translations[0] == "la"
    assert answer([])[0] == []


def test_greedy_is_served_beside(learned):
    model, data, _ = learned
    encode, decided = translation.serve(model, data)[0], translation.decide(model, data)
    assert list(decided) == ["", "_greedy"]
    raw = tf.function(encode, autograph=False)(tf.constant(["the dog sees the cat", ""]))
    assert {name: tensor.dtype for name, tensor in raw.items()} == {
        "source_ids": tf.int32,
        "encoded": tf.float32,
        "log_probs": tf.float32,
    }
    outputs = {name: tf.function(find, autograph=False)(raw) for name, find in decided.items()}
    for found in outputs.values():
        assert found["translation"].numpy().tolist() == [b"la perro ve la gato", b""]
    # Beam search finds at least what greedy search finds, in this easy language the same.
    np.testing.assert_allclose(outputs[""]["score"], outputs["_greedy"]["score"], atol=1e-2)


def test_every_weight_counts_in_what_is_compared(learned):
    model, data, _ = learned
    encode, signature = translation.serve(model, data)
    assert signature == {"text": tf.TensorSpec([None], tf.string)}
    with tf.GradientTape() as tape:
        outputs = encode(tf.constant(["the dog sees the cat and the big house"]))
        total = tf.reduce_sum(outputs["log_probs"] ** 2)
    gradients = tape.gradient(total, [weight.value for weight in model.trainable_variables])
    for weight, gradient in zip(model.trainable_variables, gradients, strict=True):
        # A key's bias adds the same to all scores, and the softmax takes it away.
        assert weight.path.endswith("key/bias") or np.any(tf.convert_to_tensor(gradient) != 0), weight.path


@pytest.mark.slow
def test_bundle_translates(learned, tmp_path):
    model, data, _ = learned
    serve, signature = translation.serve(model, data)
    texts = np.array([text if isinstance(text, bytes) else text.encode() for text in HAZARDS.values()])
    manifest = tfhalf.export_saved_model(
        model,
        tmp_path / "1",
        inputs={"text": texts},
        serve=serve,
        input_signature=signature,
        decide=translation.decide(model, data)[""],  # the greedy one is served beside it in soak's contract
        resources=data.resources,
    )
    assert {"serving_default", "serving_float32", "serving_default_raw"} <= set(manifest.signatures)
    served = tf.saved_model.load(tmp_path / "1").signatures
    for name in ("serving_default", "serving_float32"):
        found = served[name](text=tf.constant([b"the dog sees the cat", b""]))
        assert found["translation"].numpy().tolist() == [b"la perro ve la gato", b""]
        assert found["score"].dtype == tf.float32


def test_score_of_known_translations():
    references = tf.constant(["la casa roja y el perro", "él sabe que no"])
    dataset = tf.data.Dataset.from_tensor_slices(({"text": ["a", "b"]}, references)).batch(1)
    data = runner.Data(None, 1, None, dataset, {})
    known = {b"a": "la casa roja y el perro", b"b": "él sabe que no"}
    perfect = translation.score(lambda text: {"translation": np.array([known[text.numpy()[0]].encode()])}, data)
    assert perfect == {"bleu": pytest.approx(100), "chrf": pytest.approx(100), "total": 2}
    known[b"b"] = "él sabe"
    # By hand: 8 of 8 words right, 6 of 6 pairs, 4 of 4 triples, 3 of 3 fours; e^(1 - 10/8) for being short.
    short = translation.score(lambda text: {"translation": np.array([known[text.numpy()[0]].encode()])}, data)
    assert short["bleu"] == pytest.approx(100 * np.exp(1 - 10 / 8))
    line = translation.describe(short)
    assert line.startswith("Test BLEU: 77.88 (nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.")
    assert "| chrF: " in line
    assert "(nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2." in line


def test_tables_and_files(learned, answer, tmp_path):
    model, data, _ = learned
    shown = translation.show(model, data)["translations"].splitlines()
    assert shown[0] == "| source | reference | translation |"
    assert len(shown) == 2 + 8
    call = runner.answering(translation.TASK, model, data)
    table = translation.conclude(call, data, tmp_path)["test_translations"]
    examples = [path.read_text(encoding="utf-8").strip() for path in tmp_path.glob("*.txt")]
    assert len(examples) == 8
    assert all(f"| {text} |" in table for text in examples)


# Data


def test_parts_of_a_set(folder, capsys):
    data = load(folder, "--batch_size=32")
    assert "2 of 1,000 training pairs are left out: empty, or longer than 127 pieces" in capsys.readouterr().out
    *vocabularies, known = data.resources
    sizes = [vocabulary.size for vocabulary in vocabularies]
    assert data.about == {"source": "en", "target": "es", "beam_size": 4, "vocabulary_sizes": sizes}
    assert (known.translations.shape[0], known.size) == tuple(sizes)
    assert sizes[0] != sizes[1]
    assert data.steps_per_epoch == 998 // 32
    house, casa = (
        vocabulary.encode([word])[0][0] for vocabulary, word in zip(vocabularies, (b"house", b"casa"), strict=True)
    )
    assert known.translations[house, 0] == casa
    assert known.probabilities[house, 0] > 0.9
    for epoch in (0, 1):
        batches = list(data.train(epoch).as_numpy_iterator())
        assert len(batches) == data.steps_per_epoch
        for inputs, next_ids in batches:
            assert {array.dtype for array in (*inputs.values(), next_ids)} == {np.dtype("int32")}
            assert inputs["target_ids"].shape == next_ids.shape
            assert len(next_ids) == 32
            np.testing.assert_array_equal(inputs["target_ids"][:, 0], pieces.START)
            for source, target, following in zip(*inputs.values(), next_ids, strict=True):
                length = np.count_nonzero(target)  # of PAD there are no more behind
                assert source[np.count_nonzero(source) - 1] == following[length - 1] == pieces.END
                np.testing.assert_array_equal(following[: length - 1], target[1:length])
            english, spanish = (
                vocabulary.detokenize(tf.RaggedTensor.from_tensor(token_ids)).numpy()
                for vocabulary, token_ids in zip(vocabularies, inputs.values(), strict=True)
            )
            for text, translated in zip(english, spanish, strict=True):
                assert translated.decode() == " ".join(WORDS[word] for word in text.decode().split())
    assert sum(len(next_ids) for _, next_ids in data.validation.as_numpy_iterator()) == 20
    tests = [(inputs["text"], references) for inputs, references in data.test.as_numpy_iterator()]
    lengths = [len(text) for text in tests[0][0]]
    assert len(lengths) == 30
    assert lengths[15:] + lengths[:15] == sorted(lengths)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--target=en"], ("es", "en")),
        (["--source=es"], ("es", "en")),
        (["--source=en"], ("en", "es")),
        (["--dataset=tiny_triples", "--source=pt-br", "--target=es"], ("pt-br", "es")),
    ],
)
def test_directions(folder, flags, expected):
    about = load(folder, *flags).about
    assert (about["source"], about["target"]) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source=de"], "--source=de: tiny_pairs has the languages en, es"),
        (["--source=en", "--target=en"], "--source and --target are both en"),
        (["--target=reference"], "--target=reference: tiny_pairs has the languages en, es"),
        (["--dataset=tiny_triples", "--source=en"], "--target is missing: tiny_triples has 3 languages, en, es, pt-br"),
        (["--dataset=tiny_alone"], r"the features en \(Text\), reference \(Text\); machine translation needs"),
        (["--dataset=mnist_5k"], "mnist_5k has the features .*machine translation needs texts"),
        (["--width=48"], "--width=48 must be a multiple of 32"),
        (["--batch_size=999"], "--batch_size=999 is more than the 998 training"),
    ],
)
def test_what_cannot_work_is_refused(folder, flags, message):
    with pytest.raises(runner.AppError, match=message):
        load(folder, *flags)
