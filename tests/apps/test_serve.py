"""The real command line, asked by clients that others wrote, while versions come and workers die."""

import base64
import collections
import contextlib
import functools
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from urllib.parse import quote

import grpc
import keras
import numpy as np
import ovmsclient
import pytest
import tensorflow as tf
from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

import tfhalf
from apps import runner, serve
from tests.apps import contract
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

WORDS = [b"good", b"bad", b"so so", b"\xc3\xa9t\xc3\xa9", b""]


class Server:
    """A running `python -m apps.serve`, and what it printed."""

    def __init__(self, base: Path, log: Path, *flags: str) -> None:
        self.base, self.log, self.mark = base, log, f"TFHALF_TEST_{uuid.uuid4().hex}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "apps.serve", f"--model_base_path={base}", "--port=0", "--rest_api_port=0",
             "--poll_seconds=0.2", f"--access_log={log}", *flags],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3", self.mark: "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        ready = self.wait_for(r"gRPC on 127\.0\.0\.1:(\d+), REST on http://127\.0\.0\.1:(\d+)", 300)
        self.grpc, self.rest = f"127.0.0.1:{ready[1]}", f"127.0.0.1:{ready[2]}"
        self.channel = grpc.insecure_channel(self.grpc)
        self.stub = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found
            time.sleep(0.05)
        raise AssertionError(f"{pattern} isn't in\n" + "\n".join(self.lines))

    def processes(self) -> dict[int, str]:
        """Every living process that this server began, with its command line."""
        found = {}
        for path in Path("/proc").iterdir():
            if path.name.isdigit():
                with contextlib.suppress(OSError):
                    if self.mark.encode() in (path / "environ").read_bytes():
                        found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def workers(self) -> list[int]:
        return [pid for pid, command in self.processes().items() if command.startswith("ray::ServeReplica:")]

    def stop(self) -> float:
        """Ends it as Ctrl-C does; returns the seconds that it took."""
        begin = time.monotonic()
        self.channel.close()
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        finally:
            self.kill()
        return time.monotonic() - begin

    def kill(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)

    def call(self, method: str, path: str, body=None, connection=None):
        """Returns status and what the JSON says."""
        own = connection or http.client.HTTPConnection(self.rest, timeout=30)
        own.request(method, path, body)
        response = own.getresponse()
        content = response.read()
        if connection is None:
            own.close()
        return response.status, json.loads(content)

    def predict(self, model: str, name: str, value, **spec):
        """Asks by the stock stub; returns version and outputs."""
        request = predict_pb2.PredictRequest()
        request.model_spec.name = model
        if "version" in spec:
            request.model_spec.version.value = spec["version"]
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
        answer = self.stub.Predict(request, timeout=30)
        outputs = {key: tf.make_ndarray(tensor) for key, tensor in answer.outputs.items()}
        return answer.model_spec.version.value, outputs


