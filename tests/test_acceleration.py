"""Kernels under whole models: what changes (nothing but speed), what is found, what is left alone, what is saved."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfhalf
from tfhalf import acceleration, compilation, precision
from tfhalf.acceleration import accelerate, accelerate_optimizer, decelerate, left_alone

layers = keras.layers
POLICIES = pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])


def convnet():
    return keras.Sequential([
        keras.Input([8, 8, 3]),
        layers.Conv2D(8, 3, padding="same", name="conv"),
        layers.BatchNormalization(name="norm"),
        layers.ReLU(),
        layers.DepthwiseConv2D(3, padding="same", name="depthwise"),
        layers.MaxPooling2D(2),
        layers.Flatten(),
        layers.Dense(16, "gelu", name="dense"),
        layers.Dense(4, dtype="float32", name="head"),
    ])  # fmt: skip


class Block(keras.Layer):
    """A layer with layers inside, and one that brings its own call."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(6, name="inner")
        self.own = OwnDense(6, name="own")

    def call(self, inputs):
        return self.own(self.inner(inputs))


class OwnDense(layers.Dense):
    """Brings its own call."""

    def call(self, inputs, training=None):
        return 2 * super().call(inputs)


class KeptDense(layers.Dense):
    """Keeps Keras' call."""


class OwnAttention(layers.MultiHeadAttention):
    """Keeps Keras' methods but one that is used inside."""

    def _masked_softmax(self, attention_scores, attention_mask=None):
        return super()._masked_softmax(attention_scores + 1, attention_mask)


class OwnNormalization(layers.BatchNormalization):
    """As OwnAttention."""

    def _moments(self, inputs, mask):
        mean, variance = super()._moments(inputs, mask)
        return mean, 2 * variance


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.block, self.head = Block(name="block"), KeptDense(3, dtype="float32", name="head")

    def call(self, inputs):
        return self.head(self.block(inputs))


def build(make, policy="float32", seed=0):
    keras.utils.clear_session()  # names are counted anew
    keras.utils.set_random_seed(seed)
    with tfhalf.PrecisionPlan(policy).scope():
        return make()


def batch(seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=[16, 8, 8, 3]).astype("float32"), random.integers(0, 4, 16)


def with_kernel(model):
    return {
        path for path, layer in precision.layers_by_path(model).items()
        if set(precision.KERNEL_ATTRIBUTES) & set(vars(layer))
    }  # fmt: skip


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@POLICIES
def test_training_gives_the_same_numbers(policy):
    losses, models = {}, {}
    for name in ("Keras", "ours"):
        model = models[name] = build(convnet, policy)
        if name == "ours":
            accelerate(model)
        compilation.compile_model(model, keras.optimizers.SGD(0.05), loss=LOSS)
        losses[name] = [float(model.train_on_batch(*batch(step))) for step in range(6)]
    tolerance = {"float32": 1e-4, "mixed_float16": 1e-2, "mixed_bfloat16": 6e-2}[policy]
    np.testing.assert_allclose(losses["ours"], losses["Keras"], rtol=tolerance)
    for ours, stock in zip(models["ours"].weights, models["Keras"].weights, strict=True):
        assert (ours.path, ours.dtype, ours.shape) == (stock.path, stock.dtype, stock.shape)
        np.testing.assert_allclose(ours, stock, atol=5 * tolerance, err_msg=ours.path)
    np.testing.assert_allclose(
        models["ours"].predict(batch()[0], verbose=0),
        models["Keras"].predict(batch()[0], verbose=0),
        atol=10 * tolerance,
    )


def test_nothing_but_the_model_changes():
    before = {kind: vars(kind).get("call") for kind in vars(layers).values() if isinstance(kind, type)}
    policy, model, other = keras.config.dtype_policy().name, build(convnet), build(convnet)
    accelerate(model)
    assert with_kernel(model)
    assert not with_kernel(other)
    assert keras.config.dtype_policy().name == policy
    assert before == {kind: vars(kind).get("call") for kind in vars(layers).values() if isinstance(kind, type)}


def test_accelerating_twice_and_taking_it_away():
    model = build(convnet, "mixed_float16")
    expected = model.predict(batch()[0], verbose=0)
    accelerate(accelerate(model))
    assert with_kernel(model) == {"conv", "norm", "depthwise", "max_pooling2d", "dense", "head"}
    assert decelerate(model) is model
    assert not with_kernel(model)
    np.testing.assert_array_equal(model.predict(batch()[0], verbose=0), expected)


