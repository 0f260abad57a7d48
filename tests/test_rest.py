"""TensorFlow Serving's JSON, by the examples of its documentation, and what is refused."""

import base64
import json

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tfhalf import rest

THREE = {  # the documentation's example of several inputs
    "tag": tf.TensorSpec([None], tf.string),
    "signal": tf.TensorSpec([None, 5], tf.float32),
    "sensor": tf.TensorSpec([None, 2, 2], tf.int32),
}
ONE = {"x": tf.TensorSpec([None, None], tf.float32)}
TEXT = {"text": tf.TensorSpec([None], tf.string)}


def arrays(body, specs):
    return rest.inputs_of(rest.read_body(json.dumps(body).encode()), specs)


def test_rows_and_columns_are_the_same_request():
    rows = {
        "instances": [
            {"tag": "foo", "signal": [1, 2, 3, 4, 5], "sensor": [[1, 2], [3, 4]]},
            {"tag": "bar", "signal": [3, 4, 1, 2, 5], "sensor": [[4, 5], [6, 8]]},
        ]
    }
    columns = {
        "inputs": {
            "tag": ["foo", "bar"],
            "signal": [[1, 2, 3, 4, 5], [3, 4, 1, 2, 5]],
            "sensor": [[[1, 2], [3, 4]], [[4, 5], [6, 8]]],
        }
    }
    by_rows, by_columns = arrays(rows, THREE), arrays(columns, THREE)
    assert by_rows["tag"].tolist() == [b"foo", b"bar"]
    assert by_rows["signal"].dtype == "float32"
    assert by_rows["sensor"].dtype == "int32"
    for name in THREE:
        np.testing.assert_array_equal(by_rows[name], by_columns[name])


def test_only_input_needs_no_name():
    expected = [[1.0, 2.0], [3.0, 4.0]]
    for body in (
        {"instances": expected},
        {"inputs": expected},
        {"inputs": {"x": expected}},
        {"instances": [{"x": row} for row in expected]},
    ):
        assert arrays(body, ONE)["x"].tolist() == expected


def test_bytes_are_base64():
    raw = bytes(range(256))
    value = {"b64": base64.b64encode(raw).decode()}
    for body in (
        {"instances": [value, "é"]},
        {"inputs": [value, "é"]},
        {"instances": [{"text": value}, {"text": "é"}]},
        {"inputs": {"text": [value, "é"]}},
    ):
        assert arrays(body, TEXT)["text"].tolist() == [raw, "é".encode()]


@pytest.mark.parametrize(
    ("body", "specs", "message"),
    [
        ([], ONE, "must be a JSON object"),
        ({}, ONE, 'either "instances"'),
        ({"instances": [1], "inputs": [1]}, ONE, 'either "instances"'),
        ({"instances": [[1]], "more": 1}, ONE, "unknown key 'more'"),
        ({"instances": [[1]], "signature_name": 3}, ONE, '"signature_name" must be a string'),
        ({"instances": []}, ONE, "one item or more"),
        ({"instances": {"x": 1}}, ONE, "must be a list"),
        ({"instances": [[1, 2], [3]]}, ONE, "equal lengths"),
        ({"instances": [["1", "2"]]}, ONE, "got strings"),
        ({"instances": [[True]]}, ONE, "got booleans"),
        ({"instances": [[None]]}, ONE, "got objects"),
        ({"instances": [[10**400]]}, ONE, "got objects or numbers too large"),
        ({"instances": [1, 2]}, ONE, "got [2]"),
        ({"instances": [[], []]}, ONE, "holds no value"),
        ({"instances": [{"y": [1]}]}, ONE, "input 'x' is missing"),
        ({"instances": [{"x": [1], "y": [1]}]}, ONE, "unknown input 'y'"),
        ({"instances": [{"x": [1]}, [1]]}, ONE, "instance 1 is no object"),
        ({"instances": [1]}, THREE, "must be an object with tag, signal, sensor"),
        ({"inputs": [1]}, THREE, "must be an object with"),
        ({"instances": [1]}, TEXT, "got int"),
        ({"instances": [["a"], "b"]}, TEXT, "differ in length"),
        ({"instances": [["a"], ["b", "c"]]}, TEXT, "differ in length"),
        ({"instances": [{"b64": "!"}]}, TEXT, "isn't base64"),
        ({"instances": ["\ud800"]}, TEXT, "surrogate"),
    ],
)
def test_what_does_not_fit_is_named(body, specs, message):
    with pytest.raises(rest.RequestError) as caught:
        arrays(body, specs)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert message in str(caught.value)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"1" * 100_000, b'{"inputs": 1'])
