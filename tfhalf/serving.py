"""Workers that answer TensorFlow Serving's requests, as a deployment of Ray Serve, and the way to reach them.

Each worker holds every model of a base folder (`tfhalf.versions`, `tfhalf.engine`), looks for new versions, and answers
requests as they came, JSON or protobuf, so that what reads, checks and computes grows with the number of workers.
What takes requests from the network is `tfhalf.front`; it knows nothing of models.

Ray starts a worker again that died, and spreads them over the machines of its cluster. Its handle raises when a
worker dies while it has a request: `Workers.ask` then asks another one, as long as the deadline lets it. A prediction
changes nothing, so asking twice is safe.

Ray is imported only when it is needed: `pip install tfhalf[serve]`.
"""

import asyncio
import contextlib
import dataclasses
import functools
import gc
import itertools
import logging
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import message
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, predict_pb2

from tfhalf import batching, engine, front, rest, rpc, versions

APP = "tfhalf"
_LOOPBACK = "127.0.0.1"
_RETRY_SECONDS, _LONGEST_RETRY_SECONDS, _MOST_DEATHS = 0.1, 2.0, 3
_SPARE = 8  # calls to a worker beside requests: is it well?
_STOP_SECONDS = 2.0
_STARTS = 3
_TELL_SECONDS = 15.0
_STORE_BYTES = 256 * 2**20
_EVENTS = 200


class ServingError(Exception):
    """The server can't be started; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What workers are told.

    Attributes:
        model_base_path: the base folder; on several machines all of them see it under this name.
        num_replicas: workers, 1 or more.
        compute_dtype: one of `engine.COMPUTE_DTYPES`.
        require_signature: a public key (PEM); versions that it hasn't signed are refused. "" for none.
        max_batch_size: most rows of a joined batch, 1 or more.
        batch_timeout_milliseconds: longest time that a request waits for others, 0 or more.
        keep_versions: newest versions of each model that are served, 1 or more.
        poll_seconds: time between two looks at the base folder, above 0.
        max_concurrency: most requests that are under way, 1 or more.
        max_body_bytes: largest request, 1 or more.
        ray_address: a running Ray cluster's address, or "" for a Ray of our own that ends with us.
    """

    model_base_path: str
    num_replicas: int = 1
    compute_dtype: str = engine.AUTO
    require_signature: str = ""
    max_batch_size: int = 32
    batch_timeout_milliseconds: float = 5.0
    keep_versions: int = 2
    poll_seconds: float = 1.0
    max_concurrency: int = 256
    max_body_bytes: int = 64 * 2**20
    ray_address: str = ""


@dataclasses.dataclass
class Answer:
    """What a worker answers.

    Attributes:
        code: gRPC's name, "OK" or what went wrong.
        body: the answer, or the message in UTF-8.
        about: what the access log tells: model, version, signature, rows that ran together; only what is known.
    """

    code: str
    body: bytes
    about: dict[str, Any]


