"""Both servers before workers that are made up: who is let in, what is answered, counted and logged."""

import asyncio
import contextlib
import http.client
import json
import socket

import grpc
import pytest
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from tfhalf import front
from tfhalf.serving import Answer


class Asked:
    """Workers: answers, fails or waits as a test says."""

    def __init__(self):
        self.calls, self.gate, self.is_lost = [], asyncio.Event(), False
        self.events = [("key", "m version 3: loaded", 1000.0)]
        self.gate.set()
        self.answer = Answer("OK", b"{}", {"model": "m", "version": 3, "signature": "serving_float32", "rows": 2,
                                           "batch_rows": 8})  # fmt: skip

    async def __call__(self, method, *arguments, seconds):
        if method == "describe":
            if self.is_lost:
                raise TimeoutError
            return {"events": self.events, "models": {}}
        self.calls.append((arguments, seconds))
        async with asyncio.timeout(seconds):
            await self.gate.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    monkeypatch.setattr(front, "_LOOK_SECONDS", 0.05)


def with_servers(body, **limits):
    """Runs `body(asked, rest port, gRPC port, lines, told)` beside running servers."""

    async def run():
        asked, lines, told = Asked(), [], []
        servers = front.Front(asked, front.Limits(**limits), lines.append, told.append)
        async with servers.listening("127.0.0.1", 0, 0) as (rest_port, grpc_port):
            await body(asked, rest_port, grpc_port, lines, told)

    asyncio.run(asyncio.wait_for(run(), 30))


def call(port, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read(), dict(response.headers)


async def http_call(*arguments, **more):
    return await asyncio.to_thread(call, *arguments, **more)


def test_requests_pass_and_leave_a_line():
    async def body(asked, rest_port, _, lines, told):
        path = "/v1/models/m/versions/3:predict"
        assert (await http_call(rest_port, "POST", path, b'{"a": 1}'))[:2] == (200, b"{}")
        assert asked.calls[0][0][:4] == ("rest/predict", "m", 3, b'{"a": 1}')
        line = json.loads(lines[0])
        assert line | {"time": 0, "milliseconds": 0} == {
            "time": 0, "protocol": "REST", "method": "predict", "model": "m", "version": 3,
            "signature": "serving_float32", "status": "OK", "milliseconds": 0, "rows": 2, "batch_rows": 8,
            "bytes_in": 8, "bytes_out": 2,
        }  # fmt: skip
        metrics = (await http_call(rest_port, "GET", "/monitoring/prometheus/metrics"))[1].decode()
        labels = 'method="predict",model="m",protocol="REST",status="OK",version="3"'
        assert f"tfhalf_requests_total{{{labels}}} 1.0" in metrics
        assert 'tfhalf_batch_rows_bucket{le="8.0",model="m",version="3"} 1.0' in metrics
        assert 'tfhalf_batch_rows_bucket{le="4.0",model="m",version="3"} 0.0' in metrics
        await asyncio.sleep(0.2)
        assert told == ["m version 3: loaded"]  # once
        asked.events = [*asked.events, ("key", "the same of another worker", 1030.0), ("key", "again", 2000.0)]
        await asyncio.sleep(0.2)
        assert told == ["m version 3: loaded", "again"]
        assert (await http_call(rest_port, "GET", "/health"))[:2] == (200, b'{"status":"ok"}')

    with_servers(body)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/models/", 404),
        ("POST", "/v1/models/m:classify", 404),
        ("POST", "/v1/models/m/versions/x:predict", 404),
        ("POST", "/v1/models/m/labels/stable:predict", 404),
        ("GET", "/v1/models/m:predict", 405),
        ("POST", "/v1/models/m/metadata", 405),
        ("PUT", "/health", 405),
        ("POST", f"/v1/models/m/versions/{10**19 - 1}:predict", 400),
        ("POST", "/v1/models/%2e%2e%2fm:predict", 404),
    ],
)
def test_what_is_not_there_is_said_in_json(method, path, status):
    async def body(asked, rest_port, *_):
        found, content, _ = await http_call(rest_port, method, path, b"{}")
        assert found == status
        assert json.loads(content).keys() == {"error"}
        assert not asked.calls

    with_servers(body)


