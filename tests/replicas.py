"""A program for tests: trains on two replicas and says how that compares with one device.

    python -m tests.replicas --case=steps --distribute=mirrored

Under `multi_worker` each of two processes runs it (`apps.launch`). The last line that it prints is JSON. A process has
one strategy only: a second one breaks TensorFlow's collectives.
"""

import argparse
import json
import tempfile
import zlib
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from tests import planted
from tfhalf import LossScaleOptimizer, Monitor, PrecisionPlan, compilation, distribution, training

NUM_STEPS = 8
BAD_STEPS = (2, 3)
BATCH = 8
_OTHERS = ["Adadelta", "Adafactor", "Adagrad", "Adamax", "Ftrl", "Lamb", "Lion", "Nadam", "RMSprop"]
_OTHERS += ["ScheduleFreeAdamW", "SGD"]


def configurations(every: bool) -> dict:
    """Name to a function of the class that scales the loss; `every` adds the rest of Keras' optimizers and settings."""
    optimizers, decay = keras.optimizers, keras.optimizers.schedules.ExponentialDecay
    inner = {
        "adam_clipnorm": lambda: optimizers.Adam(0.01, clipnorm=0.1),
        "muon": lambda: optimizers.Muon(0.01),
        "sgd_overwrite": lambda: optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3),
        "multi": lambda: optimizers.MultiOptimizer(
            optimizers.OptimizerMap(optimizers.Adam(0.01), {".*bias": optimizers.SGD(0.1)})
        ),
    }
    if every:
        inner |= {
            "momentum": lambda: optimizers.SGD(0.1, momentum=0.9, nesterov=True),
            "sgd_global_clipnorm": lambda: optimizers.SGD(0.1, global_clipnorm=0.05),
            "sgd_clipvalue": lambda: optimizers.SGD(0.1, clipvalue=0.01),
            "adamw_schedule": lambda: optimizers.AdamW(decay(0.01, 2, 0.5), weight_decay=0.1),
            "sgd_average": lambda: optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5),
        }
        inner |= {name.lower(): lambda name=name: getattr(optimizers, name)(0.01) for name in _OTHERS}
    made = {name: lambda make=make: LossScaleOptimizer(make(), dynamic_growth_steps=4) for name, make in inner.items()}
    made["accumulation"] = lambda: LossScaleOptimizer(
        optimizers.Adam(0.01, clipnorm=0.1), gradient_accumulation_steps=2
    )
    return made


def build_classifier() -> keras.Model:
    """Ids to two numbers: dense and sparse gradients."""
    keras.utils.set_random_seed(0)
    ids = keras.Input([3], dtype="int32")
    x = keras.layers.Flatten()(keras.layers.Embedding(5, 4)(ids))
    return keras.Model(ids, keras.layers.Dense(2)(keras.layers.Dense(8, activation="tanh")(x)))


def train(strategy: tf.distribute.Strategy, make_optimizer, bad_replica: int | None):
    """A custom loop, in which one replica's gradients overflow at BAD_STEPS; one device stands for any replica."""
    num = strategy.num_replicas_in_sync
    random = np.random.default_rng(0)
    ids, targets = random.integers(0, 5, [NUM_STEPS, BATCH, 3]), random.normal(size=[NUM_STEPS, BATCH, 2])
    with strategy.scope():
        model, optimizer = build_classifier(), make_optimizer()
        optimizer.build(model.trainable_variables)

    @tf.function
    def step(ids, targets, factor):
        def on_replica(ids, targets, factor):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(ids, training=True) - targets) ** 2) / num
                loss = optimizer.scale_loss(loss)
            grads = tape.gradient(loss, model.trainable_weights)
            spoilt = [
                tf.IndexedSlices(g.values * factor, g.indices, g.dense_shape)
                if isinstance(g, tf.IndexedSlices)
                else g * factor
                for g in grads
            ]
            optimizer.apply_gradients(zip(spoilt, model.trainable_weights, strict=True))

        strategy.run(on_replica, args=(ids, targets, factor))

    def parts(array):
        def part(context):
            return tf.split(array, num)[context.replica_id_in_sync_group]

        return strategy.experimental_distribute_values_from_function(part) if num > 1 else tf.constant(array)

    for index in range(NUM_STEPS):
        factors = np.ones([num], "float32")
        if bad_replica is not None and index in BAD_STEPS:
            factors[bad_replica if num > 1 else 0] = np.inf
        step(parts(ids[index]), parts(targets[index].astype("float32")), parts(factors))
    return model, optimizer


