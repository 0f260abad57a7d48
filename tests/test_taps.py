"""Watched passes: their order, what they compute beside the step itself, and that nothing of them is left."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfhalf
from tfhalf import exponents, taps


def compiled(model: keras.Model, loss="mse") -> keras.Model:
    tfhalf.compile_model(model, keras.optimizers.SGD(0.1), loss=loss)
    return model


@pytest.fixture
def half():
    keras.utils.set_random_seed(2)
    with tfhalf.PrecisionPlan().scope():
        yield


def in_graph(model: keras.Model, data, read, **settings):
    """Makes a watched pass in a graph, and returns what `read` takes of it."""
    return tf.function(lambda *batch: read(taps.replay(model, batch, scale=8.0, **settings)), autograph=False)(*data)


class Block(keras.layers.Layer):
    """Two layers with something between them."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.first, self.second = keras.layers.Dense(4, name="first"), keras.layers.Dense(4, name="second")

    def call(self, x):
        return self.second(self.first(x) * 3.0) + x


BATCH = np.random.default_rng(0).normal(size=[6, 4]).astype("float32"), np.zeros([6, 4], "float32")


def test_places_go_along_the_computation(half):
    inputs = keras.Input([4])
    model = keras.Model(inputs, keras.layers.Dense(4, dtype="float32", name="head")(Block(name="block")(inputs)))
    compiled(model)
    named = []

    def read(made):
        named.extend((place.layer, place.phase, place.what) for place in taps.places(BATCH[:0], made))
        return made.loss

    in_graph(model, BATCH, read)
    own, taken, given = "its own operations", "its input, in its dtype", "its output"
    inside, weights, d_taken = "the gradients inside it", "the gradient of its weights", "the gradient of its input"
    assert named == [
        ("block", "forward", own), ("block/first", "forward", taken), ("block/first", "forward", given),
        ("block", "forward", own), ("block/second", "forward", taken), ("block/second", "forward", given),
        ("block", "forward", given),
        ("head", "forward", taken), ("head", "forward", given), ("(model)", "forward", given),
        ("(loss)", "forward", "the loss"),
        ("(loss)", "backward", "its gradient by the model's output"),
        ("head", "backward", "the gradient of its output"),
        ("head", "backward", weights), ("head", "backward", d_taken),
        ("block", "backward", "the gradient of its output"),
        ("block", "backward", inside), ("block/second", "backward", weights), ("block/second", "backward", d_taken),
        ("block", "backward", inside), ("block/first", "backward", weights),  # of data, nobody asks
    ]  # fmt: skip


def test_gradients_are_those_of_the_step(half):
    inputs = keras.Input([4])
    x = keras.layers.Dropout(0.5, seed=3)(Block(name="block")(inputs))
    x = keras.layers.Dense(4, kernel_regularizer="l2", name="regular")(x)
    x = keras.layers.BatchNormalization(name="norm")(x)
    model = compiled(keras.Model(inputs, keras.layers.Dense(4, dtype="float32", name="head")(x)))
    states = [variable for variable in model.variables if "seed" in variable.path]
    before = [variable.numpy() for variable in model.variables]

    def read(made):
        return made.weight_gradients, made.loss

    gradients, loss = in_graph(model, BATCH, read)
    for old, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, variable.numpy(), err_msg=variable.path)
    seeds = [(state, tf.identity(state.value)) for state in states]
    model.optimizer.build(model.trainable_variables)
    model.optimizer.dynamic_scale.assign(8.0)
    logs = model.train_on_batch(*BATCH, return_dict=True)
    assert float(loss) == float(logs["loss"])
    for path, layer in tfhalf.precision.layers_by_path(model).items():
        for variable, gradient in zip(layer.trainable_variables, gradients.get(path, []), strict=False):
            old = before[[v is variable for v in model.variables].index(True)]
            np.testing.assert_allclose(variable.numpy(), old - 0.1 * gradient / 8.0, atol=1e-6, err_msg=variable.path)
    # The random states have gone on by now: with those from before the step, the pass is the step's again.
    again = in_graph(model, BATCH, lambda made: made.events[1].tensors[0], states=seeds)
    assert again.shape == [6, 4]