@pytest.mark.parametrize(
    ("code", "status"),
    [("INVALID_ARGUMENT", 400), ("NOT_FOUND", 404), ("RESOURCE_EXHAUSTED", 429), ("DEADLINE_EXCEEDED", 504)],
)
def test_workers_errors_have_their_status(code, status):
    async def body(asked, rest_port, grpc_port, lines, _):
        asked.answer = Answer(code, "não".encode(), {})
        found, content, _ = await http_call(rest_port, "POST", "/v1/models/m:predict", b"{}")
        assert (found, json.loads(content)) == (status, {"error": "não"})
        error = await failing_predict(grpc_port)
        assert (error.code(), error.details()) == (grpc.StatusCode[code], "não")
        assert [json.loads(line)["status"] for line in lines] == [code] * 2

    with_servers(body)


@contextlib.asynccontextmanager
async def stub(port):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield prediction_service_pb2_grpc.PredictionServiceStub(channel)


async def failing_predict(port, content=b"", timeout=10, method="Predict"):
    request = predict_pb2.PredictRequest()
    request.inputs["x"].tensor_content = content
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        raw = channel.unary_unary(f"/tensorflow.serving.PredictionService/{method}")
        with pytest.raises(grpc.RpcError) as caught:
            await raw(request.SerializeToString(), timeout=timeout)
    return caught.value


def test_grpc_passes_bytes_and_knows_its_methods():
    async def body(asked, _, grpc_port, lines, __):
        asked.answer.body = predict_pb2.PredictResponse().SerializeToString()
        request = predict_pb2.PredictRequest()
        request.model_spec.name = "m"
        async with stub(grpc_port) as stubs:
            await stubs.Predict(request, timeout=5)
        for method in ("Classify", "Regress", "MultiInference", "GetModelStatus", "Nothing"):
            error = await failing_predict(grpc_port, method=method)
            assert error.code() == grpc.StatusCode.UNIMPLEMENTED
        assert asked.calls[0][0][:4] == ("grpc/Predict", "", 0, request.SerializeToString())
        assert asked.calls[0][1] <= 5  # the client's own deadline
        assert json.loads(lines[0])["protocol"] == "gRPC"

    with_servers(body)


def test_too_large_is_refused_before_it_is_read():
    async def body(asked, rest_port, grpc_port, *_):
        path = "/v1/models/m:predict"
        status, content, _ = await http_call(rest_port, "POST", path, b"x" * 2000)
        assert status == 413
        assert "more than the 1000 bytes" in json.loads(content)["error"]
        chunks = iter([b"x" * 600] * 3)
        assert (await http_call(rest_port, "POST", path, chunks))[0] == 413
        # It only says that it is large.
        assert (await http_call(rest_port, "POST", path, b"", {"Content-Length": str(10**12)}))[0] == 413
        assert (await failing_predict(grpc_port, b"x" * 2000)).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not asked.calls

    with_servers(body, max_body_bytes=1000)


def test_too_many_are_turned_away_and_then_let_in_again():
    async def body(asked, rest_port, grpc_port, lines, _):
        path = "/v1/models/m:predict"
        asked.gate.clear()
        inside = [asyncio.create_task(http_call(rest_port, "POST", path, b"{}")) for _ in range(2)]
        while len(asked.calls) < 2:
            await asyncio.sleep(0.01)
        status, content, headers = await http_call(rest_port, "POST", path, b"{}")
        assert (status, headers["retry-after"]) == (429, "1")
        assert "2 requests are under way already" in json.loads(content)["error"]
        assert (await failing_predict(grpc_port)).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await http_call(rest_port, "GET", "/health"))[0] == 200
        asked.gate.set()
        assert [(await task)[0] for task in inside] == [200, 200]
        assert (await http_call(rest_port, "POST", path, b"{}"))[0] == 200

    with_servers(body, max_concurrency=2)


