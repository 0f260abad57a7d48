"""What a server costs, and what it wins: `apps.serve` beside plain TensorFlow, ONNX Runtime and OpenVINO, in turn.

    python -m benchmarks.serving --saved_model=saved_models/image_classification_mnist_5k/1 --rounds=30

In processes of their own, called one request after the other: the bundle's float16 and float32 signatures in plain
TensorFlow, its conversions in ONNX Runtime and OpenVINO, and `apps.serve` with one worker by gRPC and by REST, from one
client and from many at once. A client makes its request from an array and reads the answer into one each time, on the
same cores. Round by round, in turn; while one is asked, the others wait. Percentiles are over all requests of all
rounds.
"""

import concurrent.futures
import contextlib
import http.client
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import tensorflow as tf
from absl import app, flags, logging
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from benchmarks import measuring
from tfhalf import bundle, convert, latency

_SECONDS, _MOST = 1.0, 400  # of one round of requests; their number
_MODEL = "model"

Ask = Callable[[int], list[float]]


def define_flags(values: flags.FlagValues) -> None:
    """Defines this program's flags."""
    here = {"flag_values": values}
    flags.DEFINE_string("saved_model", None, "Version folder of a bundle.", required=True, **here)
    flags.DEFINE_integer("rounds", 30, "Measured rounds, 30 or more for a claim.", 1, **here)
    flags.DEFINE_integer("clients", 16, "Clients that ask the server at once.", 2, **here)


class Client:
    """Asks a running server for predictions, as a user's program would.

    Args:
        rest: REST's address.
        rpc: gRPC's address.
        inputs: examples by name; repeated where a batch is larger.
    """

    def __init__(self, rest: str, rpc: str, inputs: bundle.Arrays) -> None:
        self._rest, self._inputs, self._own = rest, inputs, threading.local()
        unlimited = [("grpc.max_receive_message_length", -1)]
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(grpc.insecure_channel(rpc, unlimited))

    def grpc(self, batch: int) -> float:
        """Returns the seconds of a request by gRPC."""
        arrays, begin = self._tiled(batch), time.perf_counter()
        request = predict_pb2.PredictRequest()
        request.model_spec.name = _MODEL
        for name, array in arrays.items():
            request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
        for tensor in self._stub.Predict(request, timeout=60).outputs.values():
            tf.make_ndarray(tensor)
        return time.perf_counter() - begin

    def rest(self, batch: int) -> float:
        """Returns the seconds of a request by REST."""
        if not hasattr(self._own, "connection"):
            self._own.connection = http.client.HTTPConnection(self._rest, timeout=60)
        arrays, begin = self._tiled(batch), time.perf_counter()
        body = json.dumps({"inputs": {name: array.tolist() for name, array in arrays.items()}})
        self._own.connection.request("POST", f"/v1/models/{_MODEL}:predict", body)
        response = self._own.connection.getresponse()
        answer = json.loads(response.read())
        if response.status != 200:
            raise bundle.ExportError(f"the server answers {response.status}: {answer}")
        return time.perf_counter() - begin

    def _tiled(self, batch: int) -> bundle.Arrays:
        return {name: array[np.arange(batch) % len(array)] for name, array in self._inputs.items()}


def one_after_the_other(call: Callable[[int], float]) -> Ask:
    """Returns a function that asks again and again for a moment, and returns the seconds of each request."""

    def ask(batch: int) -> list[float]:
        end, seconds = time.monotonic() + _SECONDS, []
        while len(seconds) < _MOST and (not seconds or time.monotonic() < end):
            seconds.append(call(batch))
        return seconds

    return ask


def at_once(call: Callable[[int], float], clients: int) -> Ask:
    """Returns a function that does so from several threads."""
    ask = one_after_the_other(call)
    threads = concurrent.futures.ThreadPoolExecutor(clients)

    def ask_all(batch: int) -> list[float]:
        return [second for seconds in threads.map(ask, [batch] * clients) for second in seconds]

    return ask_all