def equal_replicas(strategy: tf.distribute.Strategy, variables) -> bool:
    """Whether this process's replicas hold the same bits."""
    local = [[value.numpy() for value in strategy.experimental_local_results(v.value)] for v in variables]
    return all(np.array_equal(values[0], value) for values in local for value in values)


def digest(variables) -> int:
    """Tells whether two processes hold the same bits."""
    return zlib.crc32(b"".join(np.ascontiguousarray(v.numpy()).tobytes() for v in variables))


def finite(model: keras.Model) -> bool:
    """Whether all weights are."""
    return all(np.all(np.isfinite(weight)) for weight in model.get_weights())


def case_steps(strategy: tf.distribute.Strategy, every: bool) -> dict:
    """One device against two replicas, for each optimizer and each place of an overflow."""
    results = {}
    for name, make in configurations(every).items():
        references = {spoilt: train(_alone(), make, 0 if spoilt else None) for spoilt in (False, True)}
        for bad in (None, 0, 1):
            expected, reference = references[bad is not None]
            model, optimizer = train(strategy, make, bad)
            pairs = zip(expected.get_weights(), model.get_weights(), strict=True)
            results[f"{name}, overflow on {bad}"] = {
                "difference": max(float(np.max(np.abs(one - two))) for one, two in pairs),
                "equal": equal_replicas(strategy, [*model.variables, *optimizer.variables]),
                "counters": counters(strategy, optimizer),
                "one_device": counters(_alone(), reference),
                "finite": finite(model),
                "digest": digest([*model.variables, *optimizer.variables]),
            }
    return results


def case_stock(strategy: tf.distribute.Strategy, every: bool) -> dict:
    """Keras' own class on the same steps (KERAS.md rows 1, 2, 8 and 9)."""

    def make(**settings):
        return lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1, **settings))

    results = {"finite": finite(train(strategy, make(), 1)[0])}
    pairs = [train(where, make(clipnorm=0.05), None)[0].get_weights() for where in (strategy, _alone())]
    results["clipped_difference"] = max(float(np.max(np.abs(one - two))) for one, two in zip(*pairs, strict=True))
    average = {"use_ema": True, "ema_overwrite_frequency": 3}
    for name, settings in (("accumulation", {"gradient_accumulation_steps": 2}), ("overwriting", average)):
        try:
            train(strategy, make(**settings), None)
            results[name] = ""
        except RuntimeError as error:
            results[name] = str(error)
    return results


def case_stock_fit(strategy: tf.distribute.Strategy, every: bool) -> dict:
    """Keras' own `fit` (KERAS.md row 3)."""
    with strategy.scope():
        model = build_convnet("float32")
        model.compile("sgd", "mse")
    try:
        model.fit(np.ones([16, 8, 8, 3], "float32"), np.ones([16, 3], "float32"), batch_size=8, verbose=0)
    except (ValueError, TypeError, RuntimeError) as error:
        return {"failed": type(error).__name__}
    return {"failed": ""}


def _alone() -> tf.distribute.Strategy:
    """One device."""
    return tf.distribute.get_strategy()


def counters(strategy: tf.distribute.Strategy, optimizer) -> list:
    """Scale, steps taken, skipped, skipped in a row; the same inside the strategy's scope and in a replica."""

    def read() -> list:
        return [optimizer.scale, optimizer.steps_taken, optimizer.steps_skipped, optimizer.consecutive_skips]

    seen = [read()]
    with strategy.scope():
        seen.append(read())
    strategy.run(lambda: seen.append(read()))
    assert all(each == seen[0] for each in seen), seen
    return seen[0]


def build_convnet(policy: str, synchronized: bool = True) -> keras.Model:
    """With statistics and an added loss. No activity regulariser: Keras sums it over a replica's part of a batch."""
    keras.utils.set_random_seed(1)
    with PrecisionPlan(policy).scope():
        pictures = keras.Input([8, 8, 3])
        x = keras.layers.Conv2D(8, 3, padding="same", use_bias=False, kernel_regularizer="l2")(pictures)
        # Synchronised, two halves of a batch are normalised as the whole, and can be compared with one device.
        x = keras.layers.BatchNormalization(synchronized=synchronized)(x)
        x = keras.layers.Flatten()(keras.layers.ReLU()(x))
        return keras.Model(pictures, keras.layers.Dense(3, dtype="float32")(x))


