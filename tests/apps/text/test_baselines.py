"""What text tasks must beat: alignment, phrases and search by hand, linear models on data made for them, programs."""

import itertools
import re
import types

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import flags

from apps import runner, scores
from apps.text import lexicon, pieces, sentiment, translation
from benchmarks import decoding, phrase_table, text_baseline
from tests.conftest import options_for, run_module
from tfhalf import datasets

GERMAN = ["das Haus", "das Buch", "ein Buch", "ein Haus"]
ENGLISH = ["the house", "the book", "a book", "a house"]


# Words


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", []),
        ("Don't stop, now.", ["Don't", "stop", "￭,", "now", "￭."]),
        ("«¿Qué?» (a)", ["«", "￭¿￭", "Qué", "￭?", "￭»", "(￭", "a", "￭)"]),
        ("one--two - 3.5", ["one", "￭-", "￭-￭", "two", "-", "3", "￭.￭", "5"]),
    ],
)
def test_words_and_marks(text, tokens):
    assert phrase_table.tokenize(text) == tokens
    assert phrase_table.detokenize(tokens) == text


# Alignment


def numbered(lines):
    numbers = {}
    return phrase_table.number([line.lower().split() for line in lines], numbers), ["", *numbers]


def test_alignment_of_the_textbook():
    (source, _), (target, _) = numbered(GERMAN), numbered(ENGLISH)
    points = phrase_table.align(source, target)
    assert set(zip(*(side.tolist() for side in points), strict=True)) == {(p, p) for p in (1, 2, 4, 5, 7, 8, 10, 11)}


def test_alignment_grows_by_neighbours():
    # Both have (1, 1), (2, 2) and (4, 4). (3, 3), which one has, touches the second; (6, 6) touches nothing.
    to_source = np.array([-1, 1, 2, 3, 4, -1, 6])
    to_target = np.array([-1, 1, 2, -1, 4, -1, -1])
    points = phrase_table.grow_diag(to_source, to_target)
    assert sorted(zip(*(side.tolist() for side in points), strict=True)) == [(1, 1), (2, 2), (3, 3), (4, 4)]
    to_source[2] = 1  # (1, 2) instead of (2, 2)
    points = phrase_table.grow_diag(to_source, np.array([-1, 1, -1, -1, 4, -1, -1]))
    assert sorted(zip(*(side.tolist() for side in points), strict=True)) == [(1, 1), (1, 2), (3, 3), (4, 4)]


# Phrases

# Koehn 2010, "Statistical machine translation", figures 4.13 and 5.3; ids of words are 1, 2, ...
MICHAEL = ["michael", "geht", "davon", "aus", ",", "dass", "er", "im", "haus", "bleibt"]
HE_STAYS = ["michael", "assumes", "that", "he", "will", "stay", "in", "the", "house"]
POINTS = [(1, 1), (2, 2), (3, 2), (4, 2), (6, 3), (7, 4), (8, 7), (8, 8), (9, 9), (10, 5), (10, 6)]
PHRASES = {
    "michael": ["michael"],
    "michael geht davon aus": ["michael assumes"],
    "geht davon aus": ["assumes"],
    "geht davon aus ,": ["assumes"],
    "dass": ["that"],
    ", dass": ["that"],
    "dass er": ["that he"],
    ", dass er": ["that he"],
    "er": ["he"],
    "im": ["in the"],
    "im haus": ["in the house"],
    "haus": ["house"],
    "bleibt": ["will stay"],
}


def words_of(sentences) -> np.ndarray:
    return phrase_table.number(sentences, {}).words


def test_phrases_of_the_textbook():
    sources, targets = np.array(POINTS).T
    found = phrase_table.extract(sources, targets, words_of([MICHAEL]), words_of([HE_STAYS]))
    spelled = [
        (" ".join(MICHAEL[source - 1 : source - 1 + wide]), " ".join(HE_STAYS[target - 1 : target - 1 + long]))
        for source, wide, target, long in found
    ]
    assert sorted(spelled) == sorted((source, target) for source in PHRASES for target in PHRASES[source])


