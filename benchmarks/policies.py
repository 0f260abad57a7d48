"""Time of one training step of an app's model in each policy, with tfhalf's kernels and with Keras' own, in turn.

    python -m benchmarks.policies --model=convnet
    python -m benchmarks.policies --model=resnet --depth=20 --image_size=28 --batch_size=128

One step of each in a round, on the round's fresh random pictures, after three rounds of warm-up. Printed: the median of
each, and the median of its ratio to Keras' float32 over the rounds with a 95% confidence interval (bootstrap over the
rounds). The first losses are printed: where they agree, all did the same work.
"""

import sys
import time

import keras
import numpy as np
from absl import app, flags

from apps import runner
from apps.image import classification
from benchmarks import measuring
from tfhalf import PrecisionPlan

_WARM_UP = 3
_REFERENCE = "Keras float32"
_POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")


def main() -> None:
    """Runs the program."""
    names = runner.define_flags(classification.TASK, flags.FLAGS)
    flags.DEFINE_integer("rounds", 30, "Measured rounds, 30 or more for a claim.", 2)

    def run_once(argv: list[str]) -> None:
        _run(runner.options_of(flags.FLAGS, names), flags.FLAGS.rounds)

    app.run(lambda argv: sys.exit(runner.exit_code(run_once, argv)))


def _run(options, rounds: int) -> None:
    about = {"class_names": list("0123456789"), "image_size": options.image_size, "channels": 1}
    data = runner.Data(None, 1000, None, None, about)
    load = measuring.load()
    measuring.warn_if_busy(load)
    models = {}
    for options.accelerate, kernels in ((False, "Keras"), (True, "tfhalf")):
        for policy in _POLICIES:
            options.plan = PrecisionPlan(policy)
            models[f"{kernels} {policy}"] = runner.build(classification.TASK, options, data)
    random = np.random.default_rng(0)
    seconds, losses = {name: [] for name in models}, {name: [] for name in models}
    for _ in range(_WARM_UP + rounds):
        pictures = random.uniform(0, 255, [options.batch_size, options.image_size, options.image_size, 1]).astype(
            "float32"
        )
        targets = keras.utils.to_categorical(random.integers(0, 10, options.batch_size), 10)
        for name, model in models.items():
            start = time.perf_counter()
            loss, _ = model.train_on_batch(pictures, targets)
            seconds[name].append(time.perf_counter() - start)
            losses[name].append(float(loss))
    print(f"{options.model}, batch {options.batch_size}, {rounds} rounds; load {load:.1f} before")
    for name in models:
        times = seconds[name][_WARM_UP:]
        ratio = measuring.paired_ratio(times, seconds[_REFERENCE][_WARM_UP:]) if name != _REFERENCE else "1"
        milliseconds = 1000 * measuring.median(times).median
        print(f"{name:22} {milliseconds:7.1f} ms, {ratio} of {_REFERENCE}; first loss {losses[name][0]:.4f}")


if __name__ == "__main__":
    main()
