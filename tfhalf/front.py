"""What the network sees: TensorFlow Serving's gRPC and REST, limits, health, metrics, and the access log.

Requests pass through as bytes: `ask` brings them to a worker (`tfhalf.serving`), which knows models. Here it is
decided who is let in: a body has a largest size, so many requests are under way and no more, each has a deadline, the
client's own or the server's. Both servers run in one event loop and listen on one address, loopback unless told
otherwise; they speak without TLS, so put a proxy in front for more.

Ray Serve has such servers itself. They aren't used: its gRPC server listens on every address of the machine, takes
2 GB, and answers INTERNAL to a malformed request, and its HTTP server collects a body before it asks whether it may.

The metrics are this process's: what it answered, not what workers computed.
"""

import asyncio
import contextlib
import dataclasses
import datetime
import json
import logging
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from tensorflow_serving.apis import model_service_pb2, prediction_service_pb2

from tfhalf import rest

_PATH = re.compile(r"/v1/models/(?P<model>[^/:]+)(?:/versions/(?P<number>\d{1,19}))?(?P<verb>:predict|/metadata)?")
_METRICS = "/monitoring/prometheus/metrics"
_SERVICES = (
    prediction_service_pb2.DESCRIPTOR.services_by_name["PredictionService"],
    model_service_pb2.DESCRIPTOR.services_by_name["ModelService"],
)
_METHODS = {
    f"/{service.full_name}/{name}": name
    for service in _SERVICES
    for name in ("Predict", "GetModelMetadata", "GetModelStatus")
    if name in service.methods_by_name
}
_GRACE_SECONDS = 3
_KEEP_ALIVE_SECONDS = 75  # clients keep connections; one that is closed just as they ask is a failed request
_DRAINED = 4  # times the largest body: so much of a larger one is read and forgotten
_MOST_DETAILS = 1000  # characters; gRPC's headers hold 8 KB
_LOOK_SECONDS, _UNHEALTHY_SECONDS = 1.0, 15.0
# Workers find the same version within this time, or what they tell is news.
_SAME_SECONDS, _MOST_TOLD = 120.0, 1000
_LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_log = logging.getLogger(__name__)

Ask = Callable[..., Any]


class NoWorkerError(Exception):
    """No worker lived long enough to answer."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Who is let in.

    Attributes:
        max_body_bytes: largest request.
        max_concurrency: most requests under way.
        deadline_seconds: longest time for one.
    """

    max_body_bytes: int = 64 * 2**20
    max_concurrency: int = 256
    deadline_seconds: float = 60.0


@dataclasses.dataclass
class _Request:
    """One request on its way, and what is told of it."""

    protocol: str
    method: str
    model: str = ""
    number: int = 0
    bytes_in: int = 0
    begin: float = dataclasses.field(default_factory=time.monotonic)