def test_phrases_agree_with_the_definition():
    random = np.random.default_rng(1)
    lengths = random.integers(1, 8, [30, 2])
    sides = [words_of([["w"] * length for length in column]) for column in lengths.T]
    starts = np.stack([np.cumsum(column + 1) - column for column in lengths.T], axis=1)
    points, expected = set(), set()
    for (first, other), (wide, long) in zip(starts.tolist(), lengths.tolist(), strict=True):
        cells = list(itertools.product(range(first, first + wide), range(other, other + long)))
        mine = {cell for cell in cells if random.random() < 1 / max(wide, long)}
        points |= mine
        for (i, j), height, width in itertools.product(cells, range(1, 5), range(1, 5)):
            rows, columns = range(i, i + height), range(j, j + width)
            if rows[-1] >= first + wide or columns[-1] >= other + long:
                continue
            inside = [(row in rows) + (column in columns) for row, column in mine]
            if 2 in inside and 1 not in inside:
                expected.add((i, height, j, width))
    sources, targets = np.array(sorted(points)).T
    found = [tuple(row) for row in phrase_table.extract(sources, targets, *sides).tolist()]
    assert len(found) == len(set(found)) > 100
    assert set(found) == expected


def test_lexical_weights_by_hand():
    # "a b" / "x y z": a is aligned with x and y, z with nothing; "a" / "x".
    source, target = np.array([0, 1, 2, 0, 1, 0]), np.array([0, 1, 2, 3, 0, 1, 0])
    sources, targets = np.array([1, 1, 4]), np.array([1, 2, 5])
    weights = np.exp(phrase_table.lexical_weights(sources, targets, source, target))
    # Given x it is a twice of twice, given y once of once; b alone is what is given nothing.
    np.testing.assert_allclose(weights, [1, 1, 1, 1, 1, 1])
    weights = np.exp(phrase_table.lexical_weights(targets, sources, target, source))
    # Given a it is x twice of three times, y once.
    np.testing.assert_allclose(weights, [1, 2 / 3, 1 / 3, 1, 1, 2 / 3, 1])


def test_runs_have_numbers():
    ngrams = phrase_table.Ngrams(np.array([0, 1, 2, 1, 2, 0, 3, 1, 0]), 4)
    runs = ngrams(np.array([1, 2, 1, 4, 3, 2, 0]))
    shorter = ngrams(np.array([0, 1, 2, 1, 0]))
    np.testing.assert_array_equal(runs[:3, 0], shorter[:3, 1])
    assert [(row >= 0).tolist() for row in runs] == [
        [True, True, True, False, True, True, False],
        [True, True, False, False, False, False, False],
        [True, False, False, False, False, False, False],
        [False] * 7,
    ]
    known = runs[runs >= 0]
    assert len(np.unique(known)) == 3 + 2 + 1


def test_bigrams_are_probabilities():
    words = np.array([0, 1, 2, 0, 1, 3, 0])
    model = phrase_table.Bigrams(words, 6)
    for before in range(6):
        assert sum(np.exp(model(before, after)) for after in range(6)) == pytest.approx(1)
    # Two of two begin with 1; of 5 different pairs one ends in it, and each of 6 words counts once more.
    assert np.exp(model(0, 1)) == pytest.approx((2 - 0.75) / 2 + 0.75 * 1 / 2 * 2 / 11)
    assert np.exp(model(5, 1)) == pytest.approx(2 / 11)


# Translation


def test_translator_knows_phrases_and_copies_the_rest():
    translate = phrase_table.Translator([*GERMAN, ""], [*ENGLISH, "nothing"])
    assert translate("Ein Haus, das Buch") == "a house, the book"
    assert translate("das Haus Xanadu") == "the house Xanadu"
    assert translate("") == ""
    translate = phrase_table.Translator(["er geht", "sie geht heim"], ["he goes", "she goes home"])
    assert translate("sie geht") == "she goes"


def test_search_finds_the_best_way():
    translator = phrase_table.Translator(
        ["a b c", "a b", "c a", "b c a", "b b"], ["x y z", "y x", "z x", "y z w", "y v"]
    )
    model, options = translator._model, translator._options

    def value(way):  # of all options in a row
        last, total = 0, 0.0
        for option in way:
            total, last = total + option.score + 0.5 * model(last, option.first), option.last
        return total + 0.5 * model(last, 0)

    text = "a b c a"
    runs = translator._ngrams(np.array([translator._source_numbers[word] for word in text.split()] + [0]))
    best = -np.inf
    for cuts in itertools.chain.from_iterable(itertools.combinations((1, 2, 3), num) for num in range(4)):
        parts = itertools.pairwise([0, *cuts, 4])
        ways = itertools.product(*(options(int(runs[end - start - 1, start])) for start, end in parts))
        best = max([best, *map(value, ways)])
    beams_seen = []
    extend = translator._extend

    class Watched(phrase_table.Translator):
        def __init__(self):
            self.__dict__ |= translator.__dict__

        def _extend(self, beam, ways, options, following):
            extend(beam, ways, options, following)
            beams_seen.append(following)

    Watched()(text)
    found = max(path[0] + 0.5 * model(last, 0) for last, path in beams_seen[-1].items())
    assert found == pytest.approx(best)