def test_traced_functions_are_made_anew():
    model = build(convnet, "mixed_bfloat16")
    compilation.compile_model(model, keras.optimizers.SGD(0.0), loss=LOSS)
    model.train_on_batch(*batch())
    model.predict(batch()[0], verbose=0)
    accelerate(model)
    assert (model.train_function, model.test_function, model.predict_function) == (None, None, None)
    model.train_on_batch(*batch())


def test_file_holds_nothing_of_ours(tmp_path):
    """A saved model loads in a process that doesn't know tfhalf, and predicts the same."""
    model = accelerate(build(convnet))
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", batch()[0])
    program = (
        "import sys, keras, numpy as np; model = keras.models.load_model(sys.argv[1] + '/model.keras');"
        "np.save(sys.argv[1] + '/y.npy', model.predict(np.load(sys.argv[1] + '/x.npy'), verbose=0));"
        "assert 'tfhalf' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=tmp_path)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), model.predict(batch()[0], verbose=0), atol=1e-5)
    assert not with_kernel(keras.models.clone_model(model))


def test_layers_inside_others_are_found():
    def make():
        steps = keras.Input([5, 8, 8, 3])
        x = layers.TimeDistributed(layers.Conv2D(2, 3, name="conv"), name="each")(steps)
        x = layers.Reshape([5, -1])(x)
        x = layers.Bidirectional(layers.LSTM(4, return_sequences=True, name="lstm"), name="both")(x)
        x = keras.Sequential([layers.Dense(3, "silu", name="dense")], name="nested")(x)
        x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
        return keras.Model(steps, layers.Dense(1, dtype="float32", name="head")(x))

    x = np.random.default_rng(0).normal(size=[2, 5, 8, 8, 3]).astype("float32")
    stock = build(make).predict(x, verbose=0)
    model = accelerate(build(make))
    assert with_kernel(model) == {
        "each/conv", "both/forward_lstm", "both/backward_lstm", "nested/dense", "attention", "attention/query",
        "attention/key", "attention/value", "attention/attention_output", "head",
    }  # fmt: skip
    assert left_alone(model) == {}
    np.testing.assert_allclose(model.predict(x, verbose=0), stock, atol=1e-5)


def test_subclassed_model_and_subclassed_layers():
    model = build(Subclassed)
    x = np.ones([2, 5], "float32")
    stock = np.array(model(x))
    accelerate(model)
    assert with_kernel(model) == {"block/inner", "head"}
    assert left_alone(model) == {"block/own": "OwnDense has no kernel"}
    np.testing.assert_allclose(model(x), stock, atol=1e-6)


def test_what_has_no_kernel_is_named_and_works():
    def make():
        inputs = keras.Input([6, 4])
        x = layers.BatchNormalization(axis=1, name="other_axis")(inputs)
        x = layers.LSTM(4, return_sequences=True, recurrent_dropout=0.5, name="lstm")(x)
        x = layers.GRU(4, return_sequences=True, name="gru")(x)
        x = layers.GroupQueryAttention(4, 2, 1, name="grouped")(x, x)
        x = OwnAttention(2, 4, name="own")(x, x)
        x = OwnNormalization(name="moments")(x)
        return keras.Model(inputs, layers.PReLU(name="prelu")(x))

    model = accelerate(build(make, "mixed_float16"))
    assert left_alone(model) == {
        "other_axis": "BatchNormalization with these settings has no kernel",
        "lstm": "LSTM with these settings has no kernel",
        "gru": "GRU has no kernel",
        "grouped": "GroupedQueryAttention has no kernel",
        "own": "OwnAttention has no kernel",
        "moments": "OwnNormalization has no kernel",
        "prelu": "PReLU has no kernel",
    }
    assert all(path.startswith(("grouped/", "own/")) for path in with_kernel(model)), "only the projections"
    assert model(np.ones([2, 6, 4], "float32")).shape == (2, 6, 4)


def test_a_layer_that_chooses_its_dtypes_itself_is_not_named():
    class Float32(layers.Layer):
        def call(self, inputs):
            return tf.cast(inputs, tf.float32) ** 2

    def make(**settings):
        inputs = keras.Input([4])
        return keras.Model(inputs, Float32(name="own", **settings)(inputs))

    assert left_alone(build(make)) == {"own": "Float32 has no kernel"}
    assert left_alone(build(lambda: make(autocast=False))) == {}


def test_what_somebody_else_replaced_stays():
    model = build(convnet)
    own = model.get_layer("dense").call
    model.get_layer("dense").call = replaced = lambda inputs: own(inputs) + 1
    accelerate(model)
    assert vars(model.get_layer("dense"))["call"] is replaced
    assert left_alone(model) == {"dense": "its call was replaced by somebody else"}
    decelerate(model)
    assert vars(model.get_layer("dense"))["call"] is replaced


def test_unbuilt_model_is_refused():
    with pytest.raises(ValueError, match="isn't built"):
        accelerate(keras.Sequential([layers.Dense(3)]))


def test_backbone_of_kerashub():
    keras_hub = pytest.importorskip("keras_hub")

    def make():
        return keras_hub.models.ResNetBackbone(
            input_conv_filters=[64], input_conv_kernel_sizes=[3], stackwise_num_filters=[64, 32],
            stackwise_num_blocks=[1, 1], stackwise_num_strides=[1, 2], block_type="basic_block",
            image_shape=(32, 32, 3),
        )  # fmt: skip

    x = np.random.default_rng(0).normal(size=[2, 32, 32, 3]).astype("float32")
    stock = build(make)(x)
    model = accelerate(build(make))
    assert left_alone(model) == {}
    np.testing.assert_allclose(model(x), stock, atol=1e-4)


def test_coverage_and_exports_are_traced_without_kernels(tmp_path):
    """What a laptop exports runs native half operations on a GPU."""
    model = build(convnet, "mixed_float16")
    stock = tfhalf.coverage(model)
    accelerate(model)
    assert tfhalf.coverage(model) == stock
    assert "call" in vars(model.get_layer("conv")), "the kernels are back afterwards"
    tfhalf.export_saved_model(model, tmp_path / "1", inputs=batch()[0])
    loaded = tf.saved_model.load(str(tmp_path / "1"))
    kinds = {
        operation.type: operation.inputs[0].dtype.name
        for operation in loaded.signatures["serving_default"].graph.get_operations()
        if operation.type in ("Conv2D", "DepthwiseConv2dNative", "MaxPool")
    }
    assert kinds == {}, "the signature calls a function"
    inner = [f for name, f in loaded.signatures["serving_default"].graph._functions.items()]
    native = {
        node.op: node.attr["T"].type
        for function in inner
        for node in function.definition.node_def
        if node.op in ("Conv2D", "DepthwiseConv2dNative", "MaxPool")
    }
    assert native == dict.fromkeys(("Conv2D", "DepthwiseConv2dNative", "MaxPool"), tf.float16.as_datatype_enum)


def test_plan_applies_after_accelerating():
    """The kernels ask for the dtype when they are called."""
    model = accelerate(build(convnet, "mixed_float16"))
    tfhalf.PrecisionPlan("mixed_float16", {"conv": "float32"}).apply(model)
    assert model.get_layer("conv")(batch()[0]).dtype == tf.float32
    with precision.computing_in(model, "bfloat16"):
        assert model.get_layer("depthwise")(np.ones([1, 8, 8, 8], "float32")).dtype == tf.bfloat16


@pytest.mark.parametrize("make", [
    lambda: layers.Dense(4), lambda: layers.EinsumDense("ab,bc->ac", 4, bias_axes="c"),
    lambda: layers.BatchNormalization(),
])  # fmt: skip
def test_integers_are_taken_as_keras_takes_them(make):
    def build_it():
        return keras.Sequential([keras.Input([8], dtype="int32"), make()])

    x = np.arange(24, dtype="int32").reshape(3, 8)
    np.testing.assert_allclose(accelerate(build(build_it))(x), build(build_it)(x), rtol=1e-6)


def test_sparse_inputs_are_taken_as_keras_takes_them():
    model = accelerate(build(lambda: keras.Sequential([keras.Input([8], sparse=True), layers.Dense(4)])))
    x = np.eye(8, dtype="float32")[:3]
    np.testing.assert_allclose(model(tf.sparse.from_dense(x)), x @ np.array(model.weights[0]), atol=1e-6)


def test_float64_stays_keras():
    def make():
        kinds = [layers.Dense(4, "gelu", use_bias=False), layers.BatchNormalization(), layers.Activation("tanh"),
                 layers.Reshape([2, 2]), layers.LSTM(3, use_bias=False)]  # fmt: skip
        return keras.Sequential([keras.Input([8]), *kinds])

    keras.config.set_dtype_policy("float64")
    try:
        keras.utils.set_random_seed(0)
        model = make()
    finally:
        keras.config.set_dtype_policy("float32")
    x = np.random.default_rng(0).normal(size=[5, 8])
    stock = np.array(model(x, training=False))
    np.testing.assert_array_equal(accelerate(model)(x, training=False), stock)


@pytest.mark.parametrize("make", [
    lambda: layers.Dense(8, "gelu"),
    lambda: layers.EinsumDense("abc,cd->abd", (None, 8), activation="gelu", bias_axes="d"),
])  # fmt: skip
def test_layers_of_unknown_length_are_not_compiled(make):
    """XLA would compile them anew for each length."""
    model = accelerate(build(lambda: keras.Sequential([keras.Input([None, 8]), make()]), "mixed_bfloat16"))
    graph = tf.function(model).get_concrete_function(tf.TensorSpec([None, None, 8])).graph
    assert not [operation for operation in graph.get_operations() if "PartitionedCall" in operation.type]
    graph = tf.function(model).get_concrete_function(tf.TensorSpec([None, 5, 8])).graph
    assert [operation for operation in graph.get_operations() if "PartitionedCall" in operation.type]


def test_skipped_step_leaves_the_statistics():
    """An overflowing batch, through the fused normalisation."""
    model = accelerate(build(convnet, "mixed_float16"))
    compilation.compile_model(model, keras.optimizers.SGD(0.01), loss=LOSS)
    model.train_on_batch(*batch())
    before = [np.array(weight) for weight in model.weights]
    x, y = batch(1)
    x[0] = np.inf
    model.train_on_batch(x, y)
    assert model.optimizer.steps_skipped == 1
    for weight, old in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight, old, err_msg=weight.path)


