"""TensorFlow Serving's JSON: requests to arrays of a signature, outputs to answers.

Row format has "instances", a list with an item for each row, and is answered with "predictions"; column format has
"inputs" and is answered with "outputs". Bytes are {"b64": "..."}. What doesn't fit the signature is refused with the
input's name and what it should be: nothing is guessed, so a string isn't read as a number.

Some things are stricter or safer than the original: an input without any value, and a key that isn't known, are
refused; an output string that isn't UTF-8 is given as {"b64": ...}, as those whose name ends with "_bytes" are.

Source: https://www.tensorflow.org/tfx/serving/api_rest
"""

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

# gRPC's codes, as HTTP statuses.
HTTP_STATUS = {
    "OK": 200,
    "INVALID_ARGUMENT": 400,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
_KNOWN = {"signature_name", "instances", "inputs"}

Specs = Mapping[str, tf.TensorSpec]


class RequestError(Exception):
    """A request can't be answered.

    Args:
        code: gRPC's name for what is wrong, as "INVALID_ARGUMENT".
        message: what is wrong, and what would be right.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def invalid(message: str) -> RequestError:
    """Returns the error for a request that doesn't fit."""
    return RequestError("INVALID_ARGUMENT", message)


def read_body(body: bytes) -> dict[str, Any]:
    """Reads the JSON of a predict request, without knowing the signature.

    Raises:
        RequestError: it isn't JSON, or isn't a predict request.
    """
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body isn't JSON: {error}") from error
    if not isinstance(payload, dict):
        raise invalid('the body must be a JSON object with "instances" or "inputs"')
    if unknown := sorted(payload.keys() - _KNOWN):
        raise invalid(f"unknown key {unknown[0]!r}; a predict request has {', '.join(sorted(_KNOWN))}")
    if ("instances" in payload) == ("inputs" in payload):
        raise invalid('the body must have either "instances" (rows) or "inputs" (columns)')
    if not isinstance(payload.get("signature_name", ""), str):
        raise invalid('"signature_name" must be a string')
    return payload


def inputs_of(payload: dict[str, Any], specs: Specs) -> dict[str, np.ndarray]:
    """Returns a request's arrays by name.

    Args:
        payload: what `read_body` returned.
        specs: the signature's inputs.

    Raises:
        RequestError: an input is missing, unknown, or not what the signature takes.
    """
    columns = _columns(payload["instances"], specs) if "instances" in payload else payload["inputs"]
    if len(specs) == 1 and not (isinstance(columns, dict) and columns.keys() != {"b64"}):
        columns = {next(iter(specs)): columns}
    if not isinstance(columns, dict):
        raise invalid(f'"inputs" must be an object with {", ".join(specs)}')
    require_names(columns, specs)
    try:
        return {name: checked(name, _array(name, columns[name], spec), spec) for name, spec in specs.items()}
    except RecursionError as error:
        raise invalid("an input is nested too deeply") from error


def _columns(instances: Any, specs: Specs) -> dict[str, list]:
    """Rows as columns."""
    if not isinstance(instances, list) or not instances:
        raise invalid('"instances" must be a list with one item or more')
    are_named = isinstance(instances[0], dict) and instances[0].keys() != {"b64"}
    if not are_named:
        if len(specs) > 1:
            raise invalid(f"each of the instances must be an object with {', '.join(specs)}")
        return {next(iter(specs)): instances}
    for number, row in enumerate(instances):
        if not isinstance(row, dict):
            raise invalid(f"instance {number} is no object, but the first one is")
        require_names(row, specs, f"instance {number}: ")
    return {name: [row[name] for row in instances] for name in specs}


def require_names(given: Mapping[str, Any], specs: Specs, where: str = "") -> None:
    """Refuses inputs that are missing or unknown.

    Raises:
        RequestError: the names aren't the signature's.
    """
    if missing := sorted(specs.keys() - given.keys()):
        raise invalid(f"{where}input {missing[0]!r} is missing; the signature takes {', '.join(sorted(specs))}")
    if unknown := sorted(given.keys() - specs.keys()):
        raise invalid(f"{where}unknown input {unknown[0]!r}; the signature takes {', '.join(sorted(specs))}")


def _array(name: str, value: Any, spec: tf.TensorSpec) -> np.ndarray:
    if spec.dtype == tf.string:
        texts: list[bytes] = []
        shape = _collect(name, value, texts)
        if int(np.prod(shape)) != len(texts):
            raise invalid(f"input {name!r}: its lists differ in length")
        array = np.empty(len(texts), object)
        array[:] = texts
        return array.reshape(shape)
    try:
        return np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise invalid(f"input {name!r} must be numbers in lists of equal lengths") from error


def _collect(name: str, value: Any, texts: list[bytes]) -> list[int]:
    """Adds the strings in nested lists to `texts`; returns the shape, by the first of each list."""
    if isinstance(value, list):
        shapes = [_collect(name, item, texts) for item in value]
        if any(shape != shapes[0] for shape in shapes):
            raise invalid(f"input {name!r}: its lists differ in length")
        return [len(value), *(shapes[0] if shapes else [])]
    if isinstance(value, dict) and value.keys() == {"b64"} and isinstance(value["b64"], str):
        try:
            texts.append(base64.b64decode(value["b64"], validate=True))
        except (binascii.Error, ValueError) as error:
            raise invalid(f"input {name!r}: what stands under b64 isn't base64: {error}") from error
        return []
    if not isinstance(value, str):
        raise invalid(f'input {name!r} must be strings, or {{"b64": "..."}} for bytes; got {type(value).__name__}')
    try:
        texts.append(value.encode())
    except UnicodeEncodeError as error:
        raise invalid(f"input {name!r} holds half of a surrogate pair, which isn't a character") from error
    return []


def checked(name: str, array: np.ndarray, spec: tf.TensorSpec) -> np.ndarray:
    """Returns an array in the dtype that the signature takes.

    Numbers may come in another dtype if no value is changed by more than rounding: whole numbers as floats, and whole
    numbers of another width that fit.

    Raises:
        RequestError: the dtype, shape or range doesn't fit.
    """
    wanted = f"input {name!r} must be {spec.dtype.name} {_shape(spec.shape)}"
    target = spec.dtype.as_numpy_dtype
    if spec.dtype == tf.string:
        fits = array.dtype.kind in "OSU"
    elif spec.dtype.is_floating:
        fits = array.dtype.kind in "fiu" or array.dtype == target
    elif spec.dtype.is_integer:
        fits = array.dtype.kind in "iu"
    else:
        fits = array.dtype == target
    if not fits:
        raise invalid(f"{wanted}; got {_kind(array)}")
    if not spec.shape.is_compatible_with(array.shape):
        raise invalid(f"{wanted}; got {_shape(array.shape)}")
    if not array.size:
        raise invalid(f"{wanted}; got {_shape(array.shape)}, which holds no value")
    if spec.dtype.is_integer and array.dtype != target:
        limits = np.iinfo(target)
        if array.min() < limits.min or array.max() > limits.max:
            raise invalid(f"{wanted}; a value is out of range")
    if spec.dtype == tf.string:
        return array if array.dtype.kind == "O" else array.astype(object)
    with np.errstate(over="ignore"):  # infinite is what a float64 over the range becomes
        return array.astype(target, copy=False)


def _shape(shape) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"


def _kind(array: np.ndarray) -> str:
    return {"O": "objects or numbers too large", "U": "strings", "S": "strings", "b": "booleans"}.get(
        array.dtype.kind, array.dtype.name
    )


def predict_answer(outputs: Mapping[str, np.ndarray], rows: int | None) -> bytes:
    """Returns the answer to a predict request.

    Args:
        outputs: arrays by name.
        rows: how many there were, for row format; None for column format.

    Raises:
        RequestError: an output hasn't a row for each row of the request.
    """
    values = {name: _plain(name, array) for name, array in outputs.items()}
    if rows is None:
        content: Any = values if len(values) > 1 else next(iter(values.values()))
        return as_json({"outputs": content})
    for name, array in outputs.items():
        if array.ndim < 1 or len(array) != rows:
            raise invalid(f'output {name!r} hasn\'t a row for each instance; ask with "inputs" instead of "instances"')
    if len(values) == 1:
        return as_json({"predictions": next(iter(values.values()))})
    return as_json({"predictions": [{name: value[row] for name, value in values.items()} for row in range(rows)]})


def _plain(name: str, array: np.ndarray) -> Any:
    if array.dtype.kind not in "OS":
        return array.tolist()
    as_bytes = name.endswith("_bytes")

    def text(value: bytes) -> Any:
        if not as_bytes:
            try:
                return value.decode()
            except UnicodeDecodeError:
                pass
        return {"b64": base64.b64encode(value).decode()}

    def nested(part: Any) -> Any:
        return [nested(one) for one in part] if isinstance(part, list) else text(part)

    return nested(array.tolist())


def error_answer(message: str) -> bytes:
    """Returns the body of an answer that says what was wrong."""
    return as_json({"error": message})


def as_json(value: Any) -> bytes:
    """Returns JSON as bytes; NaN and infinities as TensorFlow Serving writes them."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