@contextlib.contextmanager
def server(folder: Path, inputs: bundle.Arrays) -> Iterator[Client]:
    """Runs `apps.serve` with a bundle."""
    with tempfile.TemporaryDirectory() as base:
        (Path(base) / _MODEL).mkdir()
        (Path(base) / _MODEL / folder.name).symlink_to(folder.resolve())
        command = [sys.executable, "-m", "apps.serve", f"--model_base_path={base}", "--port=0", "--rest_api_port=0"]
        process = subprocess.Popen(
            [*command, "--access_log="], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            printed = []
            for line in process.stdout:
                printed.append(line)
                if found := re.search(r"gRPC on (\S+), REST on http://(\S+)", line):
                    yield Client(found[2], found[1], inputs)
                    return
                if line.startswith("* "):
                    print(f"apps.serve chose {line[2:].strip()}", flush=True)
            raise bundle.ExportError(f"apps.serve ended: {''.join(printed)}")
        finally:
            process.terminate()
            process.wait(60)


def main(_: list[str]) -> None:
    """Runs the program."""
    logging.set_verbosity(logging.WARNING)
    values = flags.FLAGS
    folder, clients = Path(values.saved_model), values.clients
    load = measuring.load()
    measuring.warn_if_busy(load)
    manifest = bundle.check(folder)
    with np.load(folder / bundle.INPUTS, allow_pickle=False) as file:
        inputs = {name.removeprefix("inputs/"): array for name, array in file.items()}
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        asks: dict[str, Ask] = {}
        sources = {
            f"plain TensorFlow, {name}": (f"tensorflow:{name}", folder)
            for name in ("serving_default", "serving_float32")
            if name in manifest.signatures
        }
        for format, title in (("onnx", "ONNX Runtime, float32"), ("openvino", "OpenVINO, float32")):
            try:
                convert.convert(folder, format, scratch)
                sources[title] = convert.FORMATS[format].kind, scratch / format / convert.FORMATS[format].file
            except bundle.ExportError as error:
                print(f"{title}: left out: {error}", flush=True)
        for title, (kind, path) in sources.items():
            asks[title] = stack.enter_context(latency.Runtime(kind, path, {"samples": inputs})).seconds
        client = stack.enter_context(server(folder, inputs))
        for name, call in (("gRPC", client.grpc), ("REST", client.rest)):
            asks[f"apps.serve, {name}, 1 client"] = one_after_the_other(call)
        for name, call in (("gRPC", client.grpc), ("REST", client.rest)):
            asks[f"apps.serve, {name}, {clients} clients"] = at_once(call, clients)
        seconds: dict[tuple[str, int], list[float]] = {}
        rates: dict[tuple[str, int], list[float]] = {}
        for turn in range(values.rounds + 1):  # the first warms up
            for batch in latency.BATCHES:
                for title in list(asks)[turn % len(asks) :] + list(asks)[: turn % len(asks)]:
                    begin = time.perf_counter()
                    taken = asks[title](batch)
                    if turn:
                        seconds.setdefault((title, batch), []).extend(taken)
                        wall = sum(taken) if "clients" not in title else time.perf_counter() - begin
                        rates.setdefault((title, batch), []).append(batch * len(taken) / wall)
    machine = measuring.machine()
    print(f"{folder}, {values.rounds} rounds; {machine['cores']} cores of {machine['cpu']}; load {load:.1f} before")
    print(f"{'':38}" + "".join(f"{f'batch {batch}: p50':>16}{'p99':>10}{'rows/s':>10}" for batch in latency.BATCHES))
    for title in asks:
        columns = ""
        for batch in latency.BATCHES:
            middle, late = np.percentile(seconds[title, batch], [50, 99]) * 1e3
            columns += f"{middle:13.2f} ms{late:7.1f} ms{np.median(rates[title, batch]):10.0f}"
        print(f"{title:38}{columns}")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(lambda argv: sys.exit(main(argv)))
