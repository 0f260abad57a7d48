"""Protobufs that are what they should be, and those that aren't."""

import json

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow.core.framework import tensor_pb2, types_pb2
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, predict_pb2

from tfhalf import rest, rpc, versions

SPECS = {"x": tf.TensorSpec([None, 3], tf.float32), "n": tf.TensorSpec([None], tf.int32)}
MOST = 2**20


def request(**tensors):
    made = predict_pb2.PredictRequest()
    made.model_spec.name = "m"
    for name, tensor in tensors.items():
        made.inputs[name].CopyFrom(tensor)
    return made


def proto(value, dtype=None):
    return tf.make_tensor_proto(value, dtype)


def test_tensors_come_through():
    x = np.arange(6, dtype="float32").reshape(2, 3)
    found = rpc.inputs_of(request(x=proto(x), n=proto([1, 2])), SPECS, MOST)
    np.testing.assert_array_equal(found["x"], x)
    assert found["n"].dtype == "int32"
    # As ovmsclient sends Python's numbers: in 64 bits.
    wide = rpc.inputs_of(request(x=proto(x, tf.float64), n=proto([1, 2], tf.int64)), SPECS, MOST)
    assert (wide["x"].dtype, wide["n"].dtype) == ("float32", "int32")


def test_strings_keep_every_byte():
    texts = [b"a\0", bytes(range(256)), b""]
    specs = {"text": tf.TensorSpec([None], tf.string)}
    assert rpc.inputs_of(request(text=proto(texts)), specs, MOST)["text"].tolist() == texts
    answer = predict_pb2.PredictResponse.FromString(
        rpc.predict_answer({"text": np.array(texts, object)}, [], "m", 3, "serving_default")
    )
    assert tf.make_ndarray(answer.outputs["text"]).tolist() == texts
    assert (answer.model_spec.name, answer.model_spec.version.value) == ("m", 3)


def shaped(sizes, dtype=types_pb2.DT_FLOAT, **values):
    tensor = tensor_pb2.TensorProto(dtype=dtype, **values)
    for size in sizes:
        tensor.tensor_shape.dim.add(size=size)
    return tensor


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (shaped([10**9, 3], float_val=[1]), "is more than the 1048576 bytes"),  # one value, filled up
        (shaped([2**40, 2**40]), "is more than"),
        (shaped([0, 2**62]), "is more than"),
        (shaped([-1, 3]), "its shape isn't known"),
        (shaped([2, 3], tensor_content=b"123"), "don't fit"),
        (shaped([2, 3], dtype=types_pb2.DT_RESOURCE), "don't fit"),
        (shaped([2, 3], dtype=9999), "its dtype isn't known"),
        (shaped([2, 3], dtype=types_pb2.DT_STRING, string_val=[b"1"]), "got objects"),
        (shaped([2, 3], dtype=types_pb2.DT_BOOL, bool_val=[True]), "got booleans"),
        (shaped([2, 2], float_val=[1]), "got [2, 2]"),
        (shaped([0, 3]), "holds no value"),
        (shaped([1] * 70 + [3], float_val=[1]), "don't fit"),
        (shaped([2, 3], dtype=types_pb2.DT_COMPLEX64, scomplex_val=[1, 2]), "got complex64"),
    ],
)
def test_what_does_not_fit_is_named(x, message):
    with pytest.raises(rest.RequestError) as caught:
        rpc.inputs_of(request(x=x, n=proto([1, 2])), SPECS, MOST)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "field"),
    [("float32", "float_val"), ("float64", "double_val"), ("int32", "int_val"), ("uint8", "int_val"),
     ("int64", "int64_val"), ("bool", "bool_val"), ("uint64", "uint64_val"), ("float16", "half_val")],
)  # fmt: skip
def test_answers_are_in_the_fields_that_clients_read(dtype, field):
    array = np.array([[0, 1, 2], [3, 4, 5]]).astype(dtype)
    body = rpc.predict_answer({"y": array}, [], "m", 1, "")
    answer = predict_pb2.PredictResponse.FromString(body).outputs["y"]
    expected = array.view("uint16") if dtype == "float16" else array
    assert list(getattr(answer, field)) == expected.ravel().tolist()
    assert answer.tensor_content == b""
    np.testing.assert_array_equal(tf.make_ndarray(answer), array)


