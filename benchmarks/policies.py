"""Time of one training step of an app in each policy, with tfhalf's kernels and with Keras' own, in turn.

    python -m benchmarks.policies --app=apps.image.classification --model=convnet
    python -m benchmarks.policies --app=apps.image.detection --dataset=deepforest

One step of each in a round, all on the round's batch of the app's training data, after three rounds of warm-up.
Printed: the median of each, and the median of its ratio to Keras' float32 over the rounds with a 95% confidence
interval (bootstrap over the rounds). The first losses are printed: where they agree, all did the same work.
"""

import itertools
import sys
import time

import numpy as np
from absl import app, flags

from apps import runner
from benchmarks import measuring
from tfhalf import PrecisionPlan

_WARM_UP = 3
_REFERENCE = "Keras float32"
_POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")


def main() -> None:
    """Runs the program."""
    # Before the other flags are known: the app says which there are.
    modules = [argument.removeprefix("--app=") for argument in sys.argv if argument.startswith("--app=")]
    sys.exit(runner.exit_code(_main, modules))


def _main(modules: list[str]) -> None:
    if not modules:
        raise runner.AppError("name the app: --app=apps.image.detection, then its own flags")
    task = measuring.task_of(modules[-1])
    names = runner.define_flags(task, flags.FLAGS)
    flags.DEFINE_string("app", None, "Module of the app, as apps.image.detection; then its own flags.")
    flags.DEFINE_integer("rounds", 30, "Measured rounds, 30 or more for a claim.", 2)

    def run_once(argv: list[str]) -> None:
        _run(task, runner.options_of(flags.FLAGS, names), flags.FLAGS.rounds)

    app.run(lambda argv: sys.exit(runner.exit_code(run_once, argv)))


def _run(task: runner.Task, options, rounds: int) -> None:
    data = runner.load(task, options)
    batches = list(data.train(0).take(_WARM_UP + rounds).as_numpy_iterator())  # now: reading isn't what is measured
    load = measuring.load()
    measuring.warn_if_busy(load)
    models = {}
    for options.accelerate, kernels in ((False, "Keras"), (True, "tfhalf")):
        for policy in _POLICIES:
            options.plan = PrecisionPlan(policy)
            models[f"{kernels} {policy}"] = runner.build(task, options, data)
    seconds, losses = {name: [] for name in models}, {name: [] for name in models}
    for batch in itertools.islice(itertools.cycle(batches), _WARM_UP + rounds):
        for name, model in models.items():
            start = time.perf_counter()
            loss = np.ravel(model.train_on_batch(*batch))[0]
            seconds[name].append(time.perf_counter() - start)
            losses[name].append(float(loss))
    print(f"{task.name} on {options.dataset}, batch {options.batch_size}, {rounds} rounds; load {load:.1f} before")
    for name in models:
        times = seconds[name][_WARM_UP:]
        ratio = measuring.paired_ratio(times, seconds[_REFERENCE][_WARM_UP:]) if name != _REFERENCE else "1"
        milliseconds = 1000 * measuring.median(times).median
        print(f"{name:22} {milliseconds:7.1f} ms, {ratio} of {_REFERENCE}; first loss {losses[name][0]:.4f}")


if __name__ == "__main__":
    main()