class Front:
    """Both servers.

    Args:
        ask: asks a worker: method, arguments, `seconds=`; as `serving.Workers.ask`.
        limits: who is let in.
        log: is given a line of JSON for each request; None for no access log.
        tell: is given what happened to the models, in lines.
    """

    def __init__(
        self,
        ask: Ask,
        limits: Limits,
        log: Callable[[str], None] | None,
        tell: Callable[[str], None],
    ) -> None:
        import prometheus_client  # comes with Ray Serve

        self._ask, self._limits, self._log, self._tell = ask, limits, log, tell
        self._active, self._seen = 0, float("-inf")
        self._told: dict[str, float] = {}
        self._registry = prometheus_client.CollectorRegistry()
        self._expose = prometheus_client.generate_latest
        here = {"registry": self._registry}
        labels = ("model", "version", "protocol", "method")
        self._count = prometheus_client.Counter(
            "tfhalf_requests", "Requests answered, by gRPC's code.", (*labels, "status"), **here
        )
        self._seconds = prometheus_client.Histogram(
            "tfhalf_request_seconds", "From the request to its answer.", labels, buckets=_LATENCIES, **here
        )
        self._rows = prometheus_client.Histogram(
            "tfhalf_batch_rows", "Rows that ran together, one value a request.", ("model", "version"),
            buckets=_BATCHES, **here,
        )  # fmt: skip
        active = prometheus_client.Gauge("tfhalf_requests_active", "Requests under way.", **here)
        active.set_function(lambda: self._active)

    @contextlib.asynccontextmanager
    async def listening(self, host: str, rest_port: int, grpc_port: int) -> AsyncIterator[tuple[int, int]]:
        """Runs both servers for a block.

        Args:
            host: the address to listen on.
            rest_port: REST's port, 0 for a free one.
            grpc_port: gRPC's port, 0 for a free one.

        Yields:
            Both ports.

        Raises:
            OSError: a port can't be had.
        """
        http, listener = _http_server(self._http, host, rest_port)
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self._limits.max_body_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # else a second server could share the port without a word
            ],
            # gRPC reads a request before it is counted in; more than these aren't even read.
            maximum_concurrent_rpcs=2 * self._limits.max_concurrency,
        )
        server.add_generic_rpc_handlers((_Handler(self._grpc),))
        try:
            bound = server.add_insecure_port(f"[{host}]:{grpc_port}" if ":" in host else f"{host}:{grpc_port}")
        except RuntimeError as error:
            listener.close()
            raise OSError(f"port {grpc_port} can't be listened on") from error
        await server.start()
        tasks = [asyncio.create_task(http.serve(sockets=[listener])), asyncio.create_task(self._watch())]
        try:
            yield listener.getsockname()[1], bound
        finally:
            http.should_exit = True
            tasks[1].cancel()
            await server.stop(_GRACE_SECONDS)
            await asyncio.wait(tasks, timeout=2 * _GRACE_SECONDS)

    async def _watch(self) -> None:
        """Looks at a worker again and again: is one there, and what happened to the models."""
        while True:
            try:
                with contextlib.suppress(TimeoutError):  # /health says so
                    about = await self._ask("describe", seconds=_UNHEALTHY_SECONDS)
                    self._seen = time.monotonic()
                    self.tell_news(about["events"])
            except Exception:  # as long as this process lives it must go on looking
                _log.exception("a worker can't be looked at")
            await asyncio.sleep(_LOOK_SECONDS)

    def tell_news(self, events: list[tuple[str, str, float]]) -> None:
        """Tells what wasn't told before: each worker reports the same, at about the same time.

        Args:
            events: key, the same in all workers; text; time, as of `time.time`.
        """
        for key, text, when in events:
            if when > self._told.get(key, float("-inf")) + _SAME_SECONDS:
                self._told.pop(key, None)
                self._told[key] = when
                self._tell(text)
        while len(self._told) > _MOST_TOLD:
            del self._told[next(iter(self._told))]

    async def _pass_on(self, request: _Request, method: str, body: bytes, seconds: float):
        """Asks a worker; returns code, body, and what is known of the request."""
        try:
            answer = await self._ask("answer", method, request.model, request.number, body, seconds, seconds=seconds)
            return answer.code, answer.body, answer.about
        except TimeoutError:
            return "DEADLINE_EXCEEDED", f"no answer within {seconds:.3g} s".encode(), {}
        except NoWorkerError as error:
            return "UNAVAILABLE", str(error).encode(), {}
        except Exception:  # a mistake of ours: the client learns that it isn't theirs
            _log.exception("%s failed", method)
            return "INTERNAL", b"the server failed; its log says why", {}

    @contextlib.contextmanager
    def _admitted(self):
        """Counts a request in; gives whether it may come in."""
        if self._active >= self._limits.max_concurrency:
            yield False
            return
        self._active += 1
        try:
            yield True
        finally:
            self._active -= 1

    def _account(self, request: _Request, code: str, bytes_out: int, about: dict) -> None:
        """Counts an answer, and writes its line."""
        seconds = time.monotonic() - request.begin
        # Names that clients made up are no labels: there would be no end of them.
        model, version = about.get("model", ""), str(about.get("version", ""))
        self._count.labels(model, version, request.protocol, request.method, code).inc()
        self._seconds.labels(model, version, request.protocol, request.method).observe(seconds)
        if "batch_rows" in about:
            self._rows.labels(model, version).observe(about["batch_rows"])
        if self._log is None:
            return
        line = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "protocol": request.protocol,
            "method": request.method,
            "model": about.get("model", request.model),
            "version": about.get("version"),
            "signature": about.get("signature"),
            "status": code,
            "milliseconds": round(seconds * 1e3, 3),
            "rows": about.get("rows"),
            "batch_rows": about.get("batch_rows"),
            "bytes_in": request.bytes_in,
            "bytes_out": bytes_out,
        }
        try:
            self._log(json.dumps(line))
        except OSError as error:  # a full disk is no reason to answer nothing
            self._log = None
            _log.error("the access log can't be written any more (%s)", error.strerror)

    # gRPC

    async def _grpc(self, name: str, body: bytes, context: grpc.aio.ServicerContext) -> bytes:
        request = _Request("gRPC", name, bytes_in=len(body))
        remaining = context.time_remaining()
        seconds = self._limits.deadline_seconds
        if remaining is not None:
            seconds = max(0.0, min(seconds, remaining))
        code, answer, about = "CANCELLED", b"", {}
        try:
            with self._admitted() as is_in:
                if is_in:
                    code, answer, about = await self._pass_on(request, f"grpc/{name}", body, seconds)
                else:
                    code, answer = "RESOURCE_EXHAUSTED", self._full()
        finally:
            self._account(request, code, len(answer), about)
        if code != "OK":
            await context.abort(grpc.StatusCode[code], answer[:_MOST_DETAILS].decode(errors="ignore"))
        return answer

    def _full(self) -> bytes:
        return f"{self._limits.max_concurrency} requests are under way already; try again later".encode()

    # HTTP

    async def _http(self, scope: dict, receive: Callable, send: Callable) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            return
        method, path = scope["method"], scope["path"]
        if path in ("/health", _METRICS):
            await self._about_itself(path, method, send)
            return
        request = _Request("REST", method)
        code, status, answer, about, headers = "CANCELLED", 499, b"", {}, []
        try:
            with self._admitted() as is_in:
                if is_in:
                    code, status, answer, about, headers = await self._rest(request, scope, receive)
                else:
                    code, status, answer, headers = "RESOURCE_EXHAUSTED", 429, self._full(), [(b"retry-after", b"1")]
            if code == "DISCONNECTED":
                return
            if code != "OK":
                answer = rest.error_answer(answer.decode(errors="replace"))
                if status in (408, 413, 429):  # the rest of the body isn't read
                    headers = [*headers, (b"connection", b"close")]
            await _send(send, status, answer, b"application/json", headers)
        finally:
            self._account(request, code, len(answer), about)

    async def _rest(self, request: _Request, scope: dict, receive: Callable):
        """Returns code, status, body, what is known of the request, headers."""
        match = _PATH.fullmatch(scope["path"])
        if match is None:
            known = "/v1/models/<model>[/versions/<number>] with :predict, /metadata or nothing"
            return "NOT_FOUND", 404, f"there is nothing here; there is {known}".encode(), {}, []
        verb = (match["verb"] or "/status")[1:]
        request.model, request.number, request.method = match["model"], int(match["number"] or 0), verb
        wanted = "POST" if verb == "predict" else "GET"
        if scope["method"] != wanted:
            allow = [(b"allow", wanted.encode())]
            return "UNIMPLEMENTED", 405, f"{verb} is asked for by {wanted}".encode(), {}, allow
        if request.number >= 2**63:
            return "INVALID_ARGUMENT", 400, b"the version's number is too large", {}, []
        begin = time.monotonic()
        try:
            async with asyncio.timeout(self._limits.deadline_seconds):
                body = await _read_body(scope, receive, self._limits.max_body_bytes)
        except TimeoutError:
            return "DEADLINE_EXCEEDED", 408, b"the request didn't come in time", {}, []
        except _TooLargeError as error:
            return "RESOURCE_EXHAUSTED", 413, str(error).encode(), {}, []
        if body is None:
            return "DISCONNECTED", 499, b"", {}, []
        request.bytes_in = len(body)
        seconds = max(0.0, self._limits.deadline_seconds - (time.monotonic() - begin))
        code, answer, about = await self._pass_on(request, f"rest/{verb}", body, seconds)
        return code, rest.HTTP_STATUS[code], answer, about, []

    async def _about_itself(self, path: str, method: str, send: Callable) -> None:
        if method not in ("GET", "HEAD"):
            await _send(send, 405, rest.error_answer("ask by GET"), b"application/json", [(b"allow", b"GET")])
        elif path == _METRICS:
            await _send(send, 200, self._expose(self._registry), b"text/plain; version=0.0.4; charset=utf-8", [])
        elif time.monotonic() - self._seen < _UNHEALTHY_SECONDS:
            await _send(send, 200, rest.as_json({"status": "ok"}), b"application/json", [])
        else:
            await _send(send, 503, rest.error_answer("no worker answers"), b"application/json", [])


