"""The contenders of a comparison: each is a process of its own that takes one step when it is asked to.

    python -m benchmarks.contenders --save_weights=weights.npz --network=resnet

is what writes the first weights for PyTorch; the rest of the flags are for `Worker`, which starts a contender. It sends
the seed of a batch; the contender makes the batch, starts its clock, takes a step, and answers. Between its turns it
waits at the pipe, and tells how much it computed meanwhile: threads that spin would disturb the others. When the pipe
closes, because all is done or because the comparison was killed, it ends.
"""

import dataclasses
import importlib
import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
from absl import app, flags

from benchmarks import batches

KINDS = ("training", "inference")


@dataclasses.dataclass(frozen=True)
class Contender:
    """Who runs the network: a library, and a dtype policy (PyTorch's autocast is called by the same name)."""

    library: str
    policy: str

    @property
    def name(self) -> str:
        """As "tfhalf mixed_bfloat16"."""
        stock = self.library in ("Keras", "tfhalf")
        return f"{self.library} {self.policy if stock else self.policy.removeprefix('mixed_')}"

    @property
    def needs_torch(self) -> bool:
        """Whether PyTorch runs it."""
        return self.library.startswith("PyTorch")


CONTENDERS = (
    Contender("Keras", "float32"),
    Contender("Keras", "mixed_bfloat16"),
    Contender("Keras", "mixed_float16"),
    Contender("tfhalf", "float32"),
    Contender("tfhalf", "mixed_bfloat16"),
    Contender("tfhalf", "mixed_float16"),
    Contender("Grappler", "mixed_bfloat16"),
    Contender("PyTorch", "float32"),
    Contender("PyTorch", "mixed_bfloat16"),
    Contender("PyTorch compiled", "float32"),
    Contender("PyTorch compiled", "mixed_bfloat16"),
)


class ContenderError(Exception):
    """A contender failed; the message is one line."""


class Worker:
    """The process of one contender, seen from the comparison.

    Args:
        contender: who it is.
        kind: "training" or "inference".
        network: name of a reference network.
        weights_path: file that PyTorch reads the first weights from.
        log: open file that takes what libraries print.
    """

    def __init__(self, contender: Contender, kind: str, network: str, weights_path: str, log):
        self.contender = contender
        self._connection, theirs = multiprocessing.Pipe()
        settings = {
            "kind": kind,
            "library": contender.library,
            "policy": contender.policy,
            "network": network,
            "weights": weights_path,
            "pipe": theirs.fileno(),
        }
        self._process = start(settings, log, pass_fds=[theirs.fileno()])
        theirs.close()

    def answer(self) -> dict[str, float]:
        """Waits for the answer to the start or to a step.

        Raises:
            ContenderError: it failed.
        """
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise ContenderError(f"its process ended with status {self._process.wait()}") from error
        if "failed" in answer:
            raise ContenderError(answer["failed"])
        return answer

    def step(self, seed: int) -> dict[str, float]:
        """Has it take a step on the batch of a seed; returns seconds, loss, and what is in `_resident`."""
        try:
            self._connection.send(seed)
        except OSError as error:
            raise ContenderError(f"its process ended with status {self._process.wait()}") from error
        return self.answer()

    def stop(self) -> None:
        """Ends it."""
        self._connection.close()
        self._process.terminate()
        self._process.wait()


def start(settings: dict[str, object], log, pass_fds=()) -> subprocess.Popen:
    """Starts this module as a process; in a session of its own, so that Ctrl-C reaches the comparison alone."""
    command = [sys.executable, "-m", "benchmarks.contenders", *[f"--{key}={value}" for key, value in settings.items()]]
    # The comparison is of CPUs: on a machine with a GPU TensorFlow would take it.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=pass_fds,
        env=environment,
        start_new_session=True,
    )


def define_flags(values: flags.FlagValues) -> None:
    """Defines this program's flags."""
    here = {"flag_values": values}
    flags.DEFINE_enum("kind", "training", KINDS, "What a step is.", **here)
    flags.DEFINE_enum("library", "Keras", sorted({one.library for one in CONTENDERS}), "Who runs it.", **here)
    flags.DEFINE_enum("policy", "float32", sorted({one.policy for one in CONTENDERS}), "Dtype policy.", **here)
    flags.DEFINE_enum("network", "resnet", batches.NETWORKS, "Reference network.", **here)
    flags.DEFINE_string("weights", None, "File of first weights.", **here)
    flags.DEFINE_integer("pipe", None, "File descriptor of the pipe to the comparison.", 0, **here)
    flags.DEFINE_string("save_weights", None, "Write the first weights to this file, and end.", **here)


def main(argv: list[str]) -> None:
    """Runs the program."""
    values = flags.FLAGS
    if values.save_weights:
        importlib.import_module("benchmarks.keras_contenders").save_weights(values.network, values.save_weights)
        return
    contender = Contender(values.library, values.policy)
    connection = multiprocessing.connection.Connection(values.pipe)
    try:
        _serve(connection, contender, values.kind, values.network, values.weights)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the comparison has ended
    except Exception as error:  # libraries raise what they like, and the others shall go on
        traceback.print_exc()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        connection.send({"failed": f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]})


def _serve(connection, contender: Contender, kind: str, network: str, weights_path: str) -> None:
    # Imported here: a process of PyTorch doesn't import Keras, nor the other way round.
    library = importlib.import_module(f"benchmarks.{'torch' if contender.needs_torch else 'keras'}_contenders")
    before = _resident()["resident_mib"]
    take_step = library.make_step(kind, contender.library, contender.policy, network, weights_path)
    connection.send({"resident_before_mib": before})
    while True:
        idle_since, computed = time.perf_counter(), time.process_time()
        seed = connection.recv()
        idle_share = (time.process_time() - computed) / (time.perf_counter() - idle_since)
        inputs, targets = batches.random_batch(network, np.random.default_rng(seed))
        start_time = time.perf_counter()
        result = take_step(inputs, targets)
        seconds = time.perf_counter() - start_time
        loss = result if kind == "training" else batches.cross_entropy(result, targets)
        connection.send({"seconds": seconds, "loss": loss, "idle_share": idle_share} | _resident())


def _resident() -> dict[str, float]:
    """The memory that this process has now, and the most that it had (VmHWM), in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return {
        "resident_mib": int(status["VmRSS"].split()[0]) / 1024,
        "peak_resident_mib": int(status["VmHWM"].split()[0]) / 1024,
    }


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(lambda argv: sys.exit(main(argv)))
