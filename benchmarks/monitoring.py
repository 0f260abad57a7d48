"""What `tfhalf.Monitor` costs: a training step of a reference network with and without it, in turn.

    python -m benchmarks.monitoring --network=resnet

A round is a few steps of a network with the monitor, the first of which it measures, and as many of an equal one
without it, on the same random batches: step by step in turn, each going first in every second round. With a measurement
at each of `every` steps, a step takes (measured + (every - 1) * others) / every, which is divided by the round's median
without the monitor.
Reading the rings and writing the files is counted as if it came with each measurement; it comes with every second one
or less often. Drawing is left out: the monitor itself keeps it below 1% of the time. The first rounds warm up.
"""

import sys
import tempfile
import time

import keras
import numpy as np
from absl import app, flags

from benchmarks import batches, measuring, networks
from tfhalf import Monitor, PrecisionPlan, accelerate, accelerate_optimizer, compile_model

_STEPS, _WARM_UP = 6, 2
# Calls after which the monitor reads its rings, whatever its settings.
_UNTIL_READ = 100


def define_flags(values: flags.FlagValues) -> None:
    """Defines this program's flags."""
    here = {"flag_values": values}
    flags.DEFINE_enum("network", "resnet", batches.NETWORKS, "Reference network.", **here)
    flags.DEFINE_integer("rounds", 30, "Measured rounds, 30 or more for a claim.", 2, **here)


def main(argv: list[str]) -> None:
    """Runs the program."""
    network, rounds = flags.FLAGS.network, flags.FLAGS.rounds
    load = measuring.load()
    measuring.warn_if_busy(load)
    random = np.random.default_rng(0)
    models = {name: _compiled(network) for name in ("without", "with")}
    seconds = {name: [] for name in models}
    with tempfile.TemporaryDirectory() as folder:
        monitor = Monitor(folder, _STEPS, report=lambda line: None)
        callbacks = keras.callbacks.CallbackList([monitor], model=models["with"])
        for index in range(_WARM_UP + rounds):
            data = [batches.random_batch(network, random) for _ in range(_STEPS)]
            taken = {name: [] for name in models}
            for batch in data:
                for name in sorted(models, reverse=bool(index % 2)):
                    reads = name == "with" and not taken[name]
                    taken[name].append(_step(models[name], batch, callbacks if reads else None))
            for name in models:
                seconds[name].append(taken[name])
        monitor.close()
    times = {name: np.array(values[_WARM_UP:]) for name, values in seconds.items()}
    plain, due, others = np.median(times["without"], 1), times["with"][:, 0], np.median(times["with"][:, 1:], 1)
    first = {name: values[0][0] for name, values in seconds.items()}
    print(f"{network}, mixed_float16, {rounds} rounds; load {load:.1f} before")
    print(f"first    {first['without']:8.1f} s without, {first['with']:.1f} s with: TensorFlow makes the graph")
    print(f"without  {1000 * np.median(plain):8.1f} ms a step")
    print(f"with     {1000 * np.median(others):8.1f} ms, measured {1000 * np.median(due):8.1f} ms")
    for every in (50, 1):
        ratio = measuring.paired_ratio((due + (every - 1) * others) / every, plain)
        print(f"every={every:2}, with / without: {ratio} (95%)")


def _step(model: keras.Model, batch: tuple, callbacks: keras.callbacks.CallbackList | None) -> float:
    """Seconds of a step, with what the callbacks read and write after it."""
    start = time.perf_counter()
    model.train_on_batch(*batch)
    if callbacks:
        for step in range(_UNTIL_READ):
            callbacks.on_train_batch_end(step, {})
    return time.perf_counter() - start


def _compiled(network: str) -> keras.Model:
    keras.utils.set_random_seed(0)
    with PrecisionPlan().scope():
        model = accelerate(networks.BUILDERS[network]())
    optimizer = accelerate_optimizer(keras.optimizers.Adam(1e-4))
    compile_model(model, optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(lambda argv: sys.exit(main(argv)))
