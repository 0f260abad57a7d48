"""Starts several workers of one program on this machine, to try multi-worker training out.

    python -m apps.launch --num_workers=2 apps.image.classification --dataset=mnist_5k --epochs=2

Each worker is a process with its own TF_CONFIG on the loopback address, run with `--distribute=multi_worker`. Their
lines are printed with the worker's number in front. When one of them fails, or Ctrl-C or SIGTERM is seen, all are
stopped: the first failure's reason and exit status are this program's. On several machines your cluster's scheduler
does this part: set TF_CONFIG there and start the same program on each (README, "From one machine to many").
"""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading

from absl import app, flags

from apps import processes

_LOOPBACK = "127.0.0.1"


def define_flags(values: flags.FlagValues) -> None:
    """Defines this program's flags."""
    here = {"flag_values": values}
    flags.DEFINE_integer("num_workers", 2, "Worker processes, 2 to 64.", 2, 64, **here)
    flags.DEFINE_float("grace_seconds", 10.0, "Time a stopped worker has to save, 0 to 3600.", 0, 3600, **here)


def main(argv: list[str]) -> int:
    """Runs the workers; returns the first failure's exit status, or 0."""
    module, arguments = argv[1] if len(argv) > 1 else "", argv[2:]
    if not module or module.startswith("-"):
        print(
            "error: name the program after the flags, as in: python -m apps.launch --num_workers=2 "
            "apps.image.classification --dataset=mnist_5k",
            file=sys.stderr,
        )
        return 1
    given = [argument for argument in arguments if argument.lstrip("-").partition("=")[0] == "distribute"]
    if given:
        print(f"error: {given[0]}: the workers get --distribute=multi_worker; leave it out", file=sys.stderr)
        return 1
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    return _run(module, arguments, flags.FLAGS.num_workers, flags.FLAGS.grace_seconds, asked)


def _run(module: str, arguments: list[str], num_workers: int, grace: float, asked: threading.Event) -> int:
    addresses = [f"{_LOOPBACK}:{port}" for port in _free_ports(num_workers)]
    workers = [_start(module, arguments, addresses, index) for index in range(num_workers)]
    readers = [threading.Thread(target=_forward, args=(i, worker), daemon=True) for i, worker in enumerate(workers)]
    for reader in readers:
        reader.start()
    try:
        reason, status = _wait(workers, asked)
    finally:
        processes.stop(workers, grace)
    for reader in readers:
        reader.join(timeout=5)
    if reason:
        print(f"{reason}; all workers are stopped", file=sys.stderr, flush=True)
    return status


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now; all are held until all are found, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((_LOOPBACK, 0))
        return [each.getsockname()[1] for each in sockets]


def _start(module: str, arguments: list[str], addresses: list[str], index: int) -> subprocess.Popen:
    config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    command = [sys.executable, "-m", module, *arguments, "--distribute=multi_worker"]
    return processes.start(command, {"TF_CONFIG": json.dumps(config)}, subprocess.PIPE)


def _forward(index: int, worker: subprocess.Popen) -> None:
    for line in worker.stdout:
        print(f"[{index}] {line}", end="", flush=True)


def _wait(workers: list[subprocess.Popen], asked: threading.Event) -> tuple[str, int]:
    """Returns (reason, exit status) once one worker fails, all are done, or a stop was asked for."""
    while True:
        if asked.wait(0.2):
            return "interrupted; the same command goes on", 130
        statuses = [worker.poll() for worker in workers]
        for index, status in enumerate(statuses):
            if status is not None and status < 0:
                name = signal.Signals(-status).name
                return f"error: worker {index} was killed by {name}; the same command goes on", 128 - status
            if status:
                return f"error: worker {index} ended with exit status {status}", status
        if all(status == 0 for status in statuses):
            return "", 0


if __name__ == "__main__":
    define_flags(flags.FLAGS)

    def parse(argv: list[str]) -> list[str]:
        """Takes this program's flags, up to the name of the other one, whose flags follow."""
        flags.FLAGS.set_gnu_getopt(False)
        return app.parse_flags_with_usage(argv)

    app.run(lambda argv: sys.exit(main(argv)), flags_parser=parse)
