"""What the evidence of a pass says, for graphs and numbers that are known by hand."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from keras.dtype_policies import DTypePolicyMap

import tfhalf
from tfhalf import evidence, precision
from tfhalf.evidence import Evidence

HALF = "mixed_float16"
ONES = np.ones([2, 8], "float32")


class Does(layers.Layer):
    """A layer that does what a function does, and adds what another one makes of its input as a loss."""

    def __init__(self, function, loss=None, **kwargs):
        super().__init__(**kwargs)
        self.function, self.loss = function, loss

    def call(self, inputs, flag=None):
        if self.loss:
            self.add_loss(self.loss(inputs))
        return self.function(inputs)


class Block(layers.Layer):
    """Calls the layer inside it, adds its own input, and goes on where that fails, if it is told to."""

    def __init__(self, inner, forgiving=False, **kwargs):
        super().__init__(**kwargs)
        self.inner, self.forgiving = inner, forgiving

    def call(self, inputs):
        with contextlib.suppress(ValueError) if self.forgiving else contextlib.nullcontext():
            return self.inner(inputs) + inputs
        return inputs


def refuse_half(x):
    if x.dtype != "float32":
        raise ValueError(f"no {x.dtype}")
    return x


def blocked(function, loss=None, policy=HALF, **settings) -> keras.Model:
    """block/does in half, then a float32 head."""
    inner = Does(function, loss, name="does", dtype=policy)
    made = [Block(inner, **settings, name="block", dtype=policy), layers.Dense(8, name="head", dtype="float32")]
    return keras.Sequential([keras.Input([8]), *made])


def kinds(seen, path) -> list[str]:
    return [operation.type for operation in seen.operations[path]]


def test_an_operation_belongs_to_the_innermost_layer_that_added_it():
    seen = Evidence(blocked(ops.exp), None).trace
    assert "Exp" in kinds(seen, "block/does")
    assert "AddV2" in kinds(seen, "block")
    assert "Exp" not in kinds(seen, "block")
    assert "MatMul" in kinds(seen, "head")
    owned = [id(operation) for operations in seen.operations.values() for operation in operations]
    assert len(owned) == len(set(owned))
    assert [each.dtype.name for each in seen.outputs] == ["float32"]
    assert seen.error is None


def test_trace_computes_in_half_and_its_twin_in_float32():
    found = Evidence(blocked(ops.exp), None)
    for seen, dtype in ((found.trace, "float16"), (found.twin, "float32"), (found.trace, "float16")):
        (exp,) = [each for each in seen.operations["block/does"] if each.type == "Exp"]
        assert exp.outputs[0].dtype.name == dtype
        assert exp.outputs[0].shape == [1, 8]


def test_every_call_has_its_arguments():
    layer = Does(ops.exp, name="does", dtype=HALF)
    x = keras.Input([8])
    seen = Evidence(keras.Model(x, layer(layer(x, flag=None), flag=True)), None).trace
    assert [each.get("flag") for each in seen.arguments["does"]] == [None, True]


def test_weight_belongs_to_the_innermost_layer():
    with precision.PrecisionPlan(HALF).scope():
        inner = keras.Sequential([keras.Input([8]), layers.Dense(8, name="dense")], name="inner")
        model = keras.Sequential([keras.Input([8]), inner, layers.BatchNormalization(name="norm")])
    found = Evidence(model, None)
    assert [(path, weight.name) for path, _, weight in found.weights] == [
        *(("inner/dense", name) for name in ("kernel", "bias")),
        *(("norm", name) for name in ("gamma", "beta", "moving_mean", "moving_variance")),
    ]
    assert [array.sum() for path, _, _, array in found.arrays if path == "norm"] == [8, 0, 0, 8]
    assert [path for path, _ in found.halves()] == [path for path, _ in found.halves("float16")] == [*found.layers]
    assert list(found.halves("bfloat16")) == []


def test_constants_come_in_half_and_in_float32():
    (row,) = Evidence(blocked(lambda x: x * 1e-9), None).constants
    path, operation, value, other = row
    assert (path, operation.type, value, other) == ("block/does", "Mul", 0, np.float32(1e-9))
    assert Evidence(blocked(lambda x: x * 3.0), None).constants == []
    assert Evidence(blocked(lambda x: x * 1e-9, policy="mixed_bfloat16"), None).constants == []


def test_first_numbers_that_are_not_finite_are_noted_in_order():
    found = Evidence(blocked(lambda x: x * 300.0), ONES * 300)
    assert found.run.bad[0] == ("block/does", 0, "output")
    assert found.run.bad[1:3] == [("block", 0, "output"), ("head", 0, "input")]
    assert found.run_twin.bad == []
    assert found.trace.bad == []  # it has no numbers


def test_failure_of_half_precision_is_evidence():
    path, error = failing(refuse_half).trace.error
    assert (path, str(error).splitlines()[0]) == ("block/does", "no <dtype: 'float16'>")
    assert failing(refuse_half, forgiving=True).trace.error is None
    assert failing(refuse_half).run.operations == {}  # what fails traced isn't run


def failing(function, **settings) -> Evidence:
    """Evidence of a model that was built in float32."""
    model = blocked(function, policy="float32", **settings)
    for layer in precision.layers_by_path(model).values():
        layer.dtype_policy = HALF if layer.name != "head" else "float32"
    return Evidence(model, ONES)


def test_failure_of_the_caller_is_raised():
    found = Evidence(blocked(ops.exp), np.ones([2, 5], "float32"))
    with pytest.raises(ValueError, match="incompatible"):
        _ = found.trace


@pytest.mark.parametrize("function", [ops.exp, refuse_half])
def test_model_is_left_as_it_was(function):
    found = failing(function)
    tfhalf.accelerate(found.model)
    before = {path: (layer.__dict__.get("call"), layer.dtype_policy) for path, layer in found.layers.items()}
    assert bool(found.trace.error) == (function is refuse_half)
    assert (found.twin.error, found.run_twin.error) == (None, None)
    assert before == {path: (layer.__dict__.get("call"), layer.dtype_policy) for path, layer in found.layers.items()}


def test_losses_in_half_are_noted_for_the_layer_that_adds_them():
    assert Evidence(blocked(ops.exp, ops.sum), None).trace.half_losses == {"block/does": "float16"}
    assert Evidence(blocked(ops.exp, lambda x: ops.sum(ops.cast(x, "float32"))), None).trace.half_losses == {}


def test_nothing_is_made_of_what_is_not_in_half_or_not_known():
    for model in (blocked(ops.exp, policy="float32"), unknown()):
        found = Evidence(model, None)
        assert found.trace == found.run == evidence.Pass()
    assert Evidence(blocked(ops.exp), None).run == evidence.Pass()
    assert not Evidence(blocked(ops.exp, policy="float32"), None).in_half
    assert Evidence(unknown(), ONES).trace.operations


def unknown() -> keras.Model:
    """A subclassed model, which doesn't know its inputs."""

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(8, name="dense", dtype=HALF)

        def call(self, inputs):
            return self.dense(inputs)

    model = Own()
    model(ONES)
    return model


