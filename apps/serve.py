"""Serves every bundle under a base folder as TensorFlow Serving does: gRPC and REST, with new versions swapped in.

    python -m apps.serve --model_base_path=saved_models
    python -m apps.serve --model_base_path=saved_models --num_replicas=2 --compute_dtype=bfloat16
    curl -d '{"instances": ["profits rose"]}' localhost:8501/v1/models/text_classification_reuters_r8:predict

The base folder is laid out as `<model>/<version>/`. Of each model the newest versions are served (--keep_versions); a
new version is checked, loaded, warmed up and swapped in without a failed request, one that isn't sound is refused and
told. --compute_dtype=auto measures each model's signatures here and takes the fastest that agrees with float32.

Clients of TensorFlow Serving work: PredictionService (Predict, GetModelMetadata) and ModelService (GetModelStatus) on
--port, REST on --rest_api_port, with /health and /monitoring/prometheus/metrics beside it. Every port, Ray's too, is on
loopback unless --host says otherwise. There is no TLS and no password here: for more than this machine put a proxy that
has them in front. Ctrl-C ends it. Exit status 0: it was ended; 1: it couldn't be started.

--ray_address joins a Ray cluster (`ray start` on each machine): its machines hold the workers, and all of them must see
the base folder under the same name. This process takes the requests.
"""

import asyncio
import contextlib
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

from absl import flags

from apps import runner
from tfhalf import engine, front, serving, versions

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def define_flags(values: flags.FlagValues) -> None:
    """Defines this program's flags; they have TensorFlow Serving's names where it has them."""
    here = {"flag_values": values}
    flags.DEFINE_string("model_base_path", None, "Folder with the models, as <model>/<version>/.", **here)
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; others than loopback are open to the network.",
                        **here)  # fmt: skip
    flags.DEFINE_integer("port", 8500, "gRPC's port, 0 for a free one.", 0, 65535, **here)
    flags.DEFINE_integer("rest_api_port", 8501, "REST's port, 0 for a free one.", 0, 65535, **here)
    flags.DEFINE_integer("num_replicas", 1, "Worker processes, each with all models, 1 to 256.", 1, 256, **here)
    flags.DEFINE_enum("compute_dtype", engine.AUTO, engine.COMPUTE_DTYPES, "What models compute in, where the client "
                      "doesn't name a signature; auto measures.", **here)  # fmt: skip
    flags.DEFINE_string(
        "require_signature", None, "Public key (PEM); versions that it hasn't signed are refused.", **here
    )
    flags.DEFINE_integer("max_batch_size", 32, "Most rows of requests that are joined, 1 to 4096; 1 joins none.",
                         1, 4096, **here)  # fmt: skip
    flags.DEFINE_float("batch_timeout_milliseconds", 5.0, "Longest time that a request waits for others to join it, "
                       "0 to 1000; none waits while its model is idle.", 0, 1000, **here)  # fmt: skip
    flags.DEFINE_integer("keep_versions", 2, "Newest versions of each model that are served, 1 to 100.", 1, 100, **here)
    flags.DEFINE_float("poll_seconds", 1.0, "Time between two looks for new versions, 0.1 to 3600.", 0.1, 3600, **here)
    flags.DEFINE_integer("max_concurrency", 256, "Most requests under way, 1 to 100000; others are turned away with "
                         "429 or RESOURCE_EXHAUSTED.", 1, 100000, **here)  # fmt: skip
    flags.DEFINE_float("max_body_megabytes", 64.0, "Largest request in units of 2^20 bytes, 0.001 to 2000.",
                       0.001, 2000, **here)  # fmt: skip
    flags.DEFINE_float("deadline_seconds", 60.0, "Longest time for a request, 0.1 to 3600; a gRPC client may ask for "
                       "less.", 0.1, 3600, **here)  # fmt: skip
    flags.DEFINE_string("access_log", "-", "File to add a line of JSON to for each request; - prints them, an empty "
                        "name writes none.", **here)  # fmt: skip
    flags.DEFINE_string("ray_address", "", "A Ray cluster to join, as host:6379 or auto. Default: a Ray of its own on "
                        "this machine.", **here)  # fmt: skip


def options_of(values: flags.FlagValues) -> tuple[serving.Options, front.Limits]:
    """Returns what workers and servers are told, after checking what flags can't check.

    Raises:
        AppError: a flag's value can't be.
    """
    if not values.model_base_path:
        raise runner.AppError("--model_base_path is missing: name the folder with the models, as saved_models")
    base = Path(values.model_base_path).resolve()
    if not base.is_dir():
        raise runner.AppError(f"--model_base_path={values.model_base_path} is no folder")
    if (base / "saved_model.pb").exists() or versions.scan_model(base):
        what = "one version of a model" if (base / "saved_model.pb").exists() else "the versions of one model"
        raise runner.AppError(f"--model_base_path={values.model_base_path} holds {what}: name the folder above")
    if values.require_signature and not Path(values.require_signature).is_file():
        raise runner.AppError(f"--require_signature={values.require_signature} is no file: name a public key (PEM)")
    limits = front.Limits(int(values.max_body_megabytes * 2**20), values.max_concurrency, values.deadline_seconds)
    options = serving.Options(
        model_base_path=str(base),
        num_replicas=values.num_replicas,
        compute_dtype=values.compute_dtype,
        require_signature=str(Path(values.require_signature).resolve()) if values.require_signature else "",
        max_batch_size=values.max_batch_size,
        batch_timeout_milliseconds=values.batch_timeout_milliseconds,
        keep_versions=values.keep_versions,
        poll_seconds=values.poll_seconds,
        max_concurrency=limits.max_concurrency,
        max_body_bytes=limits.max_body_bytes,
        ray_address=values.ray_address,
    )
    return options, limits