def test_frozen_normalisation_uses_its_statistics():
    model = build(convnet, "mixed_bfloat16")
    model.get_layer("norm").trainable = False
    accelerate(model)
    before = np.array(model.get_layer("norm").moving_mean)
    model(batch()[0], training=True)
    np.testing.assert_array_equal(model.get_layer("norm").moving_mean, before)


@pytest.mark.parametrize("shape", [[16, 5], [4, 7, 5], [2, 3, 4, 5], [2, 3, 2, 2, 5]])
def test_moving_statistics_are_keras(shape):
    """The fused operation's variance is divided by n - 1, Keras' by n."""
    x = 3 + np.random.default_rng(0).normal(size=shape).astype("float32")
    values = []
    for speed_up in (lambda model: model, accelerate):
        model = speed_up(
            build(lambda: keras.Sequential([keras.Input(shape[1:]), layers.BatchNormalization(momentum=0.5)]))
        )
        y = model(x, training=True)
        values.append([np.array(y), *(np.array(weight) for weight in model.weights), np.array(model(x))])
    for stock, ours in zip(*values, strict=True):
        np.testing.assert_allclose(ours, stock, rtol=1e-4, atol=1e-5)


def test_masked_normalisation_is_keras():
    def make():
        inputs = keras.Input([6, 4])
        return keras.Model(inputs, layers.BatchNormalization()(layers.Masking()(inputs)))

    x = np.random.default_rng(0).normal(size=[3, 6, 4]).astype("float32")
    x[:, 4:] = 0
    np.testing.assert_allclose(accelerate(build(make))(x, training=True), build(make)(x, training=True), atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [16, 12])  # 1 / sqrt(12) isn't a power of two