def test_nothing_to_learn_from():
    with pytest.raises(runner.AppError, match="no training pair is left"):
        phrase_table.Translator(["", "a " * 100], ["a", "b"])


def test_copy_scores():
    line = translation.in_words(
        translation.compare(["la casa roja y el perro", "no"], ["la casa roja y el perro", "no"])
    )
    assert line.startswith("BLEU: 100.00 (nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.")
    assert "| chrF: 100.00 (nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2." in line


# Linear models


class TinyRatedWords(tfds.core.GeneratorBasedBuilder):
    """A word tells the class and the rating, in the test part too."""

    VERSION = tfds.core.Version("1.0.0")
    sizes = types.MappingProxyType({"train": 60, "test": 20})
    kinds = types.MappingProxyType(
        {
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["negative", "positive"]),
            "rating": tfds.features.Scalar(np.float32),
        }
    )

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(dict(self.kinds)))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split, num) for split, num in self.sizes.items()}

    def _generate_examples(self, split, num):
        for index in range(num):
            rating = (index * 7) % 5 - 2
            word = ["awful", "weak", "plain", "nice", "grand"][rating + 2]
            example = {"text": f"a {word} film, number{index} {split}", "rating": rating}
            example |= {"label": -1 if rating == 0 else int(rating > 0)}
            yield index, {name: example[name] for name in self.kinds}


class TinyPartedWords(TinyRatedWords):
    """It has a validation part, and no ratings."""

    sizes = types.MappingProxyType({"train": 40, "validation": 10, "test": 10})
    kinds = types.MappingProxyType({name: TinyRatedWords.kinds[name] for name in ("text", "label")})


class TinyUnsortedWords(TinyRatedWords):
    """No class."""

    kinds = types.MappingProxyType({name: TinyRatedWords.kinds[name] for name in ("text", "rating")})


class TinyWordPairs(TinyRatedWords):
    """Two languages."""

    kinds = types.MappingProxyType({"en": tfds.features.Text(), "es": tfds.features.Text()})

    def _generate_examples(self, split, num):
        words = dict(zip(["the", "dog", "cat", "sees", "knows"], ["el", "perro", "gato", "ve", "conoce"], strict=True))
        random = np.random.default_rng(num)
        for index in range(num):
            chosen = random.choice(list(words), 6)
            yield index, {"en": " ".join(chosen) + ".", "es": " ".join(words[word] for word in chosen) + "."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("data"))


def values_for(folder: str, dataset: str) -> flags.FlagValues:
    values = flags.FlagValues()
    for name in ("dataset", "data_dir", "source", "target"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    values(["test", f"--dataset={dataset}", f"--data_dir={folder}"])
    return values


@pytest.mark.parametrize(("dataset", "num_train"), [("tiny_rated_words", 48), ("tiny_parted_words", 32)])
def test_parts_that_are_learned_from(folder, dataset, num_train):
    builder = datasets.prepare(dataset, folder)
    train, test = text_baseline.read_parts(values_for(folder, dataset), builder, "text", "label")
    assert len(train[0]) == len(train[1]) == num_train  # a fifth has no label
    assert {int(re.search(rb"number(\d+)", text)[1]) for text in train[0]} == {
        index for index in range(num_train * 5 // 4) if (index * 7) % 5 != 2
    }
    assert all(text.endswith(b"test") for text in test[0])


def test_linear_models_on_words_that_tell(folder, capsys):
    text_baseline._run(values_for(folder, "tiny_rated_words"))
    lines = capsys.readouterr().out.splitlines()[-6:]
    lines = [line for line in lines if not line.endswith("left out")]
    expected = [f"tiny_rated_words, {model}" for model in ("LinearSVC", "ridge regression")]
    expected = [f"{start}, {name}" for start in expected for name in ("words", "words and pairs")]
    assert [line.split(":")[0] for line in lines if "Accuracy" in line] == expected
    assert all("Accuracy: 100.00% (16/16) | Macro-F1: 100.00%" in line for line in lines)
    assert min(float(re.search(r"r: ([\d.]+) \| Mean", line)[1]) for line in lines[2:]) > 0.8


def test_scores_by_hand():
    labels, predictions = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 3])
    # F1 of 0 is 2/3, of 1 too, of 2 it is 0; nothing is 3.
    line = scores.in_words(scores.count(labels, predictions))
    assert line == "Accuracy: 50.00% (2/4) | Macro-F1: 44.44%"
    line = sentiment.in_words(sentiment.compare(np.array([1.0, -2.0, 0.0]), np.array([0.5, 1.0, -1.5])))
    assert line.startswith("Accuracy: 50.00% (1/2) | Macro-F1: 33.33% | ")
    # Without their means 0 and -1/3: -1.5 / sqrt(3.5 * 42 / 9).
    assert line.endswith("Pearson's r: -0.3712 | Mean absolute error: 1.667")


