"""WordPiece in plain operations against KerasHub's BertTokenizer, for every character and texts of every kind."""

import itertools
import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from apps.text import wordpieces

ROOT = Path(__file__).parents[3]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LINES = [
    *(line for name in ("README.md", "RESULTS.md") for line in (ROOT / name).read_text().splitlines()),
    "El perro de San Roque no tiene rabo, porque Ramón Ramírez se lo ha robado; ¿quién lo diría?",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich, während die Straßenbahn fährt.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю; поезд отправляется в шесть часов.",
]
HAZARDS = {
    "empty": "",
    "spaces only": "  \t \n ",
    "one character": "a",
    "controls": "\x1b[31mred\x1b[0m\x07\x7f\x85",
    "tabs and lines": "a\tb\r\nc\u2028d\u2029e\x0bf",
    "other spaces": "a\u00a0b \u3000 c\u2003d",
    "zero width": "a\u200bb\u200cc\u200dd\u2060e\ufefff\u00adg\u034fh\ufe0f",
    "only invisible ones": "a \u034f \ufe0f b",
    "punctuation": "don't (stop)... at $5-10% of ~`^|<x>{y}[z]\\/ \u2014 \u201cso\u201d \u00bfno? \u00ab1\u00bb",
    "signs that become ASCII's": "a\u037eb c\u1fefd",
    "names of special pieces": "[UNK] [CLS] [SEP] [MASK] ##s ##",
    "emoji": "👩‍👩‍👧‍👦 👍🏽 🇩🇪🇲🇽 1️⃣ ❤️",
    "Arabic": "السلام عليكم ورحمة الله، ١٢٣ \ufefb",
    "Chinese": "我能吞下玻璃而不伤身体。ab今天c天气很好 \uf900 \U0002f800",
    "Japanese and Korean": "すし カタカナ ｶﾀｶﾅ が か\u3099 한국어 \u1112\u1161\u11ab",
    "Hebrew with points": "בְּרֵאשִׁית בָּרָא אֱלֹהִים",
    "Devanagari and Bengali": "नमस्ते \u0995\u09cb \u0995\u09c7\u09be \u0929 \u0928\u093c",
    "Vietnamese, composed or not": "Việt Nam Vie\u0323\u0302t Na\u0306\u0301m",
    "combining accents": "e\u0301 a\u0308o\u0323 E\u0301TE\u0301 \u0301 x\u0300\u0300",
    "compatible": "ﬁ ½ Å Å ² ⅷ ㎏ ﾊﾞ \uff46\uff55ll \u00a8 …",
    "capitals": "STRASSE Straße İstanbul ΣΊΣΥΦΟΣ ǅ ŉ Ὀδυσσεύς \u1e9e",
    "a word of 100 bytes": "x" * 100,
    "a word of 101 bytes": "x" * 101,
    "letters of two bytes": "é" * 50 + " " + "é" * 51,
    "a word of 10,000": "the" * 3333 + "y",
    "many words": " ".join(f"{index} the" for index in range(5000)),
    "a word that becomes longer": "\ufdfa" * 4,
}


def vocabulary() -> list[str]:
    """Pieces of the texts, and nearly all of Unicode: that nothing becomes [UNK] and hides what it was."""
    letters = [chr(code) for code in range(sys.maxunicode + 1)]
    letters = [letter for letter in letters if unicodedata.category(letter) not in ("Cc", "Cn", "Co", "Cs", "Zs")]
    # Most Chinese characters are alike, and many.
    letters = [letter for letter in letters if not ("\u3401" <= letter <= "\u9fff" or letter > "\U00020000")]
    words = {word for line in LINES for word in [*line.split(), *line.lower().split()] if len(word) > 1}
    words = sorted(word for word in words if word.isalpha())
    ends = [f"##{word[start:]}" for word in words for start in (1, len(word) // 2, -2)]
    return list(dict.fromkeys([*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words, *ends]))


VOCABULARY = vocabulary()
KINDS = [(False, False), (True, False), (False, True), (True, True)]


class Pair:
    """Ours and KerasHub's, both as a graph runs them."""

    def __init__(self, pieces: list[str], lowercase: bool, strip_accents: bool):
        self.ours = wordpieces.WordPieces(pieces, lowercase, strip_accents)
        theirs = keras_hub.tokenizers.BertTokenizer(pieces, lowercase=lowercase, strip_accents=strip_accents)
        spec = tf.TensorSpec([None], tf.string)
        self.in_graph = tf.function(self.ours.tokenize, autograph=False, input_signature=[spec])
        self.theirs = tf.function(lambda texts: theirs(texts), autograph=False, input_signature=[spec])

    def check(self, texts) -> tf.RaggedTensor:
        texts = as_bytes(texts)
        token_ids, expected = self.in_graph(texts), self.theirs(texts)
        assert token_ids.dtype == tf.int32
        assert token_ids.row_splits.dtype == tf.int64
        np.testing.assert_array_equal(token_ids.row_splits, expected.row_splits)
        np.testing.assert_array_equal(token_ids.values, expected.values)
        return token_ids


@pytest.fixture(scope="module", params=KINDS, ids=["as_it_is", "lowercase", "no_accents", "both"])
def pair(request) -> Pair:
    return Pair(VOCABULARY, *request.param)


def as_bytes(texts) -> tf.Tensor:
    texts = [text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text for text in texts]
    return tf.constant(texts, tf.string, [len(texts)])


def test_real_texts(pair):
    token_ids = pair.check(LINES)
    assert len(token_ids.values) > 5000
    encoded = pair.ours.encode(LINES)
    assert [row.tolist() for row in encoded] == token_ids.to_list()
    assert {row.dtype for row in encoded} == {np.dtype("int32")}
    assert pair.ours.size == len(VOCABULARY)


@pytest.mark.parametrize("name", HAZARDS)
def test_hazards(pair, name):
    pair.check([HAZARDS[name]])


def test_every_character(pair):
    codes = [code for code in range(1, sys.maxunicode + 1) if unicodedata.category(chr(code)) not in ("Cn", "Co", "Cs")]
    texts = [f"a{chr(code)}b {chr(code)}" for code in codes]
    for start in range(0, len(texts), 20_000):
        pair.check(texts[start : start + 20_000])


def test_a_batch_is_its_texts_one_by_one(pair):
    texts = [*(text for text in HAZARDS.values() if len(text) < 1000), *LINES[:30]]
    together = pair.in_graph(as_bytes(texts)).to_list()
    assert together == [pair.in_graph(as_bytes([text])).to_list()[0] for text in texts]
    assert together == pair.ours.tokenize(as_bytes(texts)).to_list()  # without a graph


def test_no_text(pair):
    pair.check([])
    assert pair.ours.encode([]) == []
    assert [row.tolist() for row in pair.ours.encode(["", "  "])] == [[], []]
    assert pair.ours.tokenize(tf.constant("a")).to_list() == pair.in_graph(as_bytes(["a"])).to_list()


LETTERS = st.characters(exclude_categories=("Cn", "Co", "Cs"), exclude_characters="\x00")


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.text(LETTERS) | st.text("ab é\u0301ж가\u11a8ﬁ½.#\u00a0\u00ad我", max_size=120), max_size=4))
def test_every_text(pair, texts):
    for text in texts:  # see the module: accents of one letter in an order that isn't Unicode's
        marks = [unicodedata.combining(letter) for letter in unicodedata.normalize("NFKD", text)]
        assume(not any(one and other for one, other in itertools.pairwise(marks)))
    pair.check(texts)