class Worker:
    """Holds every model, and answers requests. Ray runs it; it works without Ray as well."""

    def __init__(self, options: Options) -> None:
        _listen_on_loopback_only()
        self._options = options
        self._events: list[tuple[str, str, float]] = []
        base = Path(options.model_base_path)
        self._keeper = versions.Keeper(base, self._load, options.keep_versions, self._report)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="parse")
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._batcher = batching.Batcher(
            options.max_batch_size, options.batch_timeout_milliseconds / 1e3, os.cpu_count() or 1
        )
        self._keeper.poll()
        threading.Thread(target=self._poll_for_ever, name="poll", daemon=True).start()

    def _load(self, model: str, number: int, folder: Path) -> engine.Loaded:
        begin = time.monotonic()
        loaded = engine.Loaded(folder, self._options.compute_dtype, self._options.require_signature or None)
        which = f"{model} version {number}"
        lines = [f"{which}: in {loaded.compute_dtypes}, loaded in {time.monotonic() - begin:.1f} s"]
        if loaded.table:
            lines += engine.as_table(loaded.table, loaded.base)
        lines += [f"{which}: {note}" for note in loaded.notes]
        self._report("\n".join(lines), f"{which}: loaded")
        return loaded

    def _report(self, event: str, key: str = "") -> None:
        """Notes what happened; the key is the same in all workers, which measured other times."""
        self._events = [*self._events[1 - _EVENTS :], (key or event, event, time.time())]

    def _poll_for_ever(self) -> None:
        while True:
            time.sleep(self._options.poll_seconds)
            self._poll()

    def _poll(self) -> None:
        before = self._keeper.models
        self._keeper.poll()
        if self._keeper.models is not before:
            gc.collect()  # functions and their graphs refer to each other; a version that has gone should be gone

    async def describe(self) -> dict[str, Any]:
        """Returns this worker's process, what it serves, and what happened lately."""
        models: dict[str, dict[int, dict[str, Any]]] = {}
        for name, known in self._keeper.models.items():
            models[name] = {number: {"state": one.state, "error": one.error} for number, one in known.items()}
            for number, one in known.items():
                if one.loaded is not None:
                    about = {"compute_dtypes": one.loaded.compute_dtypes, "example": one.loaded.example()}
                    models[name][number] |= about
        return {"pid": os.getpid(), "models": models, "events": self._events}

    async def answer(self, method: str, model: str, number: int, body: bytes, seconds: float) -> Answer:
        """Answers a request.

        Args:
            method: "rest/predict", "rest/metadata" or "rest/status", or gRPC's name, as "grpc/Predict".
            model: which model; gRPC's requests say that themselves.
            number: which version, 0 for the newest.
            body: the request as it came.
            seconds: how long somebody waits for the answer.
        """
        about: dict[str, Any] = {}
        try:
            call = getattr(self, "_" + method.replace("/", "_").lower())
            return Answer("OK", await call(model, number, body, time.monotonic() + seconds, about), about)
        except rest.RequestError as error:
            return Answer(error.code, str(error).encode(errors="replace"), about)
        except batching.DeadlineError as error:
            return Answer("DEADLINE_EXCEEDED", str(error).encode(), about)

    async def _rest_predict(self, model: str, number: int, body: bytes, deadline: float, about: dict) -> bytes:
        loaded = await self._find(model, number, about)
        function, arrays, are_rows = await self._in_thread(_parse_json, loaded, body)
        about["signature"] = function.name
        outputs, rows = await self._run(function, arrays, deadline, about)
        return await self._in_thread(rest.predict_answer, outputs, rows if are_rows else None)

    async def _grpc_predict(self, model: str, number: int, body: bytes, deadline: float, about: dict) -> bytes:
        request = await self._in_thread(rpc.parse, predict_pb2.PredictRequest, body)
        spec = request.model_spec
        loaded = await self._find(spec.name, spec.version.value, about)
        function = loaded.function(spec.signature_name)
        about["signature"] = function.name
        arrays = await self._in_thread(rpc.inputs_of, request, function.specs, self._options.max_body_bytes)
        only = list(request.output_filter)
        outputs, _ = await self._run(function, arrays, deadline, about)
        name = spec.signature_name or "serving_default"
        return await self._in_thread(rpc.predict_answer, outputs, only, spec.name, loaded.number, name)

    async def _run(self, function: engine.Function, arrays, deadline: float, about: dict):
        rows = min((len(array) for array in arrays.values() if array.ndim), default=1)
        is_joinable = function.is_joinable and all(len(array) == rows for array in arrays.values())
        outputs, about["batch_rows"] = await self._batcher.run(function, arrays, rows, deadline, is_joinable)
        about["rows"] = rows
        return outputs, rows

    async def _rest_metadata(self, model: str, number: int, body: bytes, deadline: float, about: dict) -> bytes:
        loaded = await self._find(model, number, about)
        return rpc.metadata_json(rpc.metadata_answer(model, loaded.number, loaded.signature_defs))

    async def _grpc_getmodelmetadata(self, model: str, number: int, body: bytes, deadline: float, about: dict) -> bytes:
        request = rpc.parse(get_model_metadata_pb2.GetModelMetadataRequest, body)
        rpc.require_signatures(request)
        loaded = await self._find(request.model_spec.name, request.model_spec.version.value, about)
        answer = rpc.metadata_answer(request.model_spec.name, loaded.number, loaded.signature_defs)
        return answer.SerializeToString()

    async def _rest_status(self, model: str, number: int, body: bytes, deadline: float, about: dict) -> bytes:
        return rpc.status_json(self._status(model, number, about))

    async def _grpc_getmodelstatus(self, model: str, number: int, body: bytes, deadline: float, about: dict) -> bytes:
        request = rpc.parse(get_model_status_pb2.GetModelStatusRequest, body)
        return self._status(request.model_spec.name, request.model_spec.version.value, about).SerializeToString()

    def _status(self, model: str, number: int, about: dict) -> message.Message:
        answer = rpc.status_answer(model, self._keeper.models.get(model, {}), number)
        about["model"] = model
        return answer

    async def _find(self, model: str, number: int, about: dict) -> engine.Loaded:
        loaded = self._keeper.find(model, number)
        if loaded is None and await self._in_thread(self._keeper.may_come, model, number):
            # Another worker may have it already, and have told so: what is new on disk is loaded before it is denied.
            await asyncio.get_running_loop().run_in_executor(self._loader, self._poll)
            loaded = self._keeper.find(model, number)
        if loaded is None:
            refused = self._keeper.models.get(model, {}).get(number)
            why = f": it was refused: {refused.error}" if refused and refused.error else ""
            raise rest.RequestError("NOT_FOUND", rpc.missing(model, number) + why)
        about |= {"model": model, "version": loaded.number}
        return loaded

    async def _in_thread(self, function: Callable, *arguments):
        """Runs what may take a while for a large request beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(function, *arguments))


def _parse_json(loaded: engine.Loaded, body: bytes) -> tuple[engine.Function, dict[str, np.ndarray], bool]:
    """The function that a body asks for, its inputs, and whether they came as rows.

    In one go: what JSON becomes in Python is many times as large, and mustn't wait for others that are parsed.
    """
    payload = rest.read_body(body)
    function = loaded.function(payload.get("signature_name", ""))
    return function, rest.inputs_of(payload, function.specs), "instances" in payload


def _listen_on_loopback_only() -> None:
    """Keeps Ray Serve's port for calls between deployments, which takes pickles, off the network.

    Ray Serve 2.60 opens it on every address of the machine in each replica and has no setting for that; nothing of ours
    calls it. It is opened after the deployment's constructor, which calls this.
    """
    replica = sys.modules.get("ray.serve._private.replica")
    if replica is None or not _is_in_replica():
        return
    add_port = replica.add_port_to_grpc_server

    def add_local_port(server, address: str) -> int:
        return add_port(server, address.replace("[::]:", f"{_LOOPBACK}:"))

    replica.add_port_to_grpc_server = add_local_port


def _is_in_replica() -> bool:
    from ray import serve
    from ray.serve import exceptions

    try:
        serve.get_replica_context()
    except exceptions.RayServeException:
        return False
    return True


class Workers:
    """The way to reach the workers, wherever they are.

    Args:
        handle: Ray Serve's handle of the deployment.
    """

    def __init__(self, handle) -> None:
        self._handle = handle

    async def ask(self, method: str, *arguments, seconds: float) -> Any:
        """Calls a worker's method, and asks another one where it dies.

        Args:
            method: its name.
            *arguments: for it.
            seconds: how long to wait.

        Raises:
            TimeoutError: nobody answered in time.
            NoWorkerError: several workers died.
        """
        from ray import exceptions
        from ray.serve import exceptions as serve_exceptions

        async with asyncio.timeout(seconds):
            deaths = 0
            for attempt in itertools.count():
                response = getattr(self._handle, method).remote(*arguments)
                try:
                    return await response
                except (
                    exceptions.RayActorError,
                    exceptions.WorkerCrashedError,
                    exceptions.NodeDiedError,
                    exceptions.ObjectLostError,
                    serve_exceptions.ReplicaUnavailableError,
                ) as error:
                    # One that is unavailable may be back; a request that kills whoever gets it must not get them all.
                    deaths += not isinstance(error, exceptions.ActorUnavailableError)
                    if deaths == _MOST_DEATHS:
                        raise front.NoWorkerError(f"{deaths} workers died over this request") from error
                    await asyncio.sleep(min(_RETRY_SECONDS * 2**attempt, _LONGEST_RETRY_SECONDS))
                except asyncio.CancelledError:
                    response.cancel()
                    raise


@contextlib.contextmanager
def running(options: Options, report: Callable[[str], None]) -> Iterator[Workers]:
    """Starts the workers, and ends them and our Ray with the block.

    Args:
        options: what they are told.
        report: is given a line now and then while models are being loaded.

    Raises:
        ServingError: Ray isn't installed, or the workers can't be started.
    """
    ray, serve = _import_ray(alone=not options.ray_address)
    scratch, is_ours = _start_ray(ray, options), False
    try:
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR", "enable_access_log": False})
        if APP in serve.status().applications:
            raise ServingError(f"the cluster at {options.ray_address} works for another apps.serve: end that one first")
        is_ours = True
        deployment = serve.deployment(
            Worker,
            name="Worker",
            num_replicas=options.num_replicas,
            ray_actor_options={"num_cpus": 1},
            max_ongoing_requests=options.max_concurrency + _SPARE,
            health_check_period_s=1,
            health_check_timeout_s=30,
            graceful_shutdown_wait_loop_s=0.1,
            graceful_shutdown_timeout_s=_STOP_SECONDS,
        )
        try:
            with _still_loading(report):
                handle = serve.run(deployment.bind(options), name=APP, route_prefix=None)
        except (RuntimeError, TimeoutError) as error:
            raise ServingError(f"the workers can't be started: {error}") from error
        yield Workers(handle)
    finally:
        if scratch is None and is_ours:  # the cluster goes on without us
            with contextlib.suppress(Exception):  # whatever Ray says now, we leave
                serve.delete(APP)
        ray.shutdown()
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _still_loading(report: Callable[[str], None]) -> Iterator[None]:
    """Says that it goes on: a worker can't be asked before all its models are loaded."""
    is_loaded, begin = threading.Event(), time.monotonic()

    def tell() -> None:
        while not is_loaded.wait(_TELL_SECONDS):
            report(f"models have been loading for {time.monotonic() - begin:.0f} s")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_loaded.set()
        thread.join()