def test_what_a_request_must_say():
    kind = predict_pb2.PredictRequest
    for body in (b"\xff\xff", b"", request().SerializeToString()[:-1]):
        with pytest.raises(rest.RequestError):
            rpc.parse(kind, body)
    labelled = request()
    labelled.model_spec.version_label = "stable"
    negative = request()
    negative.model_spec.version.value = -1
    for made, message in ((labelled, "labels"), (negative, "negative")):
        with pytest.raises(rest.RequestError, match=message):
            rpc.parse(kind, made.SerializeToString())
    with pytest.raises(rest.RequestError, match="input 'n' is missing"):
        rpc.inputs_of(request(x=proto([[1.0, 2, 3]])), SPECS, MOST)


@settings(max_examples=300, deadline=None)
@given(
    st.builds(
        lambda dtype, sizes, content, floats, ints, texts: shaped(
            sizes, dtype, tensor_content=content, float_val=floats, int_val=ints, string_val=texts
        ),
        st.integers(-3, 140),
        st.lists(st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 2**31, 2**63 - 1]), max_size=4),
        st.binary(max_size=24),
        st.lists(st.floats(width=32), max_size=4),
        st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4),
        st.lists(st.binary(max_size=4), max_size=4),
    )
)
def test_any_tensor_gives_a_fitting_array_or_a_request_error(tensor):
    for spec in (*SPECS.values(), tf.TensorSpec([None], tf.string)):
        try:
            found = rpc.inputs_of(request(x=tensor), {"x": spec}, MOST)["x"]
        except rest.RequestError as error:
            code = error.code
            assert code == "INVALID_ARGUMENT"
        else:
            assert spec.shape.is_compatible_with(found.shape)
            assert tf.constant(found).dtype == spec.dtype


def test_only_what_was_asked_for_is_answered():
    outputs = {"a": np.ones([1]), "b": np.ones([1])}
    answer = predict_pb2.PredictResponse.FromString(rpc.predict_answer(outputs, ["b"], "m", 1, ""))
    assert answer.outputs.keys() == {"b"}
    with pytest.raises(rest.RequestError, match="unknown output 'c'; there are a, b"):
        rpc.predict_answer(outputs, ["c"], "m", 1, "")


def test_status_of_sound_and_refused_versions():
    known = {1: versions.Version(1, "AVAILABLE"), 2: versions.Version(2, "END", "it is bad")}
    answer = rpc.status_answer("m", known)
    states = [(one.version, one.state, one.status.error_code) for one in answer.model_version_status]
    assert states == [
        (2, get_model_status_pb2.ModelVersionStatus.END, 3),
        (1, get_model_status_pb2.ModelVersionStatus.AVAILABLE, 0),
    ]
    assert json.loads(rpc.status_json(rpc.status_answer("m", known, 1))) == {
        "model_version_status": [
            {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
        ]
    }
    assert json.loads(rpc.status_json(rpc.status_answer("m", known, 2)))["model_version_status"][0]["status"] == {
        "error_code": "INVALID_ARGUMENT",
        "error_message": "it is bad",
    }
    for number, message in ((3, "no version 3 of model 'm'"), (0, "no model 'm' is served")):
        with pytest.raises(rest.RequestError, match=message):
            rpc.status_answer("m", known if number else {}, number)


def test_only_signatures_are_metadata():
    for fields in ([], ["signature_def", "other"], ["other"]):
        with pytest.raises(rest.RequestError, match="metadata_field must be 'signature_def'"):
            rpc.require_signatures(get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=fields))