def publish(source: Path, target: Path) -> None:
    """As an export does: the folder appears in one rename."""
    part = target.with_name(f".part-{target.name}")
    shutil.copytree(source, part)
    part.rename(target)


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    """Makes versions of a model that adds its version to its input: an answer tells its version and its request."""
    folder = tmp_path_factory.mktemp("versions")

    @functools.cache
    def make(number: int) -> Path:
        inputs = keras.Input([4], name="x")
        bias = keras.initializers.Constant(float(number))
        layer = keras.layers.Dense(4, kernel_initializer="identity", bias_initializer=bias, name="y")
        tfhalf.export_saved_model(
            keras.Model(inputs, layer(inputs)), folder / str(number), inputs=np.ones([4, 4], "float32")
        )
        return folder / str(number)

    return make


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A model of strings with a table, two outputs and integers."""
    keys = tf.constant([b"good", b"bad"])
    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, tf.constant([1, 2])), 0)
    inputs = keras.Input([], dtype="int32", name="id")
    model = keras.Model(inputs, keras.layers.Dense(2, name="dense")(keras.layers.Embedding(3, 4, name="e")(inputs)))
    folder = tmp_path_factory.mktemp("words") / "1"
    tfhalf.export_saved_model(
        model,
        folder,
        inputs={"text": np.array(WORDS)},
        serve=lambda text: {"scores": model(table.lookup(text)), "upper": tf.strings.upper(text, encoding="utf-8")},
        input_signature={"text": tf.TensorSpec([None], tf.string)},
        resources=[table],
    )
    return folder


@pytest.fixture(scope="module")
def server(bundle, version, words, tmp_path_factory):
    base = tmp_path_factory.mktemp("serve") / "models"
    for name, source in (("pictures", bundle), ("words", words), ("adds", version(1))):
        (base / name).mkdir(parents=True)
        publish(source, base / name / "1")
    running = None
    try:
        running = Server(base, base.with_name("access.jsonl"), "--num_replicas=2", "--max_body_megabytes=1")
        yield running
    finally:
        if running is not None:
            running.kill()


class Traffic:
    """Clients that ask `adds` all the time, and check that each answer belongs to its request."""

    def __init__(self, server: Server, clients: int) -> None:
        self.server, self.failures, self.seen = server, [], collections.Counter()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self, number: int) -> None:
        random_numbers = np.random.default_rng(number)
        connection = http.client.HTTPConnection(self.server.rest, timeout=60)
        while not self._stop.is_set():
            x = random_numbers.integers(0, 100, [random_numbers.integers(1, 4), 4]).astype("float32")
            try:
                if number % 2:
                    version, outputs = self.server.predict("adds", "x", x)
                    y = outputs["y"]
                else:
                    body = json.dumps({"instances": x.tolist()})
                    status, answer = self.server.call("POST", "/v1/models/adds:predict", body, connection)
                    assert status == 200, answer
                    y = np.array(answer["predictions"])
                    version = round(float(y[0, 0] - x[0, 0]))
                # bfloat16 rounds what is below 128 by 0.25 at most: another version's or request's answer is found out.
                assert y.shape == x.shape
                assert np.max(np.abs(y - x - version)) < 0.3, (x, y)
                self.seen[version] += 1
            except Exception as error:  # whatever it is, it is a failed request
                self.failures.append(repr(error))
                connection.close()

    def wait_for(self, version: int, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.seen[version] and time.monotonic() < end:
            time.sleep(0.05)
        assert self.seen[version], (self.seen, self.failures[:3], self.server.lines)


def agree(bundle_folder: Path, inputs, outputs) -> None:
    """Holds answers to those of the library, in float32, within the bundle's tolerance."""
    manifest = tfhalf.Manifest.read(bundle_folder)
    tolerance = max(signature["tolerance"] for signature in manifest.signatures.values())
    for name, expected in tfhalf.load_saved_model(bundle_folder, "serving_float32")(inputs).items():
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(outputs[name], expected, atol=tolerance * max(1, np.abs(expected).max()))
        else:
            assert np.array(outputs[name]).tolist() == expected.tolist()


def test_greeting_tells_what_works(server):
    for name in ("pictures", "words", "adds"):
        server.wait_for(rf"^{name}: version 1, in (float32|bfloat16|float16)")
        server.wait_for(rf"^{name} version 1: in .*, loaded in [\d.]+ s$")
    server.wait_for(r"^\* serving_\w+ ")  # the table of dtypes, the chosen one marked
    line = server.wait_for(r"^.*curl .*:predict$")[0]
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    printed = subprocess.run(line, shell=True, capture_output=True, text=True, check=True).stdout
    assert json.loads(printed).keys() == {"predictions"}


