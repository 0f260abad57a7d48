"""What counts of a text, which characters are learned, and labels there and back in a graph."""

import unicodedata

import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.audio import alphabet


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No… Vidíš,  jsi\tVENKU -- 2!", "no vidíš jsi venku 2"),
        ("je-li \N{EN DASH} a/b", "je li a b"),
        ("don\N{RIGHT SINGLE QUOTATION MARK}t 't it's ' end", "don't 't it's end"),
        ("e\u0301te\u0301", "été"),
        ("ŽLUŤOUČKÝ", "žluťoučký"),
        ("...", ""),
        ("", ""),
    ],
)
def test_normalize(text, expected):
    assert alphabet.normalize(text) == expected
    assert alphabet.normalize(expected) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No… Vidíš,  jsi\tVENKU -- 2!", "no,vidíš,jsi venku,2"),
        ("je-li \N{EN DASH} a/b - 'c'?! ", "je li,a b,'c'"),
        (" - a, ... 'b", "a,'b"),
        ("- ,", ""),
        ("a\n-- b\N{GREEK QUESTION MARK} c", "a,b,c"),
    ],
)
def test_normalize_with_marks(text, expected):
    assert alphabet.normalize(text, with_marks=True) == expected
    assert alphabet.normalize(expected, with_marks=True) == expected
    assert alphabet.normalize(text) == expected.replace(",", " ")


def test_rare_characters_and_digits_are_left_out():
    texts = ["abé" * 10, "7" * 50, "a w" * 9]
    learned, left_out = alphabet.learn(texts)
    assert learned.characters == [" ", "a", "b", "é"]
    assert left_out == {"7": 50, "w": 9}
    assert learned.encode("é wa7").tolist() == [4, 1, 2]


def test_a_text_of_one_word_has_a_space_to_learn():
    assert alphabet.learn(["aaaaaaaaaaaaa"])[0].characters == [" ", "a"]


def test_decode_is_the_inverse_of_encode():
    letters = alphabet.Alphabet([" ", "'", "a", "ž", "ů"])
    texts = ["ůž a'a", "", "a"]
    rows = tf.ragged.stack([letters.encode(text) for text in texts]).to_tensor()
    decode = tf.function(letters.decode)
    assert [text.decode() for text in decode(rows).numpy()] == texts
    assert decode(tf.constant([[1, 3, 1, 1, 4, 1, 0]]))[0].numpy().decode() == "a ž"  # as if it was normalised
    assert decode(tf.zeros([2, 0], tf.int32)).numpy().tolist() == [b"", b""]


LETTERS, WITH_MARKS = (alphabet.Alphabet([" ", "'", "a", "e", "é", "ž", "ů", *more]) for more in ("", alphabet.MARK))
_TOKENIZE, _TOKENIZE_WITH_MARKS = (
    tf.function(each.tokenize, autograph=False, input_signature=[tf.TensorSpec([None], tf.string)])
    for each in (LETTERS, WITH_MARKS)
)


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet="aeéžůAEÉŽŮx59_-.,!?'\N{RIGHT SINGLE QUOTATION MARK}` \t\n\N{EM DASH}"))
def test_a_graph_tokenizes_as_texts_are_normalised_and_encoded(text):
    for form in ("NFC", "NFD"):
        given_text = unicodedata.normalize(form, text)
        expected = LETTERS.encode(alphabet.normalize(given_text)).tolist()
        assert _TOKENIZE([given_text.encode()])[0].numpy().tolist() == expected, form
        with_marks = WITH_MARKS.encode(alphabet.normalize(given_text, with_marks=True)).tolist()
        assert _TOKENIZE_WITH_MARKS([given_text.encode()])[0].numpy().tolist() == with_marks, form
        assert [1 if label == len(WITH_MARKS.characters) else label for label in with_marks] == expected


def test_odd_texts_are_tokenized():
    rows = _TOKENIZE([b"", b"\xff\xfea", "漢字 a".encode(), b"\x00"]).to_list()
    assert rows == [[], [3], [1, 3], []]