def run(values: flags.FlagValues) -> None:
    """Serves until it is interrupted.

    Raises:
        AppError: it can't be started.
    """
    options, limits = options_of(values)
    try:
        models = ", ".join(versions.scan(Path(options.model_base_path))) or "no model yet"
    except OSError as error:
        raise runner.AppError(f"--model_base_path={values.model_base_path} can't be read: {error.strerror}") from error
    workers = f"{options.num_replicas} worker{'s' * (options.num_replicas > 1)}"
    runner.say(f"starting {workers} for {options.model_base_path}: {models}")
    try:
        with _log_to(values.access_log) as log, serving.running(options, runner.say) as workers:
            servers = front.Front(workers.ask, limits, log, runner.say)
            try:
                asyncio.run(_serve(values, workers, servers))
            finally:
                for number in (signal.SIGINT, signal.SIGTERM):  # a second one would leave Ray behind
                    signal.signal(number, signal.SIG_IGN)
    except serving.ServingError as error:
        raise runner.AppError(str(error)) from error
    except KeyboardInterrupt:  # while models were being loaded; later `_serve` takes it
        runner.say("stopped before it served")


async def _serve(values: flags.FlagValues, workers: serving.Workers, servers: front.Front) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        about = await workers.ask("describe", seconds=60)
    except (TimeoutError, front.NoWorkerError) as error:
        raise runner.AppError("the workers were started, but don't answer; is there enough memory?") from error
    servers.tell_news(about["events"])
    try:
        async with servers.listening(values.host, values.rest_api_port, values.port) as (rest_port, grpc_port):
            for line in greeting(about["models"], values.host, rest_port, grpc_port):
                runner.say(line)
            await stop.wait()
            runner.say("stopping")
    except OSError as error:
        ports = f"--host={values.host} --rest_api_port={values.rest_api_port} --port={values.port}"
        raise runner.AppError(f"{ports}: can't listen there: {error}; choose others") from error


def greeting(models: dict, host: str, rest_port: int, grpc_port: int) -> list[str]:
    """Returns the lines that tell what is served and how to ask for it.

    Args:
        models: as a worker describes them.
        host: the address that is listened on.
        rest_port: REST's port.
        grpc_port: gRPC's port.
    """
    place = f"[{host}]" if ":" in host else host
    lines, example = [], ""
    for name, known in models.items():
        numbers = sorted((n for n, one in known.items() if one["state"] == versions.AVAILABLE), reverse=True)
        if not numbers:
            continue
        newest = known[numbers[0]]
        which = f"version{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
        lines.append(f"{name}: {which}, in {newest['compute_dtypes']}")
        is_short = not any(shape for _, shape in newest["example"].values())
        if not example or (is_short and not example.startswith("curl")):
            example = curl(f"http://{place}:{rest_port}/v1/models/{quote(name)}:predict", newest["example"])
    if not lines:
        lines.append("no model can be served yet; the folder is looked at again and again")
    if example:
        lines.append(example)
    if host not in _LOOPBACK:
        lines.append(f"note: {host} may be reached from the network, without TLS and password: put a proxy in front")
    lines.append(f"gRPC on {place}:{grpc_port}, REST on http://{place}:{rest_port}")
    return lines


def curl(url: str, example: dict) -> str:
    """Returns a line for a shell that asks for a prediction.

    Args:
        url: where.
        example: input -> its value, or its shape and the zero to fill it with, as `engine.Loaded.example` returns it.
    """
    parts = {}
    for name, (value, shape) in example.items():
        parts[name] = json.dumps(value, ensure_ascii=False)
        for size in reversed(shape):
            parts[name] = f"[{parts[name]}] * {size}"
    row = next(iter(parts.values()))
    if len(parts) > 1:
        row = "{" + ", ".join(f"{json.dumps(name)}: {part}" for name, part in parts.items()) + "}"
    body = f'{{"instances": [{row}]}}'.replace("'", "\\u0027")
    if not any(shape for _, shape in example.values()):
        return f"curl -d '{body}' {url}"
    return f"python3 -c 'import json; print(json.dumps({body}))' | curl -d @- {url}"


@contextlib.contextmanager
def _log_to(name: str) -> Iterator[Callable[[str], None] | None]:
    if name == "-":
        yield runner.say
    elif not name:
        yield None
    else:
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(open(name, "a", encoding="utf-8", buffering=1))  # by lines, to be followed
            except OSError as error:
                raise runner.AppError(f"--access_log={name}: {error.strerror}; choose another file") from error
            yield lambda line: print(line, file=file)


def main() -> None:
    """Runs the program."""
    runner.start(define_flags, run)


if __name__ == "__main__":
    main()