@settings(max_examples=30, deadline=None)
@given(
    pieces=st.sets(st.from_regex(r"\A(##)?[ab]{1,4}\Z")),
    words=st.lists(st.text("abc", min_size=1, max_size=12), max_size=20),
)
def test_the_longest_piece_first(pieces, words):
    """By a loop over one word."""
    names = [*SPECIAL, *sorted(pieces)]
    expected = []
    for word in words:
        found, start = [], 0
        while start < len(word):
            ends = [end for end in range(len(word), start, -1) if "##" * (start > 0) + word[start:end] in pieces]
            if not ends:
                found = ["[UNK]"]
                break
            found.append("##" * (start > 0) + word[start : ends[0]])
            start = ends[0]
        expected.append([names.index(piece) for piece in found])
    assert wordpieces.WordPieces(names, False, False).tokenize(as_bytes(words)).to_list() == expected


def test_where_it_differs():
    ours = wordpieces.WordPieces([*SPECIAL, "a", "b", "##b", "\ufffd", "##\ufffd", "##\u0302", "ậ"], True, False)

    def pieces(text):
        return ours.encode([text])[0].tolist()

    assert pieces(b"a\xff b\xe9") == [5, 9, 6, 9]
    assert pieces("a\x00b") == [5, 6]
    assert pieces("a\ud83db") == [5, 9, 9, 9, 7]
    assert pieces("a\u0323\u0302") == [11]
    assert pieces("a\u0302\u0323") == [SPECIAL.index("[UNK]")]


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        (["[PAD]", "a"], r"no \[UNK\]"),
        (["[UNK]", "a", "b", "a"], "'a' twice"),
        (["[UNK]", "a b"], "'a b' at 1"),
        (["[UNK]", ""], "'' at 1"),
    ],
)
def test_vocabularies_that_are_refused(pieces, says):
    with pytest.raises(ValueError, match=says):
        wordpieces.WordPieces(pieces, True, True)


SERVE = """
import json, sys
import tensorflow as tf
loaded = tf.saved_model.load(sys.argv[1])
with open(sys.argv[2], encoding="utf-8") as file:
    texts = json.load(file)
outputs = loaded.signatures["serving_default"](texts=tf.constant(texts))
others = [name for name in sys.modules if name.startswith(("tensorflow_text", "keras_hub", "apps"))]
print(json.dumps([outputs["values"].numpy().tolist(), outputs["splits"].numpy().tolist(), others]))
"""


def test_a_saved_model_needs_nothing_but_tensorflow(tmp_path):
    both = Pair([piece for piece in VOCABULARY if len(piece) < 2 or piece.isascii()], True, True)

    class Served(tf.Module):
        def __init__(self):
            super().__init__()
            self.words = both.ours

        @tf.function(autograph=False, input_signature=[tf.TensorSpec([None], tf.string, "texts")])
        def serve(self, texts):
            token_ids = self.words.tokenize(texts)
            return {"values": token_ids.values, "splits": token_ids.row_splits}

    served = Served()
    tf.saved_model.save(served, tmp_path / "model", signatures={"serving_default": served.serve})
    texts = [*LINES, *HAZARDS.values()]
    (tmp_path / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    command = [sys.executable, "-c", SERVE, tmp_path / "model", tmp_path / "texts.json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    values, splits, others = json.loads(result.stdout)
    expected = both.theirs(as_bytes(texts))
    assert values == expected.values.numpy().tolist()
    assert splits == expected.row_splits.numpy().tolist()
    assert others == []
