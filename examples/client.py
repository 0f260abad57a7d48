"""Sends files to a model on a server of TensorFlow Serving's API, in batches, and prints a line of JSON for each.

    python examples/client.py --model=image_classification_mnist_5k folder/
    python examples/client.py --model=text_classification_reuters_r8 --rest --address=localhost:8501 news.txt
    cat news.txt | python examples/client.py --model=text_classification_reuters_r8 -
    python examples/client.py --model=mine --batch_size=32 --concurrency=8 arrays/*.npy

A line of a .txt file, or of the standard input (-), is one item; so is a picture, a sound (.wav, 16 bits, at the
model's rate), an array without the batch's axis (.npy), or arrays by the inputs' names (.npz). A folder gives all such
files in it.

Items of equal shapes go together, so many requests are under way and no more, and lines come in the items' order. What
may pass (a server that is busy, restarting or not reachable) is tried again after a growing, random pause; what was
refused isn't, but a refused batch is sent again item by item, so that only the bad one fails. An item that failed has
"error" in its line, and the exit status is 1.

gRPC needs tensorflow-serving-api; --rest needs the standard library only, numpy for arrays, and Pillow for pictures.
"""

import argparse
import base64
import collections
import concurrent.futures
import http.client
import itertools
import json
import random
import sys
import threading
import time
import wave
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
_SUFFIXES = (*_PICTURES, ".npy", ".npz", ".txt", ".wav")
_MAY_PASS_GRPC = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "ABORTED")
_MAY_PASS_HTTP = (408, 429, 502, 503, 504)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # seconds


class CallError(Exception):
    """A request failed; `may_pass` says whether it may work later, `after` when at the earliest."""

    def __init__(self, message: str, may_pass: bool, after: float = 0.0) -> None:
        super().__init__(message)
        self.may_pass, self.after = may_pass, after


class Item(NamedTuple):
    """One row for the model: a name to print, and a value by input; None is the only input's name."""

    name: str
    values: dict[str | None, Any]
    error: str = ""

    @property
    def shapes(self) -> tuple:
        """What must be equal within a batch."""
        return tuple((name, getattr(value, "shape", ())) for name, value in sorted(self.values.items(), key=str))


def read(arguments: list[str]) -> Iterator[Item]:
    """Yields the items of files, folders and the standard input, reading each when it is its turn."""
    for argument in arguments:
        path = Path(argument)
        if argument == "-":
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
            yield from _lines("-", sys.stdin)
        elif path.is_dir():
            yield from read([str(file) for file in sorted(path.iterdir()) if file.suffix.lower() in _SUFFIXES])
        elif path.suffix.lower() == ".txt":
            try:
                with open(path, encoding="utf-8") as file:
                    yield from _lines(argument, file)
            except (OSError, UnicodeDecodeError) as error:
                yield Item(argument, {}, f"can't be read: {error}")
        else:
            try:
                yield Item(argument, _values(path))
            except (OSError, ValueError, EOFError, wave.Error) as error:
                yield Item(argument, {}, f"can't be read: {error}")


def _lines(name: str, file: Iterable[str]) -> Iterator[Item]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield Item(f"{name}:{number}", {None: line.rstrip("\n")})


def _values(path: Path) -> dict[str | None, Any]:
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(f"it is none of {', '.join(_SUFFIXES)}")
    import numpy as np

    if suffix == ".npy":
        return {None: np.load(path, allow_pickle=False)}
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    if suffix == ".wav":
        with wave.open(str(path)) as sound:
            if sound.getsampwidth() != 2:
                raise ValueError("a sound must have 16 bits")
            data, channels = sound.readframes(sound.getnframes()), sound.getnchannels()
        samples = np.frombuffer(data, "<i2").reshape(-1, channels).mean(axis=1) / 32768
        return {"waveform": samples.astype("float32"), "length": np.int32(len(samples))}
    from PIL import Image

    with Image.open(path) as picture:
        kind = "L" if picture.mode in ("1", "L") else "RGB"
        pixels = np.asarray(picture.convert(kind), "float32")
    return {None: pixels.reshape(*pixels.shape[:2], -1)}


