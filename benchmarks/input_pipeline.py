"""The share of a training step that is spent waiting for data: what `tf.data` doesn't hide. It should be below 5%.

    python -m benchmarks.input_pipeline --dataset=mnist_5k

Runs the app's own pipeline on real data, for two of its models in each policy: a faster step leaves less time to
prepare the next batch. Waiting is the time of `next` on the epoch's batches, apart from `train_on_batch`; the first
epoch reads and decodes, the second finds small sets in the cache. The first wait of an epoch fills the shuffle buffer
and weighs more the shorter the epoch is: `--steps_per_epoch` shortens both, for a trial only.
"""

import sys
import time

import numpy as np
from absl import app, flags, logging

from apps import runner
from apps.image import classification
from benchmarks import measuring
from tfhalf import PrecisionPlan

_MODELS = ("convnet", "resnet")
_POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
_TARGET = 0.05


def main() -> None:
    """Runs the program."""
    names = runner.define_flags(classification.TASK, flags.FLAGS)
    logging.set_verbosity(logging.WARNING)

    def run_once(argv: list[str]) -> None:
        _run(runner.options_of(flags.FLAGS, names))

    app.run(lambda argv: sys.exit(runner.exit_code(run_once, argv)))


def _run(options) -> None:
    load = measuring.load()
    measuring.warn_if_busy(load)
    print(f"{options.dataset}, batch {options.batch_size}; load {load:.2f} before")
    print("| model | policy | epoch | median step ms | first wait ms | median wait µs | share of waiting |")
    print("|---|---|---|---|---|---|---|")
    for model in _MODELS:
        for policy in _POLICIES:
            options.model, options.plan = model, PrecisionPlan(policy)
            data = classification.TASK.load_data(options)
            network = runner.build(classification.TASK, options, data)
            _trace(network, options, data)
            for epoch in range(2):
                waits, steps = _epoch(network, data, epoch, options.steps_per_epoch or data.steps_per_epoch)
                share = sum(waits) / (sum(waits) + sum(steps))
                verdict = "" if share < _TARGET else f" above {_TARGET:.0%}"
                numbers = f"{1e3 * np.median(steps):.1f} | {1e3 * waits[0]:.1f} | {1e6 * np.median(waits):.0f}"
                print(f"| {model} | {policy} | {epoch + 1} | {numbers} | {share:.2%}{verdict} |", flush=True)


def _trace(network, options, data: runner.Data) -> None:
    """Takes a step on an empty batch, so that making the graph isn't part of the epoch."""
    pictures = np.zeros([options.batch_size, *network.input_shape[1:]], "float32")
    network.train_on_batch(pictures, np.zeros([options.batch_size, len(data.about["class_names"])], "float32"))


def _epoch(network, data: runner.Data, epoch: int, num_steps: int) -> tuple[list[float], list[float]]:
    """Trains; returns the seconds of waiting before each step, and of each step."""
    waits, steps = [], []
    batches = iter(data.train(epoch))
    for _ in range(num_steps):
        start = time.perf_counter()
        pictures, targets = next(batches)
        ready = time.perf_counter()
        network.train_on_batch(pictures, targets)
        waits.append(ready - start)
        steps.append(time.perf_counter() - ready)
    return waits, steps


if __name__ == "__main__":
    main()