class _TooLargeError(Exception):
    pass


async def _read_body(scope: dict, receive: Callable, most: int) -> bytes | None:
    """The request's body; None where the client has gone."""
    told = dict(scope["headers"]).get(b"content-length", b"")
    message = f"the request has more than the {most} bytes that it may have"
    if told.isdigit() and int(told[:20]) > _DRAINED * most:
        raise _TooLargeError(message)
    parts, size = [], 0
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            return None
        size += len(event.get("body", b""))
        if size <= most:
            parts.append(event.get("body", b""))
        else:  # a client that sends all before it reads would find the connection closed, and not why
            parts.clear()
        is_last = not event.get("more_body", False)
        if size > most and (is_last or size > _DRAINED * most):
            raise _TooLargeError(message)
        if is_last:
            return b"".join(parts)


async def _send(send: Callable, status: int, body: bytes, kind: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    own = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})


def _http_server(application: Callable, host: str, port: int):
    """A server of HTTP that leaves signals alone, and its listening socket."""
    import uvicorn  # comes with Ray Serve

    class Server(uvicorn.Server):
        """The program's own handlers of signals stop it."""

        capture_signals = contextlib.nullcontext

    config = uvicorn.Config(
        application,
        interface="asgi3",
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    # asyncio does so only for sockets made with TCP's number; else an answer's body waits 40 ms for its head's receipt.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Server(config), listener


class _Handler(grpc.GenericRpcHandler):
    """Hands a method's bytes on; other methods are unimplemented."""

    def __init__(self, answer: Callable) -> None:
        self._answer = answer

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Finds the handler of a method."""
        name = _METHODS.get(details.method)
        if name is None:
            return None

        async def handle(body: bytes, context: grpc.aio.ServicerContext) -> bytes:
            return await self._answer(name, body, context)

        return grpc.unary_unary_rpc_method_handler(handle)
