"""Tokens of the graph against sentencepiece's own, for texts of every kind, and vocabularies made to tie."""

import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from apps.text import pieces

ROOT = Path(__file__).parents[3]
SENTENCES = [
    "El perro de San Roque no tiene rabo, porque Ramón Ramírez se lo ha robado; ¿quién lo diría?",
    "La lluvia en Sevilla es una maravilla, y mañana lloverá también en los pueblos de la montaña.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich, während die Straßenbahn fährt.",
    "Die Donaudampfschifffahrtsgesellschaft fährt täglich, außer an Sonn- und Feiertagen.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю; поезд отправляется в шесть часов.",
    "Каждая несчастливая семья несчастлива по-своему, но счастливые семьи похожи друг на друга.",
]
HAZARDS = {
    "empty": "",
    "spaces only": "  \t \u3000\u00a0 ",
    "one character": "a",
    "one space": " ",
    "a capital": "A",
    "NUL": "a\x00b\x00",
    "controls": "\x1b[31mred\x1b[0m\x07\x7f\x85",
    "tabs and lines": "a\tb\r\nc\u2028d\u2029e\x0bf",
    "zero width": "a\u200bb\u200cc\u200dd\u2060e\ufefff\u00adg",
    "byte order mark": "\ufeffthe",
    "not characters": "\ufffe\uffff\U0010ffff",
    "emoji": "👩‍👩‍👧‍👦 👍🏽 🇩🇪🇲🇽 1️⃣ ❤️",
    "Arabic": "السلام عليكم ورحمة الله، ١٢٣",
    "Chinese": "我能吞下玻璃而不伤身体。今天天气很好。",
    "Hebrew with points": "בְּרֵאשִׁית בָּרָא אֱלֹהִים",
    "combining accents": "e\u0301 a\u0308o\u0323\u0302 Z" + "\u0300" * 90,
    "composed or not": "é e\u0301 ﬁ ½ Å Å",
    "not UTF-8": b"caf\xe9 \xff\xfe \xf0\x9f\x98 \xc0\xaf \xed\xa0\x80",
    "half a surrogate pair": "a\ud83db",
    "names of control pieces": "<s> </s> <unk> <pad>",
    "names of byte pieces": "<0x41><0x00> <0xFF>",
    "sentencepiece's space": "\u2581the\u2581 \u2581 \u2581\u2581",
    "what stands for unknown": "\u2047 \u2585 \ufffd",
    "a word of 64": "x" * 64,
    "a word of 65": "x" * 65,
    "a word of 10,000": "the" * 3333 + "y",
    "10,000 rare letters": "ж漢" * 5000,
    "many words": " ".join(f"{index} the" for index in range(5000)),
    "a backslash": r"\1 \0 \\ [^ ]{64}",
}