def test_stock_stub_and_ovmsclient_get_the_librarys_answers(server, bundle, words, samples):
    version, outputs = server.predict("pictures", "picture", samples)
    assert version == 1
    agree(bundle, samples, outputs)
    _, outputs = server.predict("words", "text", WORDS, version=1)
    agree(words, np.array(WORDS), outputs)
    for make, address in ((ovmsclient.make_grpc_client, server.grpc), (ovmsclient.make_http_client, server.rest)):
        client = make(address)
        agree(bundle, samples, {"logits": client.predict({"picture": samples}, "pictures")})
        assert client.get_model_status("pictures") == {1: {"state": "AVAILABLE", "error_code": 0, "error_message": ""}}
    metadata = ovmsclient.make_grpc_client(server.grpc).get_model_metadata("words")
    assert metadata["model_version"] == 1
    assert metadata["inputs"] == {"text": {"shape": [-1], "dtype": "DT_STRING"}}
    texts = ovmsclient.make_grpc_client(server.grpc).predict({"text": WORDS[:4]}, "words")
    assert texts["upper"].tolist() == [text.decode().upper().encode() for text in WORDS[:4]]


def test_rest_speaks_rows_columns_and_bytes(server, bundle, words, samples):
    status, answer = server.call("POST", "/v1/models/pictures/versions/1:predict",
                                 json.dumps({"instances": samples.tolist()}))  # fmt: skip
    assert status == 200
    agree(bundle, samples, {"logits": np.array(answer["predictions"])})
    _, answer = server.call("POST", "/v1/models/words:predict", '{"inputs": ["good", {"b64": "YmFk"}]}')
    assert answer["outputs"]["upper"] == ["GOOD", "BAD"]
    agree(words, np.array([b"good", b"bad"]), answer["outputs"] | {"upper": np.array([b"GOOD", b"BAD"])})
    status, answer = server.call("GET", "/v1/models/words/metadata")
    assert answer["metadata"]["signature_def"]["signature_def"]["serving_default"]["inputs"].keys() == {"text"}
    assert server.call("GET", "/v1/models/nothing")[0] == 404
    assert server.call("GET", "/health") == (200, {"status": "ok"})


def test_every_port_is_on_loopback(server):
    inodes = set()
    for pid in server.processes():
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(os.readlink(link).removeprefix("socket:[").rstrip("]"))
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.append(fields[1].split(":")[0])
    assert len(listening) >= 4  # REST, gRPC, and Ray's own
    # 127.0.0.1, ::1, and 127.0.0.1 as an address of version 6, in the kernel's byte order.
    loopback = {"0100007F", "0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F"}
    assert set(listening) <= loopback


def test_new_version_is_swapped_in_and_a_bad_one_refused_without_a_failed_request(server, version):
    version(2)
    with Traffic(server, 6) as traffic:
        traffic.wait_for(1)
        shutil.copytree(version(1), server.base / "adds" / ".part")
        data = server.base / "adds" / ".part" / "variables" / "variables.data-00000-of-00001"
        content = bytearray(data.read_bytes())
        content[-1] ^= 1
        data.write_bytes(content)
        (server.base / "adds" / ".part").rename(server.base / "adds" / "3")
        server.wait_for(r"^adds version 3: refused: .*sha256 differs")
        publish(version(2), server.base / "adds" / "2")
        traffic.wait_for(2)
        time.sleep(0.5)
    assert traffic.failures == []
    assert len([line for line in server.lines if line.startswith("adds version 3: refused")]) == 1
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "adds"
    status = functools.partial(model_service_pb2_grpc.ModelServiceStub(server.channel).GetModelStatus, request)
    available, refused = get_model_status_pb2.ModelVersionStatus.AVAILABLE, get_model_status_pb2.ModelVersionStatus.END
    states, end = {}, time.monotonic() + 60
    while states != {1: available, 2: available, 3: refused} and time.monotonic() < end:
        time.sleep(0.1)  # each worker loads for itself; the one that is asked may not be ready
        known = {one.version: one for one in status(timeout=30).model_version_status}
        states = {number: one.state for number, one in known.items()}
    assert states == {1: available, 2: available, 3: refused}
    assert "sha256 differs" in known[3].status.error_message
    assert server.predict("adds", "x", np.zeros([1, 4], "float32"), version=1)[0] == 1
    assert server.call("POST", "/v1/models/adds/versions/3:predict", '{"instances": [[1, 2, 3, 4]]}')[0] == 404


