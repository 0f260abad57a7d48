"""Time of one training step of an app's model in each policy, beside float32: what half costs or saves on this machine.

    python -m benchmarks.policies --model=convnet

Steps are taken in turn (float32, mixed_float16, mixed_bfloat16, float32, ...) on fresh random pictures, after three
rounds of warm-up. Printed: the median of each, and the median of its ratio to float32 over the rounds with a 95%
confidence interval (bootstrap over the rounds). The first losses are printed: where they agree, all did the same work.
"""

import os
import sys
import time

import keras
import numpy as np
from absl import app, flags
from scipy import stats

from apps import runner
from apps.image import classification
from tfhalf import PrecisionPlan

_WARM_UP = 3
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
    models = {}
    for policy in _POLICIES:
        options.plan = PrecisionPlan(policy)
        models[policy] = runner.build(classification.TASK, options, data)
    random = np.random.default_rng(0)
    seconds, losses = {policy: [] for policy in models}, {policy: [] for policy in models}
    for _ in range(_WARM_UP + rounds):
        pictures = random.uniform(0, 255, [options.batch_size, options.image_size, options.image_size, 1]).astype(
            "float32"
        )
        targets = keras.utils.to_categorical(random.integers(0, 10, options.batch_size), 10)
        for policy, model in models.items():
            start = time.perf_counter()
            loss, _ = model.train_on_batch(pictures, targets)
            seconds[policy].append(time.perf_counter() - start)
            losses[policy].append(float(loss))
    print(f"{options.model}, batch {options.batch_size}, {rounds} rounds; load {os.getloadavg()[0]:.1f}")
    for policy in models:
        times = np.array(seconds[policy][_WARM_UP:])
        ratio = times / np.array(seconds["float32"][_WARM_UP:])
        low, high = (
            stats.bootstrap((ratio,), np.median, random_state=0).confidence_interval if policy != "float32" else (1, 1)
        )
        print(
            f"{policy:15} {1000 * np.median(times):7.1f} ms, {np.median(ratio):.2f} of float32 "
            f"(95%: {low:.2f} to {high:.2f}); first loss {losses[policy][0]:.4f}"
        )


if __name__ == "__main__":
    main()
