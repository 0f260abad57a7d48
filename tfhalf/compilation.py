"""A model compiled for half precision and for several replicas: what Keras' own training step leaves out.

* The loss is scaled exactly if a layer computes in float16, whatever the model's own policy is called.
* A skipped step takes back what layers did to themselves in its forward pass. Keras' BatchNormalization has seen the
  batch by then: one overflow turns its moving statistics into NaN while the weights look fine.
* On several replicas the moving statistics are averaged after each step. Keras 3 lets each replica keep its own, and
  saves the first one's.
* On several replicas random layers draw other numbers in each. Keras 3 drops the same units in all of them.
* Losses that layers add (`add_loss`, activity regularisers) are summed in float32; Keras adds half to float32, and
  fails.
* The step is traced once. Keras lets the first step make variables, so TensorFlow traces it a second time.
* `fit` works under `MultiWorkerMirroredStrategy`: Keras 3.15 takes means over an axis that its scalars don't have.

All of it is put on the one model, nothing on Keras. It doesn't train (`tfhalf.training`).
"""

import contextlib
import functools
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf

from tfhalf import precision
from tfhalf.optimizer import LossScaleOptimizer

# 2^32 divided by the golden ratio: multiples lie far apart (Knuth, The Art of Computer Programming 3, section 6.4).
_SEED_STEP = 0x9E3779B9
# Attribute of a training step: the optimizer whose skipped steps it takes back.
_GUARDED = "guarded_optimizer"
# Of other kinds Keras would keep shape and dtype only: of ragged or sparse tensors that isn't all.
_DENSE = (np.ndarray, tf.Tensor, tf.TensorSpec, type(None))
# What is put on the model, and taken off when it is compiled again.
_OVERRIDDEN = (
    "train_step",
    "test_step",
    "make_train_function",
    "make_test_function",
    "_aggregate_additional_loss",
    "_maybe_symbolic_build",
)


def compile_model(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    *,
    loss,
    metrics=None,
    jit_compile=False,
    gradient_accumulation_steps=1,
    **scaling,
) -> None:
    """Compiles a model so that `fit` is right in every policy, on one device or under a distribution strategy.

    Args:
        model: a built model with float32 outputs; under a strategy built, and compiled, in its scope.
        optimizer: a Keras optimizer; or a `LossScaleOptimizer`, which is taken as it is.
        loss: as in `keras.Model.compile`.
        metrics: as in `keras.Model.compile`.
        jit_compile: whether XLA compiles the step.
        gradient_accumulation_steps: batches that make one step, at least 1.
        **scaling: arguments of `LossScaleOptimizer`. The scale's have no effect where nothing computes in float16.

    A model that is loaded from a file must be compiled again: the file has Keras' own step.

    Raises:
        ValueError: an output of the model isn't float32; the optimizer scales the loss, and not as ours does;
            `jit_compile` is asked for under a strategy.
    """
    if jit_compile and _strategy(model) is not None:
        raise ValueError("compile_model: jit_compile and a distribution strategy exclude each other; leave one out")
    precision.require_float32_outputs(model)
    if isinstance(optimizer, LossScaleOptimizer):
        if scaling or gradient_accumulation_steps != 1:
            raise ValueError("compile_model: optimizer is a LossScaleOptimizer; give it these settings itself")
    elif precision.needs_loss_scaling(model):
        optimizer = LossScaleOptimizer(optimizer, gradient_accumulation_steps=gradient_accumulation_steps, **scaling)
    elif _strategy(model) is not None or gradient_accumulation_steps > 1:
        # With a scale of 1, for the rest of it: Keras clips each replica's part, and can't accumulate under a strategy.
        one = {"initial_scale": 1.0, "min_scale": 1.0, "max_scale": 1.0}
        optimizer = LossScaleOptimizer(
            optimizer, gradient_accumulation_steps=gradient_accumulation_steps, **scaling | one
        )
    for name in _OVERRIDDEN:
        model.__dict__.pop(name, None)
    model.compile(optimizer=optimizer, loss=loss, metrics=metrics, jit_compile=jit_compile, auto_scale_loss=False)
    _add_losses_in_float32(model)
    _regularise_activities_in_float32(model)
    if isinstance(optimizer, LossScaleOptimizer):
        _guard_statistics(model)
    _build_before_tracing(model)
    if _strategy(model) is not None:
        _give_vectors_to_workers(model)
        spread_random_states(model)


def compiled_by_us(model: keras.Model) -> bool:
    """Returns whether a model has what `compile_model` puts on it.

    Keras' own `compile` doesn't take it off: losses that layers add are still summed in float32 then, but a skipped
    step is no longer taken back. A loaded or cloned model has none of it.
    """
    return "_aggregate_additional_loss" in vars(model)


def takes_back(model: keras.Model) -> bool:
    """Returns whether a step that the model's optimizer skips is taken back; after Keras' own `compile` it isn't."""
    return getattr(vars(model).get("train_step"), _GUARDED, None) is model.optimizer


def spread_random_states(model: keras.Model) -> None:
    """Makes every replica's random states differ from the first one's, which stays; again after all were set alike."""
    if _strategy(model) is None:
        return
    states = random_states(model)

    def spread():
        replica = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.int64)
        for state in states:  # a seed and a count
            seed, count = tf.unstack(tf.cast(state.value, tf.int64))
            state.assign(tf.stack([(seed + replica * _SEED_STEP) % 2**32, count]))

    _strategy(model).run(spread)


def random_states(model: keras.Model) -> list[keras.Variable]:
    """Returns the variables that a model's random layers draw their next numbers from."""
    others = {id(variable) for variable in [*model.weights, *model.metrics_variables]}
    return [variable for variable in model.variables if id(variable) not in others]