def test_worker_that_is_killed_costs_no_request(server):
    before = server.workers()
    assert len(before) == 2
    with Traffic(server, 6) as traffic:
        time.sleep(0.5)
        os.kill(before[0], signal.SIGKILL)
        end = time.monotonic() + 240
        while len(set(server.workers()) - {before[0]}) < 2 and time.monotonic() < end:
            time.sleep(0.2)
        time.sleep(0.5)
    assert traffic.failures == []
    assert len(set(server.workers()) - {before[0]}) == 2  # another one was started
    assert sum(traffic.seen.values()) > 50


def test_access_log_and_metrics_tell_each_request(server):
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    last = [line for line in lines if line["model"] == "pictures" and line["method"] == "predict"][-1]
    assert (last["version"], last["status"], last["rows"], last["protocol"]) == (1, "OK", 6, "REST")
    assert last["signature"].startswith("serving_")
    assert max(line["batch_rows"] or 0 for line in lines) > 6  # requests were joined
    with contextlib.closing(http.client.HTTPConnection(server.rest)) as connection:
        connection.request("GET", "/monitoring/prometheus/metrics")
        text = connection.getresponse().read().decode()
    counted = sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("tfhalf_requests_total{"))
    assert counted == len(lines)


# Malformed requests

_ENDS = ("", ":predict", "/metadata", "/versions/1:predict", "/versions/999999999999999999999:predict", "/labels/a")
_NAMES = st.sampled_from(["words", "pictures", "adds", "none", "%00", "..%2f..", "é", "a" * 2000])
_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([{"b64": "%"}, {"b64": "AA=="}])
)
_JSON = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["x", "text", "picture"]), inner),
    max_leaves=10,
)
_BODIES = (
    st.binary(max_size=60)
    | _JSON.map(lambda value: json.dumps({"instances": value}).encode())
    | _JSON.map(lambda value: json.dumps({"inputs": value}).encode())
    | st.builds(lambda name: json.dumps({"signature_name": name, "inputs": [1]}).encode(), st.text())
    | st.sampled_from([b"[" * 50_000, b'{"inputs":' * 20_000, b"9" * 100_000])
)
_ANY = st.tuples(st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD"]), _NAMES, st.sampled_from(_ENDS), _BODIES)
_HTTP = _ANY | st.tuples(st.just("POST"), st.sampled_from(["words", "pictures", "adds"]), st.just(":predict"), _BODIES)


@st.composite
def grpc_requests(draw):
    """A PredictRequest that is broken in its tensors, its names, or its bytes."""
    request = predict_pb2.PredictRequest()
    model, name = draw(st.sampled_from([("words", "text"), ("pictures", "picture"), ("adds", "x"), ("none", "x")]))
    request.model_spec.name = model
    request.model_spec.signature_name = draw(st.sampled_from(["", "serving_default", "serving_float32", "x", "é"]))
    if draw(st.booleans()):
        request.model_spec.version.value = draw(st.sampled_from([0, 1, 7, -1, 2**63 - 1]))
    tensor = request.inputs[draw(st.sampled_from([name, name, name, "x", ""]))]
    tensor.dtype = draw(st.sampled_from([1, 3, 7, 9, 2, 10, 14, 19, 20, 21, 0, 101]))
    for size in draw(st.lists(st.sampled_from([-1, 0, 1, 2, 3, 4, 16, 2**20, 2**40, 2**63 - 1]), max_size=5)):
        tensor.tensor_shape.dim.add(size=size)
    tensor.tensor_content = draw(st.binary(max_size=20))
    tensor.float_val.extend(draw(st.lists(st.floats(width=32), max_size=3)))
    tensor.string_val.extend(draw(st.lists(st.binary(max_size=5), max_size=3)))
    body = bytearray(request.SerializeToString())
    for _ in range(draw(st.integers(0, 3)) if draw(st.booleans()) else 0):
        body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    return bytes(body)


class Fuzz:
    """Sends what is malformed; what comes back must be clean."""

    def __init__(self, server: Server) -> None:
        self.server, self.codes = server, collections.Counter()
        self.connection = http.client.HTTPConnection(server.rest, timeout=30)
        self.raw = server.channel.unary_unary("/tensorflow.serving.PredictionService/Predict")

    def http(self, method: str, model: str, end: str, body: bytes) -> None:
        self.connection.request(method, f"/v1/models/{quote(model, safe='%')}{end}", body)
        response = self.connection.getresponse()
        content = response.read()
        self.codes[response.status] += 1
        assert response.status == 200 or 400 <= response.status < 500, (response.status, content)
        if response.status != 200 and method != "HEAD" and response.headers["content-type"] == "application/json":
            assert json.loads(content).keys() == {"error"}

    def grpc(self, body: bytes) -> None:
        try:
            self.raw(body, timeout=30)
        except grpc.RpcError as error:
            code = error.code().name
        else:
            code = "OK"
        self.codes[code] += 1
        assert code in ("OK", "INVALID_ARGUMENT", "NOT_FOUND")

    def run(self, examples: int) -> None:
        """Sends this many to each protocol."""
        fast = settings(max_examples=examples, deadline=None, database=None,
                        suppress_health_check=list(HealthCheck))  # fmt: skip
        fast(given(_HTTP)(lambda case: self.http(*case)))()
        fast(given(grpc_requests())(self.grpc))()


def test_malformed_requests_get_clean_errors(server):
    workers = server.workers()
    fuzz = Fuzz(server)
    fuzz.run(150)
    assert fuzz.codes[400] > 5
    assert fuzz.codes["INVALID_ARGUMENT"] > 20
    assert server.workers() == workers  # nobody died of it
    too_large = b'{"instances": [' + b" " * 2**20 + b"]}"
    assert server.call("POST", "/v1/models/adds:predict", too_large)[0] == 413


# The client that comes with it


def run_client(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "examples" / "client.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def test_client_streams_a_folder(server, bundle, words, samples, tmp_path):
    for number, picture in enumerate(samples):
        np.save(tmp_path / f"{number}.npy", picture)
    (tmp_path / "6.npy").write_bytes(b"no array")
    np.save(tmp_path / "7.npy", samples[0, :8])
    for where in (["--rest", f"--address={server.rest}"], [f"--address={server.grpc}"]):
        result = run_client("--model=pictures", "--batch_size=4", *where, str(tmp_path))
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        assert result.returncode == 1, result.stderr
        assert [Path(line["item"]).stem for line in lines] == list("01234567"), result.stderr
        agree(bundle, samples, {"logits": np.array([line["outputs"]["logits"] for line in lines[:6]])})
        assert "can't be read" in lines[6]["error"]
        assert "input 'picture' must be float32" in lines[7]["error"]
    texts = "good\n\nbad\nété\n"
    # By REST it needs nothing but Python.
    away = (
        "import runpy, sys\nfor name in ('keras', 'tfhalf', 'tensorflow', 'grpc', 'numpy'): sys.modules[name] = None\n"
    )
    run = f"runpy.run_path({str(ROOT / 'examples' / 'client.py')!r}, run_name='__main__')"
    command = [sys.executable, "-c", away + run, "--model=words", "--rest", f"--address={server.rest}", "-"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, input=texts)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["item"], line["outputs"]["upper"]) for line in lines] == [
        ("-:1", "GOOD"), ("-:3", "BAD"), ("-:4", "ÉTÉ")]  # fmt: skip