class RestCaller:
    """Calls by REST; each thread keeps a connection."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options, self._own = options, threading.local()
        version = f"/versions/{options.version}" if options.version else ""
        self._path = f"/v1/models/{options.model}{version}"

    def names(self) -> tuple[list[str], list[str]]:
        """Asks what the signature takes and gives."""
        signatures = self._request("GET", "/metadata")["metadata"]["signature_def"]["signature_def"]
        inputs, self._outputs = _names(signatures, self._options.signature)
        return inputs, self._outputs

    def predict(self, columns: dict[str, list]) -> dict[str, list]:
        """Returns the outputs by name."""
        inputs = {name: [_for_json(value) for value in values] for name, values in columns.items()}
        body: dict[str, Any] = {"inputs": inputs}
        if self._options.signature:
            body["signature_name"] = self._options.signature
        outputs = self._request("POST", ":predict", json.dumps(body).encode())["outputs"]
        return outputs if len(self._outputs) > 1 else {self._outputs[0]: outputs}

    def _request(self, method: str, suffix: str, body: bytes | None = None) -> dict:
        connection = getattr(self._own, "connection", None)
        if connection is None:
            connection = http.client.HTTPConnection(self._options.address, timeout=self._options.timeout)
            self._own.connection = connection
        try:
            connection.request(method, self._path + suffix, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()  # the next request opens it again
            raise CallError(f"{type(error).__name__}: {error}", may_pass=True) from error
        try:
            answer = json.loads(content)
        except ValueError:
            answer = {"error": content[:200].decode(errors="replace")}
        if response.status != 200:
            after = response.headers.get("Retry-After", "")
            message = answer.get("error", response.reason)
            raise CallError(message, response.status in _MAY_PASS_HTTP, float(after) if after.isdigit() else 0.0)
        return answer


class GrpcCaller:
    """Calls by gRPC; one channel for all threads."""

    def __init__(self, options: argparse.Namespace) -> None:
        import grpc
        import numpy
        import tensorflow as tf
        from tensorflow_serving.apis import get_model_metadata_pb2, predict_pb2, prediction_service_pb2_grpc

        self._options, self._tf, self._numpy = options, tf, numpy
        self._error, self._predict, self._metadata = grpc.RpcError, predict_pb2, get_model_metadata_pb2
        limits = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(grpc.insecure_channel(options.address, limits))

    def names(self) -> tuple[list[str], list[str]]:
        """Asks what the signature takes and gives."""
        request = self._metadata.GetModelMetadataRequest(metadata_field=["signature_def"])
        answer = self._call(self._stub.GetModelMetadata, request)
        signatures = self._metadata.SignatureDefMap()
        answer.metadata["signature_def"].Unpack(signatures)
        about = {name: {"inputs": one.inputs, "outputs": one.outputs} for name, one in signatures.signature_def.items()}
        return _names(about, self._options.signature)

    def predict(self, columns: dict[str, list]) -> dict[str, list]:
        """Returns the outputs by name."""
        request = self._predict.PredictRequest()
        request.model_spec.signature_name = self._options.signature
        for name, values in columns.items():
            column = values if isinstance(values[0], (str, bytes)) else self._numpy.asarray(values)
            request.inputs[name].CopyFrom(self._tf.make_tensor_proto(column))
        answer = self._call(self._stub.Predict, request)
        arrays = {name: self._tf.make_ndarray(tensor) for name, tensor in answer.outputs.items()}
        return {name: _texts(array.tolist()) for name, array in arrays.items()}

    def _call(self, method, request):
        request.model_spec.name = self._options.model
        if self._options.version:
            request.model_spec.version.value = self._options.version
        try:
            return method(request, timeout=self._options.timeout)
        except self._error as error:
            name = error.code().name
            raise CallError(f"{name}: {error.details()}", name in _MAY_PASS_GRPC) from error


def _names(signatures: dict, signature: str) -> tuple[list[str], list[str]]:
    wanted = signature or "serving_default"
    if wanted not in signatures:
        raise CallError(f"the model has no signature {wanted}; it has {', '.join(sorted(signatures))}", False)
    return sorted(signatures[wanted]["inputs"]), sorted(signatures[wanted]["outputs"])


def _for_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode()}
    return value.tolist() if hasattr(value, "tolist") else value


def _texts(value: Any) -> Any:
    """Bytes as text, or as base64 where they are none."""
    if isinstance(value, list):
        return [_texts(one) for one in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"b64": base64.b64encode(value).decode()}
    return value


def patiently(call, retries: int) -> Any:
    """Calls, and again after a pause, twice as long each time and random, while what went wrong may pass."""
    for attempt in itertools.count():
        try:
            return call()
        except CallError as error:
            if not error.may_pass or attempt == retries:
                raise
            longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt)
            time.sleep(max(error.after, random.uniform(longest / 2, longest)))  # random, or all would come at once


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields runs of items that can be sent together."""
    batch: list[Item] = []
    for item in items:
        if batch and (len(batch) == size or item.error or batch[0].error or item.shapes != batch[0].shapes):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def send(caller, names: list[str], batch: list[Item], retries: int) -> list[dict]:
    """Returns a JSON object for each item of a batch."""
    if batch[0].error:
        return [{"item": item.name, "error": item.error} for item in batch]
    given = batch[0].values
    keys = {names[0] if name is None and len(names) == 1 else name: name for name in given}
    if sorted(map(str, keys)) != names:
        return [{"item": item.name, "error": f"the model takes {', '.join(names)}"} for item in batch]
    columns = {name: [item.values[key] for item in batch] for name, key in keys.items()}
    try:
        outputs = patiently(lambda: caller.predict(columns), retries)
    except CallError as error:
        if len(batch) > 1 and not error.may_pass:
            return [line for item in batch for line in send(caller, names, [item], retries)]
        return [{"item": item.name, "error": str(error)} for item in batch]
    if any(not isinstance(rows, list) or len(rows) != len(batch) for rows in outputs.values()):
        return [{"item": item.name, "error": "the model doesn't give a row for each item"} for item in batch]
    return [
        {"item": item.name, "outputs": {name: rows[number] for name, rows in outputs.items()}}
        for number, item in enumerate(batch)
    ]