def test_model_under_a_policy_map_has_a_twin_in_float32():
    found = Evidence(blocked(ops.exp, policy=DTypePolicyMap(HALF)), ONES)
    for traced, dtype in ((found.trace, HALF.removeprefix("mixed_")), (found.twin, "float32")):
        (exp,) = (each for each in traced.operations["block/does"] if each.type == "Exp")
        assert exp.outputs[0].dtype.name == dtype
    assert found.run_twin.arguments.keys() == found.run.arguments.keys()


def test_optimizer_counts_where_the_model_is_compiled():
    model = blocked(ops.exp)
    assert Evidence(model, None).optimizer is None
    for optimizer, stock in (("sgd", True), (tfhalf.LossScaleOptimizer(keras.optimizers.SGD()), False)):
        model.dtype_policy = HALF  # Keras scales where the model's own policy is this
        model.compile(optimizer, "mse")
        found = Evidence(model, None)
        assert found.optimizer is model.optimizer
        assert found.stock_scaling is (model.optimizer if stock else None)


# What one layer, array, operation or tensor shows


def traced(function, *specs) -> tf.Tensor:
    """The tensor in a graph that a function makes of placeholders."""
    made = []

    def call(*values):
        made.append(function(*values))
        return made[-1]

    tf.function(call, autograph=False).get_concrete_function(*[tf.TensorSpec(*spec) for spec in specs])
    return made[-1]


def test_terms_are_counted_and_an_open_axis_is_1():
    x = traced(tf.identity, ([None, 5, 7], tf.float16))
    assert evidence.num_terms(x, [1, 2]) == 35
    assert evidence.num_terms(x, np.array(1)) == 5
    assert evidence.num_terms(x, [0, 2]) == 7