def test_client_is_patient_and_says_when_nobody_is_there():
    begin = time.monotonic()
    result = run_client("--model=m", "--rest", "--address=127.0.0.1:9", "--retries=3", "-", input="a\n")
    assert result.returncode == 1
    assert result.stderr.startswith("error: 127.0.0.1:9: ConnectionRefusedError")
    assert time.monotonic() - begin > 0.05 + 0.1 + 0.2  # three pauses, each at least half as long as it may be


# The end of it, and bad beginnings


def test_ctrl_c_ends_everything(server):
    began = server.processes()
    assert len(began) >= 5
    assert server.stop() < 15
    assert server.process.returncode == 0
    assert server.processes() == {}
    assert not any("Traceback" in line for line in server.lines), server.lines


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "--model_base_path is missing"),
        (["--model_base_path=/does/not/exist"], "--model_base_path=/does/not/exist is no folder"),
        (["--model_base_path=MODEL"], "holds the versions of one model: name the folder above"),
        (["--model_base_path=VERSION"], "holds one version of a model: name the folder above"),
        (["--model_base_path=/", "--require_signature=/no.pub"], "--require_signature=/no.pub is no file"),
    ],
)
def test_bad_folders_are_told(given, message, bundle):
    values = flags.FlagValues()
    serve.define_flags(values)
    values(["serve", *(one.replace("MODEL", str(bundle.parent)).replace("VERSION", str(bundle)) for one in given)])
    with pytest.raises(runner.AppError, match=re.escape(message)):
        serve.options_of(values)


