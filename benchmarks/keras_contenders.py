"""The step of a contender that runs on Keras: stock, with tfhalf, or with TensorFlow's own rewriter.

Runs in a contender's own process (`benchmarks/contenders.py`).
"""

import re

import keras
import numpy as np
import tensorflow as tf

import tfhalf
from benchmarks import batches, networks

LEARNING_RATE = 1e-4


def save_weights(network: str, path: str) -> None:
    """Writes the weights that every contender starts from.

    They are Keras' first weights under seed 0, with two changes that make losses tell right from wrong: moving
    statistics are those of a batch, so that activations neither vanish nor explode in inference; and the last kernel is
    scaled so that logits have a root mean square of 1, where an LSTM's first are so small that any network would do.
    """
    keras.utils.set_random_seed(0)
    model = networks.BUILDERS[network]()
    inputs, _ = batches.random_batch(network, np.random.default_rng(0))
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0  # the moving statistics become the batch's
    logits = keras.ops.convert_to_numpy(model(inputs, training=True))
    head = model.layers[-1]
    head.kernel.assign(head.kernel / np.sqrt(np.mean(np.square(logits))))
    np.savez(path, **{name: weight.numpy() for name, weight in _named_weights(model)})


def _named_weights(model: keras.Model):
    """Yields `kind/layer/array` and weight: layers of a kind in the order they were made in, from 0."""
    for layer in model.layers:
        # Keras numbers them so: dense, dense_1, ...; `model.layers` is sorted by depth. Their number decides.
        number = re.search(r"(_(\d+))?$", layer.name).group(2) or "0"
        for index, weight in enumerate(layer.weights):
            yield f"{type(layer).__name__}/{int(number):03}/{index:03}", weight


def make_step(kind: str, library: str, policy: str, network: str, weights_path: str):
    """Returns the step: (inputs, targets) to the loss when `kind` is "training", else to logits."""
    if library == "Grappler":
        tf.config.optimizer.set_experimental_options({"auto_mixed_precision_onednn_bfloat16": True})
        policy = "float32"
    with tfhalf.PrecisionPlan(policy).scope():  # sets the global policy, nothing else
        model = networks.BUILDERS[network]()
    with np.load(weights_path) as saved:
        for name, weight in _named_weights(model):
            weight.assign(saved[name])
    if library == "tfhalf":
        tfhalf.accelerate(model)
    if kind == "inference":
        return _inference_step(model)
    optimizer = keras.optimizers.Adam(LEARNING_RATE)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if library == "tfhalf":
        tfhalf.compile_model(model, tfhalf.accelerate_optimizer(optimizer), loss=loss)
    else:
        model.compile(optimizer, loss)
    return lambda inputs, targets: float(model.train_on_batch(inputs, targets))


def _inference_step(model: keras.Model):
    forward = tf.function(lambda inputs: model(inputs, training=False), autograph=False)
    return lambda inputs, targets: forward(inputs).numpy()