def _strategy(model: keras.Model) -> tf.distribute.Strategy | None:
    # Private Keras: the strategy whose scope the model was made in; the public property never says "none".
    return model._distribute_strategy


def _add_losses_in_float32(model: keras.Model) -> None:
    # Private Keras: it hands each added loss through this method on its way into the sum.
    aggregate = model._aggregate_additional_loss
    model._aggregate_additional_loss = lambda loss: aggregate(precision.at_least_float32(loss))


@contextlib.contextmanager
def activities_in_float32(model: keras.Model) -> Iterator[None]:
    """Lets activity regularisers see float32 while the block runs: a float16 sum of squares ends at 65504."""
    layers = _regularised_in_half(model)
    regularizers = [layer.activity_regularizer for layer in layers]
    try:
        for layer, regularizer in zip(layers, regularizers, strict=True):
            layer.activity_regularizer = lambda x, inner=regularizer: inner(precision.at_least_float32(x))
        yield
    finally:  # so that the layers are saved as they were made
        for layer, regularizer in zip(layers, regularizers, strict=True):
            layer.activity_regularizer = regularizer


def _regularised_in_half(model: keras.Model) -> list[keras.Layer]:
    layers = precision.layers_by_path(model).values()
    halves = [layer for layer in layers if layer.compute_dtype in precision.HALF_DTYPES]
    return [layer for layer in halves if getattr(layer, "activity_regularizer", None)]


def _regularise_activities_in_float32(model: keras.Model) -> None:
    """Puts `activities_in_float32` around the model's steps."""
    if not _regularised_in_half(model):
        return

    def wrap(kind: str) -> None:
        make = getattr(model, f"make_{kind}_function")

        def make_function(force=False):
            if getattr(model, f"{kind}_function") is None or force:
                make(force=True)
                around = activities_in_float32(model)
                setattr(model, f"{kind}_function", around(getattr(model, f"{kind}_function")))
            return getattr(model, f"{kind}_function")

        setattr(model, f"make_{kind}_function", make_function)

    # Around the whole function, and not in the step: replicas' threads take turns in the middle of a step.
    wrap("train")
    wrap("test")


def _guard_statistics(model: keras.Model) -> None:
    """Takes back what a skipped step did to variables that aren't trained, and averages them over the replicas."""
    step, optimizer = model.train_step, model.optimizer

    @functools.wraps(step)
    def train_step(*args, **kwargs):
        # Private Keras: the variables that layers assign themselves; a frozen layer's kernels aren't among them, as in
        # the public non_trainable_weights, nor are random states.
        layers = [model, *precision.layers_by_path(model).values()]
        statistics = list({id(v): v for layer in layers for v in layer._non_trainable_variables}.values())
        statistics += [layer.kernel for layer in layers if isinstance(layer, keras.layers.SpectralNormalization)]
        before = [tf.identity(variable.value) for variable in statistics]
        skipped = optimizer.steps_skipped
        logs = step(*args, **kwargs)
        taken = tf.equal(optimizer.steps_skipped, skipped)
        after = [tf.identity(variable.value) for variable in statistics]
        if model.distribute_strategy.num_replicas_in_sync > 1:
            after = _mean_over_replicas(after)
        for variable, old, new in zip(statistics, before, after, strict=True):
            variable.assign(tf.where(taken, new, old))
        return logs

    setattr(train_step, _GUARDED, optimizer)
    model.train_step = train_step


def _mean_over_replicas(values: list[tf.Tensor]) -> list[tf.Tensor]:
    """Averages the floats, all in one call; integers are counts of steps, the same everywhere."""
    floats = [value for value in values if value.dtype.is_floating]
    if not floats:
        return values
    means = iter(tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, floats))
    return [next(means) if value.dtype.is_floating else value for value in values]


def _build_before_tracing(model: keras.Model) -> None:
    """Lets the metrics and the optimizer make their variables before the first step is traced.

    Keras leaves that to the step, and TensorFlow traces a function twice if it makes variables.
    """
    strategy, own_step, built = _strategy(model), type(model).train_step is not keras.Model.train_step, False

    def build_once(iterator=None, data_batch=None):
        nonlocal built
        if built or (strategy is None and own_step):  # what such a step calls isn't known
            return
        if strategy is None:
            # Private Keras: the epoch's data set, of which no batch is read.
            specs = data_batch if iterator is None else iterator._distributed_dataset.element_spec
            if not all(isinstance(leaf, _DENSE) for leaf in tf.nest.flatten(specs)):
                return
        else:
            if iterator is not None:
                for _, _, batches in iterator:
                    data_batch = next(batches)
                    break
            specs = tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], data_batch)
        with strategy.scope() if strategy else contextlib.nullcontext():
            model._symbolic_build(data_batch=specs)
        built = True

    # Private Keras: it builds under a strategy only, reads a batch before each fit, and fails to take the mean of
    # several workers' batches. Shapes and dtypes are all that is needed of it.
    model._maybe_symbolic_build = build_once


def _give_vectors_to_workers(model: keras.Model) -> None:
    """Makes a step's logs vectors, where several workers' are reduced."""
    if not isinstance(_strategy(model), tf.distribute.MultiWorkerMirroredStrategy):
        return

    def vectors(step):
        @functools.wraps(step)
        def wrapped(*args, **kwargs):
            return tf.nest.map_structure(lambda value: tf.reshape(value, [-1]), step(*args, **kwargs))

        return wrapped

    # Keras' reduce_per_replica takes the mean of the logs over axis 0 there, which scalars don't have.
    model.train_step = vectors(model.train_step)
    model.test_step = vectors(model.test_step)