def test_deadlines():
    async def body(asked, rest_port, grpc_port, lines, _):
        asked.gate.clear()
        assert (await http_call(rest_port, "POST", "/v1/models/m:predict", b"{}"))[0] == 504
        assert (await failing_predict(grpc_port)).code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert (await failing_predict(grpc_port, timeout=0.05)).code() == grpc.StatusCode.DEADLINE_EXCEEDED

        def half_a_request():
            with socket.create_connection(("127.0.0.1", rest_port), timeout=10) as connection:
                connection.sendall(b"POST /v1/models/m:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc")
                return connection.recv(1000)

        assert b" 408 " in await asyncio.to_thread(half_a_request)

    with_servers(body, deadline_seconds=0.3)


def test_mistakes_of_ours_are_not_the_clients(caplog):
    async def body(asked, rest_port, grpc_port, *_):
        asked.answer = RuntimeError("a secret")
        status, content, _ = await http_call(rest_port, "POST", "/v1/models/m:predict", b"{}")
        assert status == 500
        assert b"secret" not in content
        error = await failing_predict(grpc_port)
        assert error.code() == grpc.StatusCode.INTERNAL
        assert "secret" not in error.details()

    with_servers(body)
    assert "a secret" in caplog.text


def test_health_follows_the_workers(monkeypatch):
    monkeypatch.setattr(front, "_UNHEALTHY_SECONDS", 0.5)

    async def body(asked, rest_port, *_):
        for is_lost, expected in ((False, 200), (True, 503), (False, 200)):
            asked.is_lost = is_lost
            await asyncio.sleep(1)
            assert (await http_call(rest_port, "GET", "/health"))[0] == expected

    with_servers(body)


def test_access_log_on_a_full_disk_costs_no_answer(caplog):
    async def run():
        def full(_):
            raise OSError(28, "No space left on device")

        asked = Asked()
        asked.answer.body = predict_pb2.PredictResponse().SerializeToString()
        servers = front.Front(asked, front.Limits(), full, print)
        async with servers.listening("127.0.0.1", 0, 0) as (rest_port, grpc_port):
            assert (await http_call(rest_port, "POST", "/v1/models/m:predict", b"{}"))[0] == 200
            async with grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
                raw = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
                assert await raw(b"", timeout=10) == b""

    asyncio.run(run())
    assert caplog.text.count("the access log can't be written any more (No space left on device)") == 1


def test_long_messages_are_cut_to_what_grpc_carries():
    async def body(asked, _, grpc_port, *__):
        asked.answer = Answer("INVALID_ARGUMENT", ("\U0001f600" * 5000).encode(), {})
        for _ in range(3):
            assert (await failing_predict(grpc_port)).code() == grpc.StatusCode.INVALID_ARGUMENT

    with_servers(body)


def test_unhealthy_without_workers():
    async def body(asked, rest_port, *_):
        status, content, _ = await http_call(rest_port, "GET", "/health")
        assert status == 503
        assert json.loads(content) == {"error": "no worker answers"}

    async def run():
        async def nobody(*_, seconds):
            raise TimeoutError

        servers = front.Front(nobody, front.Limits(), None, print)
        async with servers.listening("127.0.0.1", 0, 0) as (rest_port, _):
            await body(None, rest_port)

    asyncio.run(run())


def test_answers_are_sent_at_once(monkeypatch):
    accept, without_delay = socket.socket.accept, []

    def accept_and_look(listener):
        connection, address = accept(listener)
        without_delay.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        return connection, address

    async def body(asked, rest_port, *_):
        await http_call(rest_port, "GET", "/health")
        assert any(without_delay)
        assert all(without_delay)

    monkeypatch.setattr(socket.socket, "accept", accept_and_look)
    with_servers(body)


def test_taken_ports_are_an_error():
    async def run(**ports):
        servers = front.Front(Asked(), front.Limits(), None, print)
        with pytest.raises(OSError, match=r"in use|can't be listened on"):
            async with servers.listening("127.0.0.1", ports.get("rest", 0), ports.get("grpc", 0)):
                pass

    with socket.create_server(("127.0.0.1", 0)) as taken:
        for name in ("rest", "grpc"):
            asyncio.run(run(**{name: taken.getsockname()[1]}))