def stream(caller, items: Iterable[Item], options: argparse.Namespace) -> Iterator[dict]:
    """Yields a JSON object for each item, in order; no more than `concurrency` batches are read ahead."""
    names, _ = patiently(caller.names, options.retries)
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(options.concurrency) as threads:
        for batch in batches(items, options.batch_size):
            if len(waiting) == options.concurrency:
                yield from waiting.popleft().result()
            waiting.append(threads.submit(send, caller, names, batch, options.retries))
        while waiting:
            yield from waiting.popleft().result()


def main() -> int:
    """Runs the program; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", help="files, folders, or - for lines of the standard input")
    parser.add_argument("--model", required=True, help="its name on the server")
    parser.add_argument("--rest", action="store_true", help="call by REST instead of gRPC")
    parser.add_argument("--address", help="host:port; default localhost:8500, with --rest localhost:8501")
    parser.add_argument("--version", type=int, default=0, help="of the model; default: the newest")
    parser.add_argument("--signature", default="", help="default: the server's choice")
    parser.add_argument("--batch_size", type=int, default=8, help="most items in a request")
    parser.add_argument("--concurrency", type=int, default=4, help="most requests under way")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds for one request")
    parser.add_argument("--retries", type=int, default=8, help="how often a request is tried again")
    options = parser.parse_args()
    if min(options.batch_size, options.concurrency) < 1 or options.retries < 0 or options.timeout <= 0:
        parser.error("--batch_size and --concurrency must be 1 or more, --timeout above 0, --retries 0 or more")
    options.address = options.address or ("localhost:8501" if options.rest else "localhost:8500")
    failed = False
    try:
        caller = RestCaller(options) if options.rest else GrpcCaller(options)
        for line in stream(caller, read(options.inputs), options):
            failed |= "error" in line
            print(json.dumps(line, ensure_ascii=False), flush=True)
    except (CallError, http.client.InvalidURL) as error:
        print(f"error: {options.address}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