@pytest.mark.parametrize(
    ("example", "line"),
    [
        ({"text": ("it's é", [])}, """curl -d '{"instances": ["it\\u0027s é"]}' URL"""),
        ({"n": (3, []), "x": (0.5, [])}, """curl -d '{"instances": [{"n": 3, "x": 0.5}]}' URL"""),
        (
            {"x": (0.0, [2, 3])},
            """python3 -c 'import json; print(json.dumps({"instances": [[[0.0] * 3] * 2]}))' | curl -d @- URL""",
        ),
    ],
)
def test_line_for_a_shell(example, line):
    assert serve.curl("URL", example) == line


# Campaigns


def memory(server: Server) -> int:
    """Bytes in use by the server and its workers, without what they share."""
    total = 0
    for pid, command in server.processes().items():
        if "apps.serve" in command or command.startswith("ray::ServeReplica"):
            fields = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += int(re.search(r"Private_Dirty: +(\d+) kB", fields)[1]) * 1024
    return total


@pytest.fixture
def fresh(bundle, version, words, tmp_path):
    base = tmp_path / "models"
    for name, source in (("pictures", bundle), ("words", words), ("adds", version(1))):
        (base / name).mkdir(parents=True)
        publish(source, base / name / "1")
    running = None
    try:
        running = Server(base, tmp_path / "access.jsonl", "--num_replicas=2", "--max_body_megabytes=1")
        yield running
        assert running.stop() < 15
        assert running.processes() == {}
    finally:
        if running is not None:
            running.kill()


def same(seen, expected: np.ndarray, name: str) -> None:
    """Holds an answer to what plain TensorFlow makes of the bundle itself."""
    if expected.dtype.kind in "OS":
        texts = [[one.decode() for one in row] if isinstance(row, list) else row.decode() for row in expected.tolist()]
        plain = [one.decode() if isinstance(one, bytes) else one for one in np.asarray(seen, object).ravel()]
        assert plain == np.asarray(texts, object).ravel().tolist(), name
    elif expected.dtype.kind in "iub":
        assert np.asarray(seen).tolist() == expected.tolist(), name
    else:
        np.testing.assert_allclose(seen, expected, atol=1e-4 * max(1, np.abs(expected).max()), err_msg=name)


