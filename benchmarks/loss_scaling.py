"""What our loss scaling costs beside Keras' own: a training step of a reference network with each, in turn.

    python -m benchmarks.loss_scaling --network=resnet

Ours is `tfhalf.compile_model` with everything that it puts on a step: the reduction, the counters, the guard of the
batch statistics. Steps are taken in turn (Keras', ours, ours, Keras', ...) on fresh random batches, after three rounds
of warm-up. With `--dtype_policy=float32` the same two optimizers wrap a float32 network: on a CPU without half
instructions its step is the faster one, so that the optimizer's share is larger.
"""

import sys
import time

import keras
import numpy as np
from absl import app, flags

from benchmarks import batches, measuring, networks
from tfhalf import LossScaleOptimizer, PrecisionPlan, compile_model

_WARM_UP = 3


def define_flags(values: flags.FlagValues) -> None:
    """Defines this program's flags."""
    here = {"flag_values": values}
    flags.DEFINE_enum("network", "resnet", batches.NETWORKS, "Reference network.", **here)
    policies = ["mixed_float16", "mixed_bfloat16", "float32"]
    flags.DEFINE_enum("dtype_policy", "mixed_float16", policies, "Keras dtype policy of the network.", **here)
    flags.DEFINE_integer("rounds", 30, "Measured rounds, 30 or more for a claim.", 2, **here)


def main(argv: list[str]) -> None:
    """Runs the program."""
    network, policy, rounds = flags.FLAGS.network, flags.FLAGS.dtype_policy, flags.FLAGS.rounds
    load = measuring.load()
    measuring.warn_if_busy(load)
    models = {name: _compiled(network, policy, name) for name in ("Keras", "ours")}
    random = np.random.default_rng(0)
    seconds, losses = {name: [] for name in models}, {name: [] for name in models}
    for index in range(_WARM_UP + rounds):
        batch = batches.random_batch(network, random)
        for name in sorted(models, reverse=bool(index % 2)):
            start = time.perf_counter()
            losses[name].append(float(models[name].train_on_batch(*batch)))
            seconds[name].append(time.perf_counter() - start)
    times = {name: np.array(values[_WARM_UP:]) for name, values in seconds.items()}
    print(f"{network}, {policy}, {rounds} rounds; load {load:.1f} before")
    for name, values in times.items():
        print(f"{name:6} {1000 * np.median(values):8.1f} ms; losses {losses[name][0]:.4f} to {losses[name][-1]:.4f}")
    print(f"ours / Keras: {measuring.paired_ratio(times['ours'], times['Keras'])} (95%)")


def _compiled(network: str, policy: str, name: str) -> keras.Model:
    keras.utils.set_random_seed(0)
    with PrecisionPlan(policy).scope():
        model = networks.BUILDERS[network]()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    adam = keras.optimizers.Adam(1e-4)
    if name == "ours":
        compile_model(model, LossScaleOptimizer(adam), loss=loss)
    else:
        model.compile(keras.optimizers.LossScaleOptimizer(adam), loss)
    return model


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(lambda argv: sys.exit(main(argv)))