def test_random_states_of_before_give_the_masks_of_before(half):
    inputs = keras.Input([4])
    x = keras.layers.Dropout(0.5, name="drop")(inputs)
    model = compiled(keras.Model(inputs, keras.layers.Dense(4, dtype="float32")(x)))
    states = [variable for variable in model.variables if "seed" in variable.path]
    seeds = [(state, tf.identity(state.value)) for state in states]
    assert len(seeds) == 1

    def dropped(made):
        (event,) = [event for event in made.events if (event.layer, event.kind) == ("drop", "leave")]
        return event.tensors[0]

    first = in_graph(model, BATCH, dropped)
    model.layers[1](tf.ones([1, 4]), training=True)  # draws
    np.testing.assert_array_equal(in_graph(model, BATCH, dropped, states=seeds), first)
    assert np.any(in_graph(model, BATCH, dropped) != first)


def test_shared_layers_masks_loops_and_sparse_gradients(half):
    ids = keras.Input([5], dtype="int32")
    x = keras.layers.Embedding(7, 8, mask_zero=True, name="embedding")(ids)
    x = keras.layers.LSTM(8, return_sequences=True, name="lstm")(x)
    shared = keras.layers.Dense(8, name="shared")
    for _ in range(6):
        x = shared(x)
    x = keras.layers.GlobalAveragePooling1D(name="mean")(x)
    model = compiled(keras.Model(ids, keras.layers.Dense(2, dtype="float32", name="head")(x)))
    batch = np.array([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0]]), np.zeros([2, 2], "float32")
    events, sizes = [], {}

    def read(made):
        events.extend(event.layer for event in made.events if event.kind == "leave")
        sizes.update({path: [g.shape for g in some] for path, some in made.weight_gradients.items()})
        return [tensor for event in made.events if event.layer == "mean" for tensor in event.tensors][-1], made.loss

    mean, loss = in_graph(model, batch, read)
    assert events == ["embedding", "lstm", *["shared"] * 4, "mean", "head"]  # the cell's calls are in a loop
    assert sizes["embedding"][0] == [10, 8]
    assert next(shapes for path, shapes in sizes.items() if path.startswith("lstm"))[0] == [8, 32]
    outer = keras.Model(model.input, model.get_layer("mean").output)
    np.testing.assert_array_equal(mean, outer(batch[0], training=True))
    assert float(loss) == pytest.approx(float(model.evaluate(*batch, verbose=0)), rel=1e-3)


def test_model_is_as_before_after_an_error(half):
    model = compiled(keras.Sequential([keras.Input([4]), keras.layers.Dense(2, dtype="float32")]))
    tfhalf.accelerate(model)
    kernel = vars(model.layers[0])["call"]
    with pytest.raises(RuntimeError, match="stop"), taps.watched(model):  # noqa: PT012 - what is inside is the test
        assert vars(model.layers[0])["call"] is not kernel
        raise RuntimeError("stop")
    assert vars(model.layers[0])["call"] is kernel


def test_forward_pass_has_no_gradients_and_moves_no_statistics(half):
    inputs = keras.Input([4])
    model = compiled(
        keras.Model(inputs, keras.layers.Dense(1, dtype="float32")(keras.layers.Dense(2, name="a")(inputs)))
    )
    phases = []

    @tf.function
    def look(x):
        made = taps.forward(model, (x,))
        phases.extend((place.layer, place.phase) for place in taps.places((x,), made))
        return made.events[-1].tensors[0]

    np.testing.assert_array_equal(look(tf.constant(BATCH[0])), model(BATCH[0]))
    assert phases[0] == ("(data)", "forward")
    assert {phase for _, phase in phases} == {"forward"}


class Subclassed(keras.Model):
    """Computes something between its layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = keras.layers.Dense(4, name="first"), keras.layers.Dense(4, name="second")
        self.head = keras.layers.Dense(2, dtype="float32", name="head")

    def call(self, x):
        return self.head(self.second(self.first(x) * 1e5))


@pytest.mark.parametrize("functional", [False, True])
def test_what_a_model_computes_itself_is_not_put_down_to_the_next_layer(half, functional):
    model = Subclassed()
    if functional:
        inputs = keras.Input([4])
        model = keras.Model(inputs, model.head(model.second(model.first(inputs) * 1e5)))
    model(BATCH[0])
    found = []

    def look(x):
        places = taps.places((x,), taps.forward(model, (x,)))
        found.extend((place.layer, place.what) for place in places)
        return tf.stack([exponents.extremes(place.tensors)[0] for place in places])

    bad = tf.function(look, autograph=False)(tf.constant(BATCH[0])).numpy()
    assert found[int(np.argmax(bad > 0))] == ("(model)", "its own operations")