def fit(strategy: tf.distribute.Strategy, policy: str, num_steps: int, poison=False, synchronized=True, **scaling):
    """Keras' `fit` on global batches, through `compile_model`."""
    random = np.random.default_rng(2)
    x = random.normal(size=[num_steps * BATCH, 8, 8, 3]).astype("float32")
    if poison:
        x[BATCH * 2 + 7] = 60000.0  # the third batch's last picture overflows in float16, on the second replica
    y = random.normal(size=[num_steps * BATCH, 3]).astype("float32")
    data = distribution.shard(tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH, drop_remainder=True))
    held_out = distribution.shard(tf.data.Dataset.from_tensor_slices((x[:20], y[:20])).batch(BATCH))
    with strategy.scope():
        model = build_convnet(policy, synchronized)
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9, clipnorm=0.1)
        compilation.compile_model(model, optimizer, loss="mse", metrics=["mae"], **scaling)
    history = model.fit(data, validation_data=held_out, verbose=0, shuffle=False).history
    return model, {name: values[-1] for name, values in history.items()}


def case_fit(strategy: tf.distribute.Strategy, every: bool) -> dict:
    """`fit` in each policy, clipped and accumulating, beside one device; and an overflow in the forward pass."""
    results = {}
    for policy in ("float32", "mixed_bfloat16", "mixed_float16"):
        for steps in (1, 2) if every or policy == "mixed_float16" else (1,):
            settings = {"gradient_accumulation_steps": steps}
            expected, reference = fit(_alone(), policy, 6, **settings)
            model, logs = fit(strategy, policy, 6, **settings)
            pairs = list(zip(expected.get_weights(), model.get_weights(), strict=True))
            results[f"{policy}, {steps} batches a step"] = {
                "difference": max(float(np.max(np.abs(one - two))) for one, two in pairs),
                "logs": logs,
                "one_device": reference,
                "equal": equal_replicas(strategy, model.variables),
                "digest": digest(model.variables),
                "predicted": model.predict(np.ones([4, 8, 8, 3], "float32"), verbose=0).shape,
            }
    model, _ = fit(strategy, "mixed_float16", 6, poison=True)
    results["overflow in the forward pass"] = {
        "finite": finite(model),
        "equal": equal_replicas(strategy, model.variables),
        "counters": counters(strategy, model.optimizer),
    }
    return results


def case_probing(strategy: tf.distribute.Strategy, every: bool) -> dict:
    """The scale doubles every other step until gradients overflow, again and again."""
    model, logs = fit(strategy, "mixed_float16", 512 if every else 128, synchronized=False, dynamic_growth_steps=2)
    return {
        "finite": finite(model),
        "equal": equal_replicas(strategy, [*model.variables, *model.optimizer.variables]),
        "digest": digest([*model.variables, *model.optimizer.variables]),
        "counters": counters(strategy, model.optimizer),
        "loss": logs["loss"],
    }


def case_resume(strategy: tf.distribute.Strategy, every: bool) -> dict:
    """A run that was resumed beside one that wasn't, with random layers and statistics; and what replicas draw."""

    def build():
        keras.utils.set_random_seed(1)
        with strategy.scope(), PrecisionPlan().scope():
            inputs = keras.Input([6])
            x = keras.layers.BatchNormalization()(keras.layers.Dense(16)(inputs))
            x = keras.layers.Dropout(0.5, name="dropout")(x)
            model = keras.Model(inputs, keras.layers.Dense(1, dtype="float32")(x))
            compilation.compile_model(model, keras.optimizers.Adam(0.01), loss="mse")
        return model

    def batches(epoch):
        x = np.random.default_rng(epoch).normal(size=[32, 6]).astype("float32")
        return tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(BATCH)

    def train(model, workdir, epochs):
        settings = {"monitor": "val_loss", "config": {}, "steps_per_epoch": 4}
        training.fit(model, batches, batches(9), workdir=workdir, epochs=epochs, **settings)
        return digest([*model.variables, *model.optimizer.variables])

    with tempfile.TemporaryDirectory() as folder:
        whole, first = build(), build()
        digests = [train(whole, f"{folder}/whole", 3), train(first, f"{folder}/parts", 1)]
        resumed = build()
        digests.append(train(resumed, f"{folder}/parts", 3))
    dropout = resumed.get_layer("dropout")
    masks = strategy.run(tf.function(lambda: dropout(tf.ones([64]), training=True)))
    return {
        "digests": digests,
        "equal": equal_replicas(strategy, resumed.weights),
        "dropped": [mask.numpy().tolist() for mask in strategy.experimental_local_results(masks)],
    }


