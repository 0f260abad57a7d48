"""TensorFlow Serving's protobufs: requests to arrays, outputs to answers, metadata and status, also as REST's JSON.

Requests come as bytes and are parsed here, so that a malformed one gets INVALID_ARGUMENT. Version 0 and an unset one
mean the newest. A tensor that is given by fewer values than its shape has is filled up, as TensorFlow does, but only
to what a request may be large.

Source: https://github.com/tensorflow/serving/tree/2.18.0/tensorflow_serving/apis
"""

import math
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
from google.protobuf import json_format, message
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
    predict_pb2,
)

from tfhalf import precision, rest, versions

_SIGNATURES = "signature_def"
_FIELDS = (
    dict.fromkeys(precision.HALF_DTYPES, "half_val")
    | {
        "float32": "float_val",
        "float64": "double_val",
        "bool": "bool_val",
        "int64": "int64_val",
        "uint32": "uint32_val",
        "uint64": "uint64_val",
    }
    | dict.fromkeys(["int8", "int16", "int32", "uint8", "uint16"], "int_val")
)
_INVALID_ARGUMENT = 3  # of google.rpc.Code: why a version was refused


def parse(kind: type[message.Message], body: bytes) -> message.Message:
    """Reads a request.

    Raises:
        RequestError: the bytes aren't one.
    """
    try:
        request = kind.FromString(body)
    except message.DecodeError as error:
        raise rest.invalid(f"the request is no {kind.DESCRIPTOR.name}: {error}") from error
    if not request.model_spec.name:
        raise rest.invalid("model_spec.name is missing")
    if request.model_spec.WhichOneof("version_choice") == "version_label":
        raise rest.invalid("version labels aren't supported: give the version's number, or none for the newest")
    if request.model_spec.version.value < 0:
        raise rest.invalid(f"version {request.model_spec.version.value} is negative")
    return request


def inputs_of(request: predict_pb2.PredictRequest, specs: rest.Specs, max_bytes: int) -> dict[str, np.ndarray]:
    """Returns a request's arrays by name.

    Args:
        request: a parsed request.
        specs: the signature's inputs.
        max_bytes: how large an array may become.

    Raises:
        RequestError: an input is missing, unknown, or not what the signature takes.
    """
    rest.require_names(request.inputs, specs)
    return {
        name: rest.checked(name, _array(name, request.inputs[name], max_bytes), spec) for name, spec in specs.items()
    }


def _array(name: str, tensor, max_bytes: int) -> np.ndarray:
    sizes = [dim.size for dim in tensor.tensor_shape.dim]
    if tensor.tensor_shape.unknown_rank or any(size < 0 for size in sizes):
        raise rest.invalid(f"input {name!r}: its shape isn't known")
    try:
        dtype = tf.as_dtype(tensor.dtype)
    except TypeError as error:
        raise rest.invalid(f"input {name!r}: its dtype isn't known") from error
    # What a string costs besides its characters: a pointer.
    each = 8 if dtype == tf.string else max(1, dtype.size or 1)
    if math.prod(max(1, size) for size in sizes) * each > max_bytes:
        raise rest.invalid(f"input {name!r}: {sizes} is more than the {max_bytes} bytes that a request may have")
    try:
        array = tf.make_ndarray(tensor)
    except (ValueError, TypeError, LookupError, OverflowError, MemoryError) as error:
        raise rest.invalid(f"input {name!r}: its values don't fit its dtype and shape {sizes}") from error
    if dtype == tf.string:
        array = np.vectorize(lambda value: value if isinstance(value, bytes) else b"", otypes="O")(array)
    return array