def _import_ray(alone: bool):
    # Ray reads these when it is imported. It would report its use to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if alone:
        # As on macOS and Windows, where Ray uses loopback only; on Linux it listens on every address, and replaces
        # a loopback address that it is given.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # Other users of this machine can't talk to it; with a token of its own Ray writes none into the home folder.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise ServingError(f"Ray Serve can't be imported ({error}): pip install 'tfhalf[serve]'") from error
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    return ray, serve


def _start_ray(ray, options: Options) -> str | None:
    """Joins a cluster, or starts a Ray of our own in a folder that is returned."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "namespace": APP}
    if options.ray_address:
        try:
            ray.init(address=options.ray_address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ServingError(f"no Ray cluster at {options.ray_address!r}: {error}") from error
        return None
    for attempt in range(_STARTS):
        scratch = tempfile.mkdtemp(prefix="tfhalf-ray-")
        try:
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, options.num_replicas),
                include_dashboard=False,
                object_store_memory=_STORE_BYTES,
                _node_ip_address=_LOOPBACK,
                _temp_dir=scratch,
                **quiet,
            )
            return scratch
        except BaseException as error:  # Ctrl-C, too, leaves nothing behind
            ray.shutdown()
            shutil.rmtree(scratch, ignore_errors=True)
            if not isinstance(error, Exception):
                raise
            # Ray has no class of its own for a machine that is too busy to start it within 30 s.
            if attempt == _STARTS - 1:
                raise ServingError(f"Ray can't be started on this machine: {error}") from error
    raise AssertionError("not reached")