def case_monitor(strategy: tf.distribute.Strategy, every: bool) -> dict:
    """Overflows planted in one replica's part of a batch; with `every` also the weights without the monitor."""
    random, trials, num_trials = np.random.default_rng(0), [], 20 if every else 4
    num = strategy.num_replicas_in_sync

    def build():
        with strategy.scope():
            model, plants = planted.build(depth=2)
            settings = {"max_consecutive_skips": 1000, "initial_scale": 2.0**10, "min_scale": 2.0**10}
            compilation.compile_model(model, LossScaleOptimizer(keras.optimizers.Adam(1e-3), **settings), loss="mse")
        return model, plants

    def batch(marked: int | None):
        """A mark in a replica's part lets the plants of that replica act."""
        x = random.normal(size=[BATCH, 16]).astype("float32")
        x[:, 0] = 0.0
        if marked is not None:
            x[marked * BATCH // num : (marked + 1) * BATCH // num, 0] = 1.0
        return tf.data.Dataset.from_tensors((x, x[:, :4])).repeat(2)

    weights = []
    for watched in (False, True) if every else (True,):
        random = np.random.default_rng(0)
        model, plants = build()
        with tempfile.TemporaryDirectory() as folder:
            callbacks = [Monitor(folder, every=3, report=lambda line: None)] if watched else []
            for _ in range(num_trials):
                kind, index = random.choice(["forward", "backward"]), random.integers(1, len(plants))
                replica, path = int(random.integers(num)), sorted(plants)[index]
                plants[path].plant(kind)
                data = distribution.shard(batch(replica).unbatch().batch(BATCH))
                model.fit(data, steps_per_epoch=2, verbose=0, callbacks=callbacks)
                plants[path].plant(None)
                trials.append([path, kind, replica])
            path = sorted(plants)[-1]
            plants[path].plant("forward")
            x, y = next(batch(num - 1).as_numpy_iterator())
            data = distribution.shard(tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH))
            model.evaluate(data, verbose=0, callbacks=callbacks)
            plants[path].plant(None)
            files = [*Path(folder).glob("*.jsonl")]
            found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        weights.append(digest([*model.variables, *model.optimizer.variables]))
    return {
        "same_weights": len(set(weights)) == 1,
        "planted": trials[-num_trials:],
        "found": [[each["layer"], each["phase"], each["replica"]] for each in found if each["kind"] == "skipped"],
        "evaluated": [[each["layer"], each["replica"]] for each in found if each["kind"] == "evaluation"],
        "equal": equal_replicas(strategy, model.weights),
    }


def case_agree(strategy: tf.distribute.Strategy, every: bool) -> dict:
    """What workers decide together, and the parts of a batch that each of them sees."""
    workers = distribution.Workers(strategy)
    index = 0 if workers.is_chief else 1
    told = ""
    workers.check_same({"seed": 1, "epochs": 2}, "the flags")
    try:
        workers.check_same({"seed": index, "epochs": 2}, "the flags")
    except distribution.DistributionError as error:
        told = str(error)
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{folder}/{first}.txt" for first in (0, 6)]  # TensorFlow would give each worker a file
        for first, name in zip((0, 6), names, strict=True):
            tf.io.write_file(name, "\n".join(str(first + index) for index in range(6)))
        lines = tf.data.TextLineDataset(names).map(tf.strings.to_number)
        parts = [
            [value.numpy().tolist() for value in strategy.experimental_local_results(batch)]
            for batch in strategy.experimental_distribute_dataset(distribution.shard(lines.batch(4)))
        ]
    return {
        "any": [bool(flag) for flag in workers.any(index == 1, False, True)],
        "several": workers.several,
        "index": index,
        "num_replicas": workers.num_replicas,
        "told": told,
        "parts": parts,
    }


def main() -> None:
    """Runs one case."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--case", choices=("steps", "stock", "stock_fit", "fit", "probing", "resume", "monitor", "agree")
    )
    parser.add_argument("--distribute", choices=("mirrored", "multi_worker"))
    parser.add_argument("--every", action="store_true")
    given = parser.parse_args()
    strategy = distribution.make_strategy(given.distribute, 2 if given.distribute == "mirrored" else None)
    results = globals()[f"case_{given.case}"](strategy, given.every)
    distribution.Workers(strategy).wait_for_all()
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