def predict_answer(outputs: Mapping[str, np.ndarray], only: list[str], name: str, number: int, signature: str) -> bytes:
    """Returns a PredictResponse.

    Args:
        outputs: arrays by name.
        only: the outputs that were asked for; empty for all.
        name: the model.
        number: its version.
        signature: the signature's name, as it was asked for.

    Raises:
        RequestError: there is no such output.
    """
    if unknown := sorted(set(only) - outputs.keys()):
        raise rest.invalid(f"output_filter: unknown output {unknown[0]!r}; there are {', '.join(sorted(outputs))}")
    response = predict_pb2.PredictResponse()
    response.model_spec.CopyFrom(_spec(name, number, signature))
    for key in only or outputs:
        response.outputs[key].CopyFrom(_tensor(outputs[key]))
    return response.SerializeToString()


def _tensor(array: np.ndarray):
    """A TensorProto whose values are in its typed field, as TensorFlow Serving's are: clients read them there."""
    proto = tf.make_tensor_proto(array, shape=array.shape)
    if proto.tensor_content and array.dtype.name in _FIELDS:
        proto.ClearField("tensor_content")
        bits = array.view("uint16") if array.dtype.name in precision.HALF_DTYPES else array
        getattr(proto, _FIELDS[array.dtype.name]).extend(bits.ravel().tolist())
    return proto


def _spec(name: str, number: int, signature: str = "") -> model_pb2.ModelSpec:
    spec = model_pb2.ModelSpec(name=name, signature_name=signature)
    spec.version.value = number
    return spec


def require_signatures(request: get_model_metadata_pb2.GetModelMetadataRequest) -> None:
    """Refuses a request for other metadata than signatures, which are all that there are.

    Raises:
        RequestError: another field is asked for, or none.
    """
    if list(request.metadata_field) != [_SIGNATURES]:
        raise rest.invalid(f"metadata_field must be {_SIGNATURES!r}, and nothing else")


def metadata_answer(name: str, number: int, signatures: Mapping) -> get_model_metadata_pb2.GetModelMetadataResponse:
    """Returns what a model's signatures take and give.

    Args:
        name: the model.
        number: its version.
        signatures: SignatureDefs by name.
    """
    response = get_model_metadata_pb2.GetModelMetadataResponse(model_spec=_spec(name, number))
    about = get_model_metadata_pb2.SignatureDefMap()
    for key, signature in signatures.items():
        about.signature_def[key].CopyFrom(signature)
    response.metadata[_SIGNATURES].Pack(about)
    return response


def metadata_json(response: get_model_metadata_pb2.GetModelMetadataResponse) -> bytes:
    """Returns the same as REST's JSON."""
    about = get_model_metadata_pb2.SignatureDefMap()
    response.metadata[_SIGNATURES].Unpack(about)
    return rest.as_json({"model_spec": _as_dict(response.model_spec), "metadata": {_SIGNATURES: _as_dict(about)}})


def status_answer(model: str, known: Mapping[int, versions.Version], number: int = 0):
    """Returns the states of a model's versions.

    Args:
        model: its name.
        known: its versions by number.
        number: one of them, or 0 for all.

    Raises:
        RequestError: there is no such model or version.
    """
    chosen = {key: version for key, version in known.items() if number in (0, key)}
    if not chosen:
        raise rest.RequestError("NOT_FOUND", missing(model, number))
    response = get_model_status_pb2.GetModelStatusResponse()
    for key in sorted(chosen, reverse=True):
        status = response.model_version_status.add(version=key)
        status.state = get_model_status_pb2.ModelVersionStatus.State.Value(chosen[key].state)
        if chosen[key].error:
            status.status.error_code = _INVALID_ARGUMENT
            status.status.error_message = chosen[key].error
    return response


def status_json(response: get_model_status_pb2.GetModelStatusResponse) -> bytes:
    """Returns the same as REST's JSON."""
    content = _as_dict(response)
    for status in content["model_version_status"]:
        status.setdefault("status", {"error_code": "OK", "error_message": ""})
    return rest.as_json(content)


def missing(model: str, number: int) -> str:
    """Says that there is no such model or version."""
    which = f"version {number} of model {model!r}" if number else f"model {model!r}"
    return f"no {which} is served"


def _as_dict(about: message.Message) -> dict:
    return json_format.MessageToDict(about, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