@pytest.mark.parametrize(
    ("equation", "shapes", "terms"),
    [("bi,bi->b", ([2, 9], [2, 9]), 9), ("bij,bij->", ([2, 3, 5], [2, 3, 5]), 30), ("bi,ci->bc", ([2, 9], [4, 9]), 0)],
)
def test_terms_of_an_einsum_count_where_it_is_a_scalar_product(equation, shapes, terms):
    y = traced(lambda a, b: tf.einsum(equation, a, b), *[(shape, tf.float16) for shape in shapes])
    product = y.op
    while product.type != "Einsum":
        product = product.inputs[0].op
    assert evidence.num_pooled_terms(product) == terms


def test_terms_of_a_pooling_are_its_window():
    y = traced(lambda x: tf.nn.avg_pool2d(x, [3, 5], 1, "VALID"), ([1, 8, 8, 2], tf.float16))
    assert evidence.num_pooled_terms(y.op) == 15


def test_indices_are_followed_back_to_half():
    def wrapped(x):
        ids = tf.cast(tf.reshape(x, [6]), tf.int32)
        return tf.minimum(tf.where(ids < 0, ids + 9, ids), 8)

    for dtype, half in ((tf.float16, True), (tf.float32, False), (tf.int32, False)):
        assert evidence.is_half(evidence.half_source(traced(wrapped, ([2, 3], dtype)))) is half


def test_masks_are_told_from_numbers():
    dtypes = tf.bool, tf.int32, tf.float16
    x = [traced(lambda x: 1 - tf.cast(x, tf.float16)[:, None], ([4], dtype)) for dtype in dtypes]
    assert [evidence.is_mask(each) for each in x] == [True, True, False]
    assert not evidence.is_mask(traced(lambda x: tf.constant([1, 0]), ([4], tf.bool)))


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda x, y: tf.math.log(x), "Log"),
        (lambda x, y: y / tf.reshape(x, [4, 1]), "a division"),
        (lambda x, y: x / y, ""),
        (lambda x, y: tf.exp(x), ""),
    ],
)
def test_constant_guards_what_comes_next(function, kind):
    kept = []

    def call(x, y):
        kept.append(x + tf.constant(1e-8, tf.float16))
        return function(kept[0], y)

    traced(call, ([4], tf.float16), ([4], tf.float16))
    assert evidence.guarded_operation(kept[0]) == kind


def test_kernels_are_listed_as_they_are():
    """The private list of TensorFlow's kernels says what running them says."""
    for kind, dtype, runs in (("MaxPool3D", "float16", False), ("MaxPool3D", "bfloat16", True)):
        x = tf.ones([1, 2, 2, 2, 1], dtype)
        with contextlib.nullcontext() if runs else pytest.raises(tf.errors.NotFoundError):
            tf.nn.max_pool3d(x, 2, 2, "VALID")
        graph = tf.function(lambda x: tf.nn.max_pool3d(x, 2, 2, "VALID")).get_concrete_function(x).graph
        (operation,) = [each for each in graph.get_operations() if each.type == kind]
        assert evidence.lacks_kernel(operation) is not runs


def test_what_has_no_kernel_is_not_run():
    with precision.PrecisionPlan(HALF).scope():
        model = keras.Sequential([keras.Input([4, 4, 4, 1]), layers.MaxPooling3D(2, name="pool")])
    found = Evidence(model, np.ones([1, 4, 4, 4, 1], "float32"))
    assert [(path, operation.type) for path, operation in found.without_kernel] == [("pool", "MaxPool3D")]
    assert found.run == evidence.Pass()


def test_numbers_are_rounded_as_they_are_stored():
    given = [1 + 2.0**-11, 65520.0, 2.0**-26, 1.5]
    assert evidence.rounded(given, "float16").tolist() == [1.0, np.inf, 0.0, 1.5]
    assert evidence.rounded(given, "bfloat16").tolist() == [1.0, 65536.0, 2.0**-26, 1.5]
    assert evidence.num_distinct(np.arange(2052).astype("float16")) == 2051  # 2049 is 2048, and 2051 is 2052
    assert evidence.num_distinct(None) == 0


def test_accelerated_layers_are_known():
    model = blocked(ops.exp)
    model.get_layer("head").dtype_policy = HALF
    assert not evidence.accelerated(model.get_layer("head"))
    assert evidence.accelerated(tfhalf.accelerate(model).get_layer("head"))