def test_translation_program(folder, capsys):
    phrase_table._run(values_for(folder, "tiny_word_pairs"))
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split(": BLEU")[0] for line in lines] == [
        f"tiny_word_pairs, en-es, {part}, {name}"
        for part in ("validation", "test")
        for name in ("copy", "phrase table")
    ]
    scores = [float(re.search(r"BLEU: ([\d.]+) \(nrefs", line)[1]) for line in lines]
    assert max(scores[::2]) < 5
    assert min(scores[1::2]) > 95


@pytest.mark.parametrize(
    ("program", "dataset", "message"),
    [
        (text_baseline, "tiny_unsorted_words", r"the features text \(Text\), rating \(Scalar\); this baseline needs"),
        (text_baseline, "mnist_5k", "this baseline needs text"),
        (phrase_table, "tiny_rated_words", "machine translation needs texts"),
    ],
)
def test_other_sets_are_refused(folder, program, dataset, message):
    with pytest.raises(runner.AppError, match=message):
        program._run(values_for(folder, dataset))


def test_refusal_is_one_line():
    result = run_module("benchmarks.text_baseline", "--dataset=mnist_5k")
    assert result.returncode == 1
    assert re.search(r"^error: --dataset=mnist_5k has the features image \(Image\)", result.stderr, re.MULTILINE)
    assert "Traceback" not in result.stderr


# Speed of the searches


def test_decoder_over_all_tokens_is_the_model():
    options = options_for(translation.TASK, "--dtype_policy=float32", "--width=32", "--depth=1")
    random = np.random.default_rng(0)
    known = lexicon.Lexicon(random.integers(4, 20, [30, 3]), random.random([30, 3]), 20)
    data = runner.Data(None, 1, None, None, {"vocabulary_sizes": [30, 20]}, resources=(None, None, known))
    model = runner.build(translation.TASK, options, data)
    source_ids, target_ids = (random.integers(4, 20, shape).astype("int32") for shape in ([2, 5], [6, 4]))
    source_ids[1, 3:] = pieces.PAD
    encoded = model.get_layer("encoder_norm").output
    encoded = decoding.keras.Model(model.input["source_ids"], encoded)(source_ids)
    expected = model({"source_ids": np.repeat(source_ids, 3, axis=0), "target_ids": target_ids})
    step, state = decoding.whole(model, encoded, tf.constant(source_ids))
    state = tf.repeat(state, 3, axis=0)
    for index in range(4):
        log_probs, state = step(tf.constant(target_ids[:, index]), tf.constant(index), state)
        np.testing.assert_allclose(log_probs, tf.nn.log_softmax(expected[:, index]), atol=1e-5)


def test_searches_are_timed(folder, capsys):
    values = flags.FlagValues()
    names = runner.define_flags(translation.TASK, values)
    flags.DEFINE_multi_integer("length", None, "", flag_values=values)
    flags.DEFINE_integer("rounds", 2, "", flag_values=values)
    arguments = [f"--data_dir={folder}", "--dataset=tiny_word_pairs", "--dtype_policy=float32", "--batch_size=2"]
    values(["test", *arguments, "--vocabulary_size=300", "--width=32", "--depth=1", "--length=3", "--length=9"])
    decoding._run(values, names)
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [row[0].split() for row in rows] == [[name, length] for name in ("greedy", "beam") for length in ("3", "9")]
    for _, *numbers, same in rows:
        assert same == " 100.00%"
        assert all(float(value.split()[0]) > 0 for value in numbers)
