"""A program for tests: a run of training that kills itself, is asked to stop, or is killed from outside.

    python -m tests.resumable <folder> <whole|often|kill|term|poison>

It prints `begun` before the first batch, and exits as an app does.
"""

import os
import signal
import sys

import keras
import numpy as np
import tensorflow as tf

import tfhalf
from tfhalf import training


def build_model() -> keras.Model:
    """With random numbers, statistics and a schedule of learning rates, whose states a resumed run needs."""
    keras.utils.set_random_seed(1)
    with tfhalf.PrecisionPlan().scope():
        inputs = keras.Input([12])
        x = keras.layers.Dense(32, name="dense")(inputs)
        x = keras.layers.BatchNormalization(name="norm")(x)
        x = keras.layers.Dropout(0.4, name="dropout")(x)
        model = keras.Model(inputs, keras.layers.Dense(2, dtype="float32", name="head")(x))
    schedule = keras.optimizers.schedules.CosineDecay(0.01, 30)
    training.compile_model(model, keras.optimizers.Adam(schedule), loss="mse", metrics=[], dynamic_growth_steps=4)
    return model


def batches_of(epoch: int, mode: str) -> tf.data.Dataset:
    """An epoch's batches; in the mode `kill` it kills the process, in `term` and `poison` one of them does, gently."""
    if mode == "kill" and epoch == 3:
        os.kill(os.getpid(), signal.SIGKILL)

    def stop(x, y):
        if epoch == 2 and np.array_equal(x.numpy(), marked):
            os.kill(os.getpid(), signal.SIGTERM)
        return x

    x = np.random.default_rng([1, epoch]).normal(size=[48, 12]).astype("float32")
    marked = x[16:24].copy()
    if mode == "poison" and epoch == 2:
        x[:16] = np.nan
    data = tf.data.Dataset.from_tensor_slices((x, x[:, :2])).batch(8)
    if mode in ("term", "poison"):
        data = data.map(lambda x, y: (tf.ensure_shape(tf.py_function(stop, [x, y], tf.float32), [None, 12]), y))
    return data


def main() -> None:
    """Runs the program."""
    workdir, mode = sys.argv[1:]
    model = build_model()
    print("begun", flush=True)
    seconds = 0.0 if mode == "often" else 300.0
    try:
        training.fit(
            model, lambda epoch: batches_of(epoch, mode), batches_of(99, mode), workdir=workdir, epochs=5,
            steps_per_epoch=6, monitor="val_loss", config={}, report=print, checkpoint_seconds=seconds,
        )  # fmt: skip
    except training.InterruptedRun as error:
        print(error)
        sys.exit(130)
    except training.TrainingError as error:
        print(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