def test_what_is_no_json_is_said_so(body):
    with pytest.raises(rest.RequestError):
        rest.inputs_of(rest.read_body(body), ONE)


def test_numbers_keep_their_values():
    whole = {"x": tf.TensorSpec([None], tf.int32)}
    assert arrays({"inputs": [2**31 - 1, -(2**31)]}, whole)["x"].tolist() == [2**31 - 1, -(2**31)]
    for bad in ([2**31], [-(2**31) - 1], [1.5], [2**70]):
        with pytest.raises(rest.RequestError):
            arrays({"inputs": bad}, whole)
    # Numbers that JSON itself hasn't, as TensorFlow Serving takes them.
    floats = rest.inputs_of(rest.read_body(b'{"inputs": [[NaN, Infinity, -Infinity, 1e400]]}'), ONE)["x"]
    np.testing.assert_array_equal(floats, [[np.nan, np.inf, -np.inf, np.inf]])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.builds(lambda t: {"b64": t}, st.text()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["x", "text", "tag", "b64"]), inner),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["instances", "inputs", "signature_name"]), JSON), st.sampled_from(range(3)))
def test_any_json_gives_fitting_arrays_or_a_request_error(body, which):
    specs = (ONE, TEXT, THREE)[which]
    try:
        found = arrays(body, specs)
    except rest.RequestError as error:
        code, answer = error.code, rest.error_answer(str(error))
        assert (code, json.loads(answer).keys()) == ("INVALID_ARGUMENT", {"error"})
        return
    for name, spec in specs.items():
        assert spec.shape.is_compatible_with(found[name].shape)
        assert tf.constant(found[name]).dtype == spec.dtype


def test_answers_as_the_documentation_has_them():
    y, z = np.array([[1.5], [2.0]], "float32"), np.array([3, 4], "int32")
    assert json.loads(rest.predict_answer({"y": y}, 2)) == {"predictions": [[1.5], [2.0]]}
    assert json.loads(rest.predict_answer({"y": y}, None)) == {"outputs": [[1.5], [2.0]]}
    assert json.loads(rest.predict_answer({"y": y, "z": z}, 2)) == {
        "predictions": [{"y": [1.5], "z": 3}, {"y": [2.0], "z": 4}]
    }
    assert json.loads(rest.predict_answer({"y": y, "z": z}, None)) == {"outputs": {"y": [[1.5], [2.0]], "z": [3, 4]}}
    with pytest.raises(rest.RequestError, match="hasn't a row for each instance"):
        rest.predict_answer({"y": y}, 3)
    assert rest.predict_answer({"y": np.array([np.nan, np.inf])}, 2) == b'{"predictions":[NaN,Infinity]}'


def test_strings_are_text_and_other_bytes_base64():
    raw = {"b64": base64.b64encode(b"\xff").decode()}
    texts = np.array([b"\xc3\xa9", b"\xff"], object)
    assert json.loads(rest.predict_answer({"t": texts}, 2)) == {"predictions": ["é", raw]}
    encoded = [{"b64": base64.b64encode(text).decode()} for text in (b"\xc3\xa9", b"\xff")]
    assert json.loads(rest.predict_answer({"t_bytes": texts}, 2)) == {"predictions": encoded}