def test_attention_with_masks(causal, masked, width):
    def make():
        steps, others = keras.Input([6, 8]), keras.Input([5 if not causal else 6, 8])
        mask = keras.Input([6, 5 if not causal else 6], dtype="bool")
        attention = layers.MultiHeadAttention(2, width, name="attention")
        y, weights = attention(
            steps, others, attention_mask=mask if masked else None, use_causal_mask=causal, return_attention_scores=True
        )
        return keras.Model([steps, others, mask], [y, weights])

    random = np.random.default_rng(0)
    others = 6 if causal else 5
    inputs = [
        random.normal(size=[3, 6, 8]).astype("float32"),
        random.normal(size=[3, others, 8]).astype("float32"),
        random.random([3, 6, others]) > 0.3,
    ]
    inputs[2][..., 0] = True
    stock, ours = build(make)(inputs), accelerate(build(make))(inputs)
    for here, there in zip(ours, stock, strict=True):
        np.testing.assert_allclose(here, there, atol=1e-5)


def test_attention_drops_as_often_as_keras():
    def make():
        inputs = keras.Input([64, 8])
        _, scores = layers.MultiHeadAttention(2, 4, dropout=0.5)(inputs, inputs, return_attention_scores=True)
        y = layers.MultiHeadAttention(2, 4, dropout=0.5, name="attention")(inputs, inputs)
        return keras.Model(inputs, [y, scores])

    model = accelerate(build(make))
    x = np.random.default_rng(0).normal(size=[2, 64, 8]).astype("float32")
    still, trained = model(x)[0], [model(x, training=True)[0] for _ in range(64)]
    assert np.abs(np.array(trained[0]) - np.array(trained[1])).max() > 1e-3
    assert np.abs(np.mean(trained, axis=0) - still).mean() < 0.05