def lines_of_the_project() -> list[str]:
    return [line for name in ("README.md", "RESULTS.md") for line in (ROOT / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return lines_of_the_project() + SENTENCES


@pytest.fixture(scope="module", params=[False, True], ids=["as_it_is", "lowercase"])
def vocabulary(request, lines) -> pieces.Vocabulary:
    return pieces.train(lines, 1500, request.param)


_traced = {}


def in_graph(vocabulary, texts) -> tf.RaggedTensor:
    """`tokenize` as an export runs it."""
    if id(vocabulary) not in _traced:
        spec = tf.TensorSpec([None], tf.string)
        _traced[id(vocabulary)] = tf.function(vocabulary.tokenize, autograph=False, input_signature=[spec])
    return _traced[id(vocabulary)](as_bytes(texts))


def eager(vocabulary, texts) -> tf.RaggedTensor:
    return vocabulary.tokenize(as_bytes(texts))


def as_bytes(texts) -> tf.Tensor:
    texts = [text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text for text in texts]
    return tf.constant(texts, tf.string, [len(texts)])


def lists(rows) -> list[list[int]]:
    return [np.asarray(row).tolist() for row in rows]


def by_sentencepiece(vocabulary, texts) -> list[list[int]]:
    """Whole texts at once, as everybody calls it."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.model)
    return [processor.encode(text.decode()) for text in vocabulary.normalize(as_bytes(texts)).numpy()]


def check(vocabulary, texts, run=in_graph) -> None:
    """Everything that holds for all texts."""
    token_ids = run(vocabulary, texts)
    assert token_ids.dtype == tf.int32
    assert token_ids.row_splits.dtype == tf.int64
    assert token_ids.to_list() == lists(vocabulary.encode(texts))
    assert not {pieces.PAD, pieces.UNKNOWN, pieces.START, pieces.END} & set(token_ids.values.numpy().tolist())
    np.testing.assert_array_equal(vocabulary.detokenize(token_ids), vocabulary.normalize(as_bytes(texts)))


def test_real_texts(vocabulary, lines):
    check(vocabulary, lines)
    encoded = vocabulary.encode(lines)
    assert {row.dtype for row in encoded} == {np.dtype("int32")}
    # A whole text's sums round otherwise than a word's: where two spellings are as good, the other one may come out.
    parsed = sentencepiece_model_pb2.ModelProto.FromString(vocabulary.model).pieces
    wholes = by_sentencepiece(vocabulary, lines)
    ties = [pair for pair in zip(lists(encoded), wholes, strict=True) if pair[0] != pair[1]]
    assert len(ties) < 0.005 * len(lines)
    for pair in ties:
        by_words, whole = (sum(parsed[index].score for index in row) for row in pair)
        assert by_words == pytest.approx(whole, abs=1e-4)
    assert 1000 < vocabulary.size <= 1500
    assert max(row.max() for row in encoded if len(row)) < vocabulary.size
    # A text is fewer tokens than characters by far, or these aren't sub-words.
    assert sum(map(len, encoded)) < 0.45 * sum(map(len, lines))


@pytest.mark.parametrize("name", HAZARDS)
def test_hazards(vocabulary, name):
    check(vocabulary, [HAZARDS[name]])


def test_hazards_by_sentencepiece_at_once(vocabulary):
    # Not the longest: there a sum over the text is too coarse to tell some spellings of a word apart.
    texts = [text for name, text in HAZARDS.items() if name != "many words"]
    assert lists(vocabulary.encode(texts)) == by_sentencepiece(vocabulary, texts)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.text() | st.binary() | st.text("ab éж\u2581\u0301Σ\n", max_size=90), max_size=4))
def test_every_text(vocabulary, texts):
    check(vocabulary, texts)


def test_a_batch_is_its_texts_one_by_one(vocabulary, lines):
    texts = [*HAZARDS.values(), *lines[:50]]
    together = in_graph(vocabulary, texts).to_list()
    assert together == [in_graph(vocabulary, [text]).to_list()[0] for text in texts]
    assert together == eager(vocabulary, texts).to_list()


def test_no_text(vocabulary):
    check(vocabulary, [])
    assert in_graph(vocabulary, []).shape.as_list() == [0, None]
    assert vocabulary.tokenize(tf.constant("the")).to_list() == lists(vocabulary.encode(["the"]))


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  a \t\n b ", "a b"),
        ("a\x00\x1bb\u3000\u00a0\u2028c\x85", "a b c"),
        ("a\u200bb", "a\u200bb"),  # no space: some scripts need it
        ("\u2581a \u2581", "_a _"),
        (b"\xffa\xe9", "\ufffda\ufffd"),
        ("x" * 64, "x" * 64),
        ("x" * 64 + " y", "x" * 64 + " y"),
        ("x" * 130, "x" * 64 + " " + "x" * 64 + " xx"),
        ("é" * 65 + " a", "é" * 64 + " é a"),
        ("Straße ÑÉ", "Straße ÑÉ"),
    ],
)
def test_normalization_by_hand(vocabulary, text, normal):
    expected = normal.lower() if vocabulary.lowercase else normal
    assert vocabulary.normalize(as_bytes([text])).numpy()[0].decode() == expected
    assert vocabulary.normalize(as_bytes([text])[0]).numpy().decode() == expected  # any shape


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text("ab \t\x00\u2003\u2581", max_size=200))
def test_normalization_by_another(text):
    def is_space(character):
        return unicodedata.category(character) in ("Zs", "Zl", "Zp", "Cc")

    words = "".join(" " if is_space(character) else character for character in text).replace("\u2581", "_").split(" ")
    words = [word[start : start + 64] for word in words for start in range(0, len(word), 64)]
    assert SMALL.normalize(as_bytes([text])).numpy()[0].decode() == " ".join(words)


def test_lowercase_makes_capitals_small(lines):
    vocabulary = pieces.train(lines, 800, lowercase=True)
    one, other = vocabulary.encode(["ÀÇÑ ДОМ Straße THE", "àçñ дом straße the"])
    assert one.tolist() == other.tolist()
    assert vocabulary.lowercase


def model_of(scores: dict[str, float], **fields) -> bytes:
    """A model by hand: the control pieces, the bytes, and `scores`; `fields` of the trainer differ."""
    model = sentencepiece_model_pb2.ModelProto()
    kind = model.SentencePiece
    for name, what in (("<pad>", kind.CONTROL), ("<unk>", kind.UNKNOWN), ("<s>", kind.CONTROL), ("</s>", kind.CONTROL)):
        model.pieces.add(piece=name, type=what)
    for value in range(256):
        model.pieces.add(piece=f"<0x{value:02X}>", type=kind.BYTE)
    for piece, score in scores.items():
        model.pieces.add(piece=piece, score=score, type=kind.NORMAL)
    model.normalizer_spec.name = "identity"
    settings_ = {"model_type": 1, "byte_fallback": True, "pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3} | fields
    for name, value in settings_.items():
        setattr(model.trainer_spec, name, value)
    return model.SerializeToString()


SMALL = pieces.Vocabulary(model_of({"\u2581": -1.0, "a": -2.0}), False)


def spelled(scores: dict[str, float], word: str) -> list[str]:
    """The pieces of one word, after a check against sentencepiece."""
    vocabulary = pieces.Vocabulary(model_of(scores), False)
    check(vocabulary, [word], eager)
    names = ["<pad>", "<unk>", "<s>", "</s>", *(f"<{value:02X}>" for value in range(256)), *scores]
    return [names[index] for index in vocabulary.tokenize(tf.constant([word])).to_list()[0]]


def test_the_best_spelling_by_hand():
    scores = {"\u2581": -1.0, "a": -1.0, "b": -1.0, "\u2581a": -1.5, "ab": -1.6}
    assert spelled(scores, "ab") == ["\u2581a", "b"]  # -2.5; -2.6 with ab, -3 in letters
    assert spelled(scores | {"\u2581a": -1.7}, "ab") == ["\u2581", "ab"]
    assert spelled(scores | {"\u2581a": -2.5, "ab": -2.5}, "ab") == ["\u2581", "a", "b"]


def test_of_equals_the_longest_last_piece():
    scores = {"\u2581": -1.0, "a": -1.0, "b": -1.0, "\u2581a": -2.0, "ab": -2.0}
    assert spelled(scores, "ab") == ["\u2581", "ab"]
    assert spelled(scores | {"\u2581ab": -3.0}, "ab") == ["\u2581ab"]


@pytest.mark.parametrize(("score", "spelling"), [(-9.5, ["x", "ab"]), (-10.5, ["xa", "<62>"])])
def test_an_unknown_letter_is_ten_worse_than_the_worst_piece(score, spelling):
    # b alone is no piece: as bytes it counts -20 - 10, after xa. As a part of ab, -20 and x.
    scores = {"\u2581": 0.0, "xa": 0.0, "x": score, "ab": -20.0}
    assert spelled(scores, "xab") == ["\u2581", *spelling]


def test_unknown_letters_are_spelled_in_bytes():
    scores = {"\u2581a": -1.0}
    assert spelled(scores, "a\u00e9b") == ["\u2581a", "<C3>", "<A9>", "<62>"]
    assert spelled(scores, "\U0001f600") == ["<E2>", "<96>", "<81>", "<F0>", "<9F>", "<98>", "<80>"]


@settings(max_examples=40, deadline=None)
@given(
    scores=st.dictionaries(st.from_regex(r"\A(\u2581|\u2581?[abé]{1,4})\Z"), st.integers(-12, 0), min_size=1),
    far=st.sampled_from([0, 64, 256]),
    words=st.lists(st.text("abéж", min_size=1, max_size=12), max_size=40),
)
def test_spellings_that_tie(scores, far, words):
    """Sums of small whole numbers are often equal, so the order of candidates decides; fractions of a bit round."""
    unit = far * 2.0**-25 or 1
    scores = {piece: score * unit - far * piece.startswith("\u2581") for piece, score in scores.items()}
    vocabulary = pieces.Vocabulary(model_of(scores), False)
    check(vocabulary, words, eager)
    assert lists(vocabulary.encode(words)) == by_sentencepiece(vocabulary, words)


def test_sums_are_float32():
    # The last bit of 256 is worth 2**-15. -256 - 1.5 of it rounds to -256 - 2: equal, and the longest wins.
    unit = 2.0**-15
    assert spelled({"\u2581": -256.0, "a": -1.5 * unit, "\u2581a": -256 - 2 * unit}, "a") == ["\u2581a"]
    assert spelled({"\u2581": -128.0, "a": -1.5 * unit, "\u2581a": -128 - 2 * unit}, "a") == ["\u2581", "a"]


def test_detokenize_drops_control_pieces_and_mends_bytes(vocabulary):
    (the,) = lists(vocabulary.encode(["the"]))
    rows = [
        [pieces.START, *the, pieces.END, pieces.PAD, pieces.PAD],
        [*the, 4 + 0xC3, *the],  # half an é
        [pieces.START, pieces.END],
        [],
        [4 + 0xF0, 4 + 0x9F, 4 + 0x98, 4 + 0x80],
    ]
    texts = vocabulary.detokenize(tf.ragged.constant(rows, tf.int32)).numpy()
    assert [text.decode() for text in texts] == ["the", "the\ufffd the", "", "", "\U0001f600"]
    wide = vocabulary.detokenize(tf.ragged.constant(rows, tf.int64))
    np.testing.assert_array_equal(wide, texts)
    processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.model)
    assert processor.decode(rows[0]) == "the"


def test_training_is_deterministic(lines):
    one, other = pieces.train(lines, 1000), pieces.train(iter(lines), 1000)
    assert one.model == other.model
    assert pieces.train([line.encode() for line in lines], 1000).model == one.model
    assert pieces.train(lines[:200], 1000).model != one.model


def test_training_leaves_no_text_out():
    # Longer than sentencepiece takes by default; with its mark of rare characters.
    assert pieces.train(["hello world " * 2000], 300).size > 265
    assert pieces.train(["hello \u2585 world"] * 3, 300).size > 265


def test_few_texts_give_fewer_pieces():
    vocabulary = pieces.train(["a b a"], 5000)
    assert 260 < vocabulary.size < 270
    check(vocabulary, ["a b", "c", ""], eager)


@pytest.mark.parametrize(
    ("texts", "size", "says"),
    [
        ([], 1000, "nothing to learn"),
        (["", " \t", b"\x00"], 1000, "nothing to learn"),
        (["some text"], 260, "size is 260"),
        (["the quick brown fox jumps over the lazy dog"], 265, "can't learn 265 pieces.*265 vs"),
    ],
)
def test_training_refuses(texts, size, says):
    with pytest.raises(ValueError, match=says):
        pieces.train(texts, size)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (b"\xff\xff", "no serialized sentencepiece model"),
        (b"", "PAD"),
        (model_of({"a": -1.0}, model_type=2), "model_type"),
        (model_of({"a": -1.0}, pad_id=-1), "PAD"),
        (model_of({}), "normal pieces"),
        (model_of({"a\u2581b": -1.0}), "space"),
        (model_of({"a": -501.0}), "scores"),
        (model_of({"a": 0.5}), "scores"),
    ],
)
def test_models_of_others_are_refused(model, says):
    with pytest.raises(ValueError, match=says):
        pieces.Vocabulary(model, False)


def test_a_vocabulary_is_its_model(vocabulary, lines):
    again = pieces.Vocabulary(vocabulary.model, vocabulary.lowercase)
    assert lists(again.encode(lines)) == lists(vocabulary.encode(lines))
    assert again.size == vocabulary.size


SERVE = """
import json, sys
import tensorflow as tf
loaded = tf.saved_model.load(sys.argv[1])
with open(sys.argv[2], "rb") as file:
    texts = [bytes.fromhex(line) for line in json.load(file)]
outputs = loaded.signatures["serving_default"](texts=tf.constant(texts))
empty = loaded.signatures["serving_default"](texts=tf.constant([], tf.string))
print(json.dumps({
    "values": outputs["values"].numpy().tolist(), "splits": outputs["splits"].numpy().tolist(),
    "back": [text.hex() for text in outputs["back"].numpy()], "empty": empty["splits"].numpy().tolist(),
    "others": [name for name in sys.modules if name.startswith(("tensorflow_text", "sentencepiece", "apps"))],
}))
"""


def test_a_saved_model_needs_nothing_but_tensorflow(lines, tmp_path):
    vocabulary = pieces.train(lines, 1500, lowercase=True)

    class Served(tf.Module):
        def __init__(self):
            super().__init__()
            self.vocabulary = vocabulary

        @tf.function(autograph=False, input_signature=[tf.TensorSpec([None], tf.string, "texts")])
        def serve(self, texts):
            token_ids = self.vocabulary.tokenize(texts)
            back = self.vocabulary.detokenize(token_ids)
            return {"values": token_ids.values, "splits": token_ids.row_splits, "back": back}

    served = Served()
    tf.saved_model.save(served, tmp_path / "model", signatures={"serving_default": served.serve})
    texts = [*lines, *HAZARDS.values()]
    (tmp_path / "texts.json").write_text(json.dumps([text.hex() for text in as_bytes(texts).numpy()]))
    command = [sys.executable, "-c", SERVE, tmp_path / "model", tmp_path / "texts.json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["others"] == []
    encoded = vocabulary.encode(texts)
    assert answer["values"] == np.concatenate(encoded).tolist()
    assert answer["splits"] == [0, *np.cumsum([len(row) for row in encoded]).tolist()]
    assert [bytes.fromhex(text) for text in answer["back"]] == vocabulary.normalize(as_bytes(texts)).numpy().tolist()
    assert answer["empty"] == [0]