@pytest.mark.soak
def test_every_app_is_served_to_clients_of_others(app_bundles, tmp_path):
    running = Server(app_bundles, tmp_path / "access.jsonl", "--compute_dtype=float32", "--max_body_megabytes=256")
    try:
        by_grpc, by_rest = ovmsclient.make_grpc_client(running.grpc), ovmsclient.make_http_client(running.rest)
        models = sorted(path.name for path in app_bundles.iterdir() if (path / "1").is_dir())
        assert len(models) == len(contract.MODULES)
        for model in models:
            folder = app_bundles / model / "1"
            with np.load(folder / tfhalf.bundle.INPUTS) as file:
                inputs = {name.removeprefix("inputs/"): array[:2] for name, array in file.items()}
            plain = tf.saved_model.load(str(folder)).signatures["serving_float32"]
            expected = {
                name: tensor.numpy()
                for name, tensor in plain(**{name: tf.constant(array) for name, array in inputs.items()}).items()
            }
            request = predict_pb2.PredictRequest()
            request.model_spec.name = model
            for name, array in inputs.items():
                request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
            by_stub = running.stub.Predict(request, timeout=60).outputs
            lists = {
                name: [{"b64": base64.b64encode(one).decode()} for one in array.tolist()]
                if array.dtype.kind == "S"
                else array.tolist()
                for name, array in inputs.items()
            }
            (tmp_path / "body.json").write_text(json.dumps({"inputs": lists}))
            command = [
                "curl",
                "-sS",
                "-d",
                f"@{tmp_path}/body.json",
                f"http://{running.rest}/v1/models/{model}:predict",
            ]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            by_curl = json.loads(printed)["outputs"]
            texts = {name: array.tolist() if array.dtype.kind == "S" else array for name, array in inputs.items()}
            answers = [
                {name: tf.make_ndarray(tensor) for name, tensor in by_stub.items()},
                by_curl if len(expected) > 1 else {next(iter(expected)): by_curl},
            ]
            for client in (by_grpc, by_rest):
                answer = client.predict(texts, model)
                answers.append(answer if len(expected) > 1 else {next(iter(expected)): answer})
            for answer in answers:
                assert answer.keys() == expected.keys()
                for name, array in expected.items():
                    same(answer[name], array, f"{model} {name}")
            print(f"{model}: {', '.join(expected)}: stub, curl, ovmsclient by gRPC and REST agree with TensorFlow")
    finally:
        running.kill()


@pytest.mark.soak
def test_thousands_of_malformed_requests_leave_the_server_as_it_was(fresh):
    workers, fuzz = fresh.workers(), Fuzz(fresh)
    fuzz.run(500)
    before = memory(fresh)
    fuzz.run(3000)
    after = memory(fresh)
    print(
        f"\n{sum(fuzz.codes.values())} requests: {dict(fuzz.codes)}; {before / 1e6:.0f} MB, then {after / 1e6:.0f} MB"
    )
    assert sum(fuzz.codes.values()) >= 5000
    assert fresh.workers() == workers
    assert after < before + 60e6


@pytest.mark.soak
def test_hundred_clients_while_versions_come_and_a_worker_dies(fresh, version):
    for number in (2, 3, 4):
        version(number)
    begin = time.monotonic()
    with Traffic(fresh, 100) as traffic:
        for number in (2, 3, 4):
            time.sleep(12)
            publish(version(number), fresh.base / "adds" / str(number))
            traffic.wait_for(number)
            if number == 3:
                os.kill(fresh.workers()[0], signal.SIGKILL)
        time.sleep(max(1, 60 - (time.monotonic() - begin)))
    print(f"\n{sum(traffic.seen.values())} answers by version: {dict(traffic.seen)}, {len(traffic.failures)} failures")
    assert traffic.failures == []
    assert traffic.seen.keys() == {1, 2, 3, 4}