def apply_in_a_graph(optimizer, weight, gradients):
    step = tf.function(lambda gradient: optimizer.apply([gradient], [weight]))
    for gradient in gradients:
        step(tf.constant(gradient))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("make", [keras.optimizers.Adam, keras.optimizers.AdamW])
def test_optimizer_takes_the_same_steps(make, wrapped):
    """On equal gradients, with a schedule, clipping and settings that aren't the defaults."""
    gradients = [np.random.default_rng(step).normal(size=[40, 3]).astype("float32") for step in range(6)]
    variables = {}
    for name in ("Keras", "ours"):
        schedule = keras.optimizers.schedules.ExponentialDecay(0.01, 3, 0.5)
        optimizer = make(schedule, beta_1=0.8, beta_2=0.99, epsilon=1e-5, clipnorm=1.0)
        outer = keras.optimizers.LossScaleOptimizer(optimizer, 1.0) if wrapped else optimizer
        if name == "ours":
            assert accelerate_optimizer(optimizer) is optimizer
        weight = keras.Variable(np.ones([40, 3], "float32"))
        outer.build([weight])
        apply_in_a_graph(outer, weight, gradients)
        variables[name] = [np.array(variable) for variable in [weight, *optimizer.variables]]
    for ours, stock in zip(variables["ours"], variables["Keras"], strict=True):
        np.testing.assert_allclose(ours, stock, rtol=2e-6, atol=1e-7)


def test_optimizer_takes_sparse_gradients():
    embeddings = {}
    for name in ("Keras", "ours"):
        model = build(
            lambda: keras.Sequential([keras.Input([3], dtype="int32"), layers.Embedding(50, 4), layers.Flatten()])
        )
        optimizer = keras.optimizers.Adam(0.1)
        model.compile(accelerate_optimizer(optimizer) if name == "ours" else optimizer, "mse")
        for step in range(3):
            model.train_on_batch(np.array([[1, 2, 2], [7, step, 1]]), np.ones([2, 12]))
        embeddings[name] = np.array(model.weights[0])
    np.testing.assert_allclose(embeddings["ours"], embeddings["Keras"], atol=1e-5)


def test_optimizers_that_are_not_known_stay(tmp_path):
    for optimizer in (keras.optimizers.SGD(), keras.optimizers.Adam(amsgrad=True), keras.optimizers.Nadam()):
        assert "update_step" not in vars(accelerate_optimizer(optimizer))
    model = build(convnet)
    model.compile(accelerate_optimizer(keras.optimizers.Adam(0.01)), LOSS)
    model.train_on_batch(*batch())
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for ours, theirs in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_xla_compiles_an_accelerated_step():
    model = accelerate(build(lambda: keras.Sequential([keras.Input([4]), layers.Dense(8, "gelu"), layers.Dense(4)])))
    model.compile(accelerate_optimizer(keras.optimizers.Adam(0.1)), LOSS, jit_compile=True)
    losses = [float(model.train_on_batch(np.eye(4, dtype="float32"), np.arange(4))) for _ in range(20)]
    assert losses[-1] < losses[0] / 2


def test_every_kernel_s_class_has_the_method_that_is_replaced():
    """Fails when Keras moves or renames what is replaced."""
    for kind, methods, _ in acceleration._KERNELS:
        assert all(callable(getattr(kind, name)) for name in methods), (kind, methods)
