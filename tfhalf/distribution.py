"""Which devices train: TensorFlow's own strategies, and what several processes have to agree on.

`mirrored` is one process with a replica on every local GPU, or on logical CPUs to try it out; `multi_worker` is one
process per worker, told by TF_CONFIG who the others are. The batch is global in both: each replica gets its part of
it, gradients are summed, and every replica takes the same step.

Workers wait for each other in every collective operation. So whatever one of them decides alone - to stop at a
signal, to save by the clock - would let the others wait for ever: such things go through `Workers.any`.

Parameter servers and TPUs aren't supported: Keras 3 can't `fit` with the former, and loss scaling is of no use on the
latter, which compute in bfloat16.

Source: https://www.tensorflow.org/guide/distributed_training
"""

import json
import os
import zlib

import numpy as np
import tensorflow as tf


class DistributionError(Exception):
    """The devices or workers that were asked for can't be had; the message says why and what to do."""


def make_strategy(distribute: str, num_logical_devices: int | None = None) -> tf.distribute.Strategy:
    """Returns the strategy of a name. Call it before anything else uses TensorFlow.

    Args:
        distribute: "none", "mirrored" or "multi_worker".
        num_logical_devices: for "mirrored" on a machine without a GPU: that many replicas share the CPU.

    Raises:
        DistributionError: TF_CONFIG is missing or wrong, or the devices aren't there.
    """
    if distribute not in ("none", "mirrored", "multi_worker"):
        raise DistributionError(f'distribute is {distribute!r}; it must be "none", "mirrored" or "multi_worker"')
    if num_logical_devices is not None and distribute != "mirrored":
        raise DistributionError('num_logical_devices has an effect with distribute="mirrored" only; leave it out')
    if distribute == "none":
        return tf.distribute.get_strategy()
    if distribute == "multi_worker":
        return _multi_worker()
    if num_logical_devices is None:
        return tf.distribute.MirroredStrategy()
    if tf.config.list_physical_devices("GPU"):
        raise DistributionError("num_logical_devices divides a CPU, and this machine has a GPU; leave it out")
    processor = tf.config.list_physical_devices("CPU")[0]
    try:
        tf.config.set_logical_device_configuration(
            processor, [tf.config.LogicalDeviceConfiguration()] * num_logical_devices
        )
    except RuntimeError as error:
        raise DistributionError("num_logical_devices can't be set any more: TensorFlow is in use already") from error
    return tf.distribute.MirroredStrategy([f"CPU:{index}" for index in range(num_logical_devices)])


def _multi_worker() -> tf.distribute.Strategy:
    text = os.environ.get("TF_CONFIG", "")
    example = '{"cluster": {"worker": ["host1:5000", "host2:5000"]}, "task": {"type": "worker", "index": 0}}'
    try:
        config = json.loads(text)
        workers, task = config["cluster"]["worker"], config["task"]
        index, kinds = int(task["index"]), set(config["cluster"])
    except (ValueError, KeyError, TypeError) as error:
        seen = f"is {text!r}" if text else "isn't set"
        raise DistributionError(
            f"multi_worker needs the environment variable TF_CONFIG, which {seen}; for each worker it looks like "
            f"{example}; python -m apps.launch sets it for workers on this machine"
        ) from error
    if kinds != {"worker"} or task.get("type") != "worker" or not 0 <= index < len(workers):
        raise DistributionError(
            f"TF_CONFIG is {text!r}; only workers are supported, no chief, parameter server or evaluator, and index "
            f"must be one of theirs, as in {example}"
        )
    kind = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=kind.NCCL if tf.config.list_physical_devices("GPU") else kind.RING
    )
    return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)


def shard(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Lets each worker take its part of every batch, so that a global batch holds what it would on one device."""
    options = tf.data.Options()
    # TensorFlow's default may share out files instead, and then the batches are other ones.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return dataset.with_options(options)


def even(dataset: tf.data.Dataset, num_replicas: int) -> tf.data.Dataset:
    """Refuses, when it is read, a batch that can't be divided evenly among the replicas.

    Uneven parts would weigh the same in the mean, and an empty one gives gradients that aren't numbers.
    """
    if num_replicas == 1:
        return dataset

    def check(*batch):
        size = tf.shape(tf.nest.flatten(batch)[0])[0]
        message = (
            f"a batch does not divide evenly among {num_replicas} replicas: make each batch's size a multiple of that, "
            "as batch(..., drop_remainder=True) does"
        )
        with tf.control_dependencies([tf.debugging.assert_equal(size % num_replicas, 0, message)]):
            return tf.nest.map_structure(tf.identity, batch)

    return dataset.map(check)


class Workers:
    """The processes that train together; one alone where the strategy isn't a multi-worker one.

    Args:
        strategy: as `make_strategy` returned it.

    Attributes:
        num_replicas: parts that a batch is divided into.
        index: this process's number, from 0.
        first_replica: the number of this process's first replica.
        is_chief: whether this process is the one that writes.
        several: whether there are others.
    """

    def __init__(self, strategy: tf.distribute.Strategy):
        resolver = (
            strategy.cluster_resolver if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) else None
        )
        self.num_replicas = strategy.num_replicas_in_sync
        self.several = resolver is not None and len(resolver.cluster_spec().as_dict().get("worker", [])) > 1
        self.index = (resolver and resolver.task_id) or 0
        self.is_chief = not self.index
        num_workers = len(resolver.cluster_spec().as_dict()["worker"]) if self.several else 1
        self.first_replica = self.index * (self.num_replicas // num_workers)

        @tf.function(autograph=False)
        def sum_over_replicas(numbers):
            def reduce(numbers):
                here = tf.identity(numbers)  # on this replica's device
                return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, here)

            return strategy.experimental_local_results(strategy.run(reduce, args=(numbers,)))[0]

        self._sum = sum_over_replicas

    def any(self, *flags: bool) -> list[bool]:
        """Returns for each flag whether it is set in any worker; every worker must call it at the same step."""
        if not self.several:
            return list(flags)
        return [count > 0 for count in self._sum(tf.constant(flags, tf.float32)).numpy()]

    def wait_for_all(self) -> None:
        """Returns once every worker has called it."""
        self.any(False)

    def check_same(self, values: dict[str, object], what: str) -> None:
        """Raises unless every worker has these values.

        Args:
            values: JSON values by name.
            what: names them all in the error.

        Raises:
            DistributionError: on every worker, if one has other values; the message says which.
        """
        if not self.several:
            return
        names = sorted(values)
        same_names, same_all = self._agree([names, values])
        if same_all:
            return
        differing = names
        if same_names:
            agreed = self._agree([values[name] for name in names])
            differing = [name for name, same in zip(names, agreed, strict=True) if not same]
        here = ", ".join(f"{name} is {json.dumps(values[name])} here" for name in differing)
        raise DistributionError(
            f"the workers don't agree on {what} ({here}); give all of them the same flags, code and --workdir, in a "
            "folder that all of them see"
        )

    def _agree(self, values: list) -> list[bool]:
        """Returns for each value whether every worker has it; by sums over workers of the bits of its digest."""
        digests = [zlib.crc32(json.dumps(value, sort_keys=True).encode()) for value in values]
        bits = np.array([[digest >> shift & 1 for shift in range(32)] for digest in digests], "float32")
        counts = self._sum(tf.constant(bits)).numpy()
        return [not np.any((row > 0) & (row < self.num_replicas)) for row in counts]
