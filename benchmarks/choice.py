"""Does `tfhalf.choose_precision` find the fastest policy? Asked again and again, beside a longer measurement.

    python -m benchmarks.choice --network=resnet
    python -m benchmarks.choice --network=resnet,encoder,lstm,unet,depthwise --rounds=30

For each network: first the choice is made `--repetitions` times, each a trial of its own with fresh models. Then each
policy takes a step in each of `--rounds` rounds, in turn, in an order that changes, on fresh random batches, after
three rounds of warm-up. A choice is right where it is the policy with the smallest median, or where it says that this
one is within noise of it.
"""

import collections
import itertools
import sys
import time

import keras
import numpy as np
from absl import app, flags

import tfhalf
from benchmarks import batches, measuring, networks
from tfhalf.precision import POLICIES

_WARM_UP = 3


def define_flags(values: flags.FlagValues) -> None:
    """Defines this program's flags."""
    here = {"flag_values": values}
    flags.DEFINE_list("network", list(batches.NETWORKS), "Reference networks, separated by commas.", **here)
    flags.DEFINE_integer("repetitions", 10, "Choices that are made for each, 1 or more.", 1, **here)
    flags.DEFINE_float("seconds", 60.0, "Bound on the time of a choice, above 0.", 1.0, **here)
    flags.DEFINE_integer("rounds", 30, "Rounds of the longer measurement, 30 or more for a claim.", 2, **here)


def main(argv: list[str]) -> None:
    """Runs the program."""
    values = flags.FLAGS
    if unknown := sorted(set(values.network) - set(batches.NETWORKS)):
        raise app.UsageError(f"--network={','.join(unknown)}: the networks are {', '.join(batches.NETWORKS)}")
    load = measuring.load()
    measuring.warn_if_busy(load)
    print(f"{measuring.machine()}; load {load:.1f} before", flush=True)
    for network in values.network:
        choices = []
        for repetition in range(values.repetitions):
            x, y = batches.random_batch(network, np.random.default_rng(repetition))
            choices.append(tfhalf.choose_precision(networks.BUILDERS[network], x, y, _loss(), seconds=values.seconds))
            told = f"{choices[-1].policy}: {choices[-1].reason}"
            print(f"{network}, {repetition + 1} of {values.repetitions}: {told}", flush=True)
        print(choices[-1], flush=True)
        print(_as_text(network, choices, _measure(network, values.rounds)), flush=True)


def _loss() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _measure(network: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of a training step in each policy, by round."""
    random, models = np.random.default_rng(1000), {}
    for policy in POLICIES:
        keras.utils.set_random_seed(0)
        with tfhalf.PrecisionPlan(policy).scope():
            models[policy] = tfhalf.accelerate(networks.BUILDERS[network]())
        optimizer = tfhalf.accelerate_optimizer(keras.optimizers.Adam())
        tfhalf.compile_model(models[policy], optimizer, loss=_loss())
    seconds = {policy: [] for policy in models}
    orders = list(itertools.permutations(models))
    for turn in range(_WARM_UP + rounds):
        batch = batches.random_batch(network, random)
        for policy in orders[turn % len(orders)]:
            start = time.perf_counter()
            models[policy].train_on_batch(*batch)
            seconds[policy].append(time.perf_counter() - start)
    return {policy: times[_WARM_UP:] for policy, times in seconds.items()}


def _as_text(network: str, choices: list[tfhalf.Choice], seconds: dict[str, list[float]]) -> str:
    """The network's rows of the table."""
    medians = {policy: float(np.median(times)) for policy, times in seconds.items()}
    best = min(medians, key=medians.get)
    right = sum(one.policy == best or best in one.measurements["within_noise"] for one in choices)
    noise = sum(one.policy != best and best in one.measurements["within_noise"] for one in choices)
    lines = [f"\n{network}: right in {right} of {len(choices)}, in {noise} of them by saying that it is within noise"]
    lines.append(f"{'policy':15} {'ms a step':>10}  {'of the fastest (95%)':24} chosen")
    picks = collections.Counter(one.policy for one in choices)
    for policy, times in seconds.items():
        ratio = "1" if policy == best else str(measuring.paired_ratio(times, seconds[best]))
        lines.append(f"{policy:15} {1e3 * medians[policy]:10.1f}  {ratio:24} {picks[policy]} of {len(choices)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(lambda argv: sys.exit(main(argv)))
