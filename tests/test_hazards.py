"""Every rule: planted defects that it must name, the nearest sound model, and proof that the hazard is real."""

# ruff: noqa: E501 - a table has one case a line

import contextlib
import dataclasses
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from keras.dtype_policies import DTypePolicyMap

import tfhalf
from tests.conftest import ROOT
from tfhalf import hazards, precision
from tfhalf.precision import PrecisionPlan

HALF, BFLOAT = "mixed_float16", "mixed_bfloat16"
F32 = {"dtype": "float32"}


@contextlib.contextmanager
def under(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def stack(policy, shape, *makers, name="model") -> keras.Model:
    """A Sequential of the layers that functions make under a policy; what isn't float32 is cast at the end."""
    with under(policy):
        return keras.Sequential([keras.Input(shape), *[make() for make in makers]], name=name)


def out():
    return layers.Activation("linear", name="out", **F32)


@keras.saving.register_keras_serializable("test_hazards")
class Does(layers.Layer):
    """A layer that does what a function does."""

    def __init__(self, function=None, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, inputs):
        return self.function(inputs)


class Block(layers.Layer):
    """A layer with others inside."""

    def __init__(self, *inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = list(inner)

    def call(self, inputs):
        for layer in self.inner:
            inputs = layer(inputs)
        return inputs


class Hesitant(Block):
    """Goes on where a layer inside it fails."""

    def call(self, inputs):
        try:
            return super().call(inputs)
        except Exception:
            return inputs


class Own(keras.Model):
    """A subclassed model around layers."""

    def __init__(self, *inner, **kwargs):
        super().__init__(**kwargs)
        self.body = list(inner)

    def call(self, inputs):
        for layer in self.body:
            inputs = layer(inputs)
        return inputs


def own(policy, shape, *makers) -> keras.Model:
    with under(policy):
        model = Own(*[make() for make in makers], name="own")
    model(np.ones([1, *shape], "float32"))
    return model


def compiled(model, optimizer="sgd", **settings):
    model.compile(optimizer, "mse", **settings)
    return model


def ours(model, optimizer=None, **settings):
    tfhalf.compile_model(model, optimizer or keras.optimizers.SGD(0.1), loss="mse", **settings)
    return model


def changed(model, weight, value):
    """The model with all numbers of one weight set."""
    found = next(each for each in model.weights if each.path.endswith(weight))
    found.assign(np.full(found.shape, value, "float32"))
    return model


def dense(units=8, **settings):
    return lambda: layers.Dense(units, **settings)


def does(function, **settings):
    return lambda: Does(function, **{"name": "does"} | settings)


def normal(*shape, scale=1.0):
    return np.random.default_rng(3).normal(size=shape).astype("float32") * np.float32(scale)


def stock(**settings):
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    for name, value in settings.items():
        setattr(optimizer, name, value)
    return optimizer


def policy_map(default=HALF, **policies):
    mapped = DTypePolicyMap(default_policy=default)
    for key, policy in policies.items():
        mapped[key.replace("__", "/").replace("ANY", ".*")] = policy
    return mapped


def reloaded(model, tmp):
    model.save(tmp)
    return keras.saving.load_model(tmp)


def embedding(rows=5000):
    return lambda: layers.Embedding(rows, 8, name="ids")


def masked_attention(kind, policy=HALF, masked=True, **settings):
    """Attention of a float query to tokens of which 0 is padding, all of whose vectors are -2."""
    with under(policy):
        query, tokens = keras.Input([6, 32]), keras.Input([6], dtype="int32")
        x = layers.Embedding(
            10, 32, mask_zero=masked, embeddings_initializer=keras.initializers.Constant(-2), name="embed"
        )(tokens)
        return keras.Model([query, tokens], out()(kind(name="attention", **settings)([query, x])))


def self_attention(policy=HALF):
    with under(policy):
        tokens = keras.Input([6], dtype="int32")
        x = layers.Embedding(10, 32, mask_zero=True, name="embed")(tokens)
        return keras.Model(tokens, out()(layers.AdditiveAttention(name="attention", use_scale=False)([x, x])))


def pooled(policy=HALF, steps=2048, masked=True):
    with under(policy):
        tokens = keras.Input([steps], dtype="int32")
        x = layers.Embedding(10, 8, mask_zero=masked, name="embed")(tokens)
        return keras.Model(tokens, out()(layers.GlobalAveragePooling1D(name="pool")(x)))


def dotted(policy=HALF, normalize=True):
    with under(policy):
        left, right = keras.Input([8]), keras.Input([8])
        return keras.Model([left, right], layers.Dot(1, normalize=normalize, name="dot")([left, right]))


def normalization(policy, mean, variance, name="scale"):
    return stack(policy, [2], lambda: layers.Normalization(mean=mean, variance=variance, name=name), out)


class Lookup(layers.Layer):
    def __init__(self, rows, **kwargs):
        super().__init__(**kwargs)
        self.rows = rows

    def build(self, shape):
        self.table = self.add_weight(shape=[self.rows, 4], name="table")

    def call(self, inputs):
        return ops.take(self.table, ops.cast(ops.round(inputs), "int32"), axis=0)


class Pinned(layers.Dense):
    """Computes in float32, whatever its policy says."""

    def call(self, inputs):
        return ops.cast(ops.matmul(ops.cast(inputs, "float32"), self.kernel.value), self.compute_dtype)


def frozen_body():
    model = stack(HALF, [8], dense(name="body"), dense(2, name="head", **F32))
    model.get_layer("body").trainable = False
    return compiled(model, auto_scale_loss=False)


def penalised(policy=HALF, **settings):
    return stack(policy, [8], dense(name="body", activity_regularizer="l2", **settings), dense(2, **F32))


def frozen(model):
    model.trainable = False
    return model


def functional(function):
    """A model of operations outside any layer."""
    with under(HALF):
        x = keras.Input([8])
        return keras.Model(x, out()(function(layers.Dense(8, name="body")(x))))


def adds_loss(wide=False):
    def call(x, layer):
        loss = ops.sum(x * x)
        layer.add_loss(ops.cast(loss, "float32") if wide else loss)
        return x

    class Adds(Does):
        def call(self, inputs):
            return call(inputs, self)

    return stack(HALF, [8], lambda: Block(Adds(name="adds"), name="block"), dense(2, **F32))


def normed(trainable=True):
    model = stack(HALF, [8], dense(name="body"), lambda: layers.BatchNormalization(name="norm"), dense(2, **F32))
    model.get_layer("norm").trainable = trainable
    return model


def residual(f):
    return does(lambda x: x * f(x))


PICTURE, SOUND3D = [16, 16, 3], [4, 4, 4, 8]
POOL3D = layers.MaxPooling3D, layers.AveragePooling3D

# rule, path of the layer, severity, model, sample
PLANTED = [
    ("half_output", "head", "error", lambda: stack(HALF, [8], dense(name="head"))),
    ("half_output", "block/inner", "error", lambda: own(BFLOAT, [8], lambda: Block(layers.Dense(8, name="inner"), name="block")), normal(2, 8)),
    ("half_variables", "body", "error", lambda: stack("float16", [8], dense(name="body"), out)),
    ("half_variables", "block/inner", "error", lambda: own("bfloat16", [8], lambda: Block(layers.Dense(8, name="inner"), name="block"), out)),
    ("no_loss_scaling", "", "error", lambda: compiled(stack(HALF, [8], dense(), dense(2, **F32)), auto_scale_loss=False)),
    ("no_loss_scaling", "", "error", lambda: compiled(stack("float32", [8], dense(name="body", dtype=HALF), dense(2)))),
    ("keras_loss_scaling", "", "warning", lambda: compiled(stack(HALF, [8], dense(), dense(2, **F32)))),
    ("keras_loss_scaling", "", "warning", lambda: compiled(own(HALF, [8], dense(), dense(2, **F32)), stock())),
    ("ignored_setting", "", "error", lambda: compiled(stack(HALF, [8], dense(), out), stock(clipnorm=1e-3))),
    ("ignored_setting", "", "error", lambda: compiled(stack(HALF, [8], dense(), out), stock(weight_decay=0.5))),
    ("unguarded_statistics", "norm", "warning", lambda: compiled(normed())),
    ("unguarded_statistics", "block/norm", "warning", lambda: compiled(stack(HALF, [8], lambda: Block(layers.BatchNormalization(name="norm"), name="block"), dense(2, **F32)), stock())),
    ("unguarded_statistics", "norm", "warning", lambda: compiled(ours(normed()), stock())),
    ("half_loss", "body", "error", lambda: compiled(penalised())),
    ("half_loss", "body", "warning", lambda: penalised(BFLOAT)),
    ("half_loss", "block/adds", "error", lambda: compiled(adds_loss())),
    ("ignored_policy_map", "act", "warning", lambda: stack(policy_map(ANY="float32"), [8], dense(), lambda: layers.Activation("relu", name="act"))),
    ("ignored_policy_map", "head", "warning", lambda: stack(policy_map(head="float32"), [8], dense(name="body"), dense(name="head"), name="seq")),
    ("ignored_policy_map", "block/head", "warning", lambda: stack(policy_map(head="float32"), [8], lambda: Block(layers.Dense(8, name="head"), name="block"), name="seq")),
    ("normalization_range", "scale", "error", lambda: normalization(HALF, [1.7e9, 0.0], [1.0, 1.0])),
    ("normalization_range", "scale", "error", lambda: normalization(HALF, [0.0, 1.0], [1.0, 1e6])),
    ("normalization_range", "scale", "error", lambda: normalization(HALF, [0.0, 0.0], [1.0, 1e-9])),
    ("normalization_range", "scale", "warning", lambda: normalization(BFLOAT, [1000.0, 0.0], [1.0, 1.0])),
    ("non_finite_weights", "body", "error", lambda: changed(stack(HALF, [8], dense(name="body"), out), "body/bias", np.nan)),
    ("non_finite_weights", "norm", "error", lambda: changed(normed(trainable=False), "moving_variance", np.inf)),
    ("storage_overflow", "norm", "warning", lambda: changed(normed(), "moving_variance", 1e6)),
    ("storage_overflow", "body", "error", lambda: changed(normed(), "body/kernel", 1e5)),
    ("storage_overflow", "body", "warning", lambda: changed(stack(BFLOAT, [8], dense(name="body"), out), "body/kernel", 1e5)),
    ("storage_underflow", "body", "warning", lambda: changed(stack(HALF, [8], dense(name="body"), out), "body/kernel", 1e-8)),
    ("storage_underflow", "norm", "warning", lambda: changed(normed(), "moving_variance", 3e-8)),
    ("vanishing_constant", "does", "warning", lambda: stack(HALF, [8], does(lambda x: x / (x + 1e-8)), out)),
    ("vanishing_constant", "does", "warning", lambda: stack(HALF, [8], does(lambda x: ops.log(ops.maximum(x, 1e-9))), out)),
    ("vanishing_constant", "block/does", "warning", lambda: own(HALF, [8], lambda: Block(Does(lambda x: ops.sqrt(ops.sum(x * x, -1, keepdims=True) + 1e-12), name="does"), name="block"), out), normal(2, 8)),
    ("vanishing_constant", "does", "warning", lambda: stack(HALF, [8], does(lambda x: x * 1e-9), out)),
    ("vanishing_constant", "", "warning", lambda: functional(lambda x: x / (ops.abs(x) + 1e-8))),
    ("vanishing_constant", "does", "warning", lambda: stack(HALF, [8], does(lambda x: x / 1e-9), out)),
    ("overflowing_constant", "does", "error", lambda: stack(HALF, [8], does(lambda x: x + (1.0 - ops.cast(x > 0, x.dtype)) * -1e9), out)),
    ("overflowing_constant", "does", "warning", lambda: stack(HALF, [8], does(lambda x: x / 1e9), out)),
    ("overflowing_constant", "does", "warning", lambda: stack(HALF, [8], does(lambda x: ops.sigmoid(x * 1e9)), out)),
    ("overflowing_constant", "does", "warning", lambda: own(HALF, [8], does(lambda x: ops.softmax(ops.where(x > 0, x, -1e9))), out), normal(2, 8)),
    ("float_ids", "ids", "error", lambda: stack(HALF, [6], does(lambda x: x), embedding(), out)),
    ("float_ids", "block/lookup", "error", lambda: own(BFLOAT, [6], lambda: Block(Does(lambda x: x), Lookup(300, name="lookup"), name="block"), out), normal(2, 6)),
    ("rounded_positions", "does", "warning", lambda: stack(HALF, [4], does(lambda x: x[:, :1] + ops.cast(ops.arange(3000), x.dtype)), out)),
    ("rounded_positions", "does", "warning", lambda: own(BFLOAT, [300], does(lambda x: x + ops.arange(ops.shape(x)[1], dtype=x.dtype)), out), normal(2, 300)),
    ("sum_of_squares", "unit", "warning", lambda: stack(HALF, [8], lambda: layers.UnitNormalization(name="unit"), out)),
    ("sum_of_squares", "dot", "warning", dotted),
    ("sum_of_squares", "does", "warning", lambda: stack(HALF, [8], does(lambda x: ops.sum(x * x, axis=-1)), out)),
    ("large_reduction", "pool", "warning", pooled),
    ("large_reduction", "pool", "warning", lambda: stack(HALF, [64, 64, 4], lambda: layers.AveragePooling2D(64, name="pool"), out)),
    ("large_reduction", "pool", "warning", lambda: stack(BFLOAT, [32, 32, 4], lambda: layers.AveragePooling2D(32, name="pool"), out)),
    ("large_reduction", "does", "warning", lambda: own(HALF, [4096, 2], does(lambda x: ops.sum(x, axis=1)), out), normal(1, 4096, 2)),
    ("large_reduction", "does", "warning", lambda: stack(BFLOAT, [1024], does(lambda x: ops.einsum("bi,bi->b", x, x)), out)),
    ("attention_mask", "attention", "warning", lambda: masked_attention(layers.Attention)),
    ("attention_mask", "attention", "warning", lambda: masked_attention(layers.AdditiveAttention, use_scale=False)),
    ("missing_kernel", "pool", "error", lambda: stack(HALF, SOUND3D, lambda: layers.MaxPooling3D(2, name="pool"), out)),
    ("missing_kernel", "pool", "warning", lambda: compiled(stack(HALF, SOUND3D, lambda: layers.MaxPooling3D(2, name="pool"), out), jit_compile=True), normal(2, *SOUND3D)),
    ("missing_kernel", "block/pool", "error", lambda: own("float32", SOUND3D, lambda: Block(layers.AdaptiveAveragePooling3D(2, name="pool"), name="block")), normal(2, *SOUND3D)),
    ("fails_in_half", "spectrum", "error", lambda: stack(BFLOAT, [1000, 1], lambda: layers.STFTSpectrogram(name="spectrum"), out)),
    ("fails_in_half", "block/does", "error", lambda: own("float32", [8], lambda: Block(Does(lambda x: tf.matmul(x, tf.ones([8, 8])), name="does"), name="block")), normal(2, 8)),
    ("forward_overflow", "does", "error", lambda: stack(HALF, [8], does(lambda x: x * 300.0), out), np.full([2, 8], 300.0, "float32")),
    ("forward_overflow", "body", "error", lambda: stack(HALF, [8], dense(name="body"), out), np.full([2, 8], 1e6, "float32")),
    ("forward_overflow", "block", "error", lambda: stack(HALF, [8], lambda: Block(layers.Dense(8, name="inner"), name="block"), out), np.full([2, 8], 1e6, "float32")),
    ("forward_overflow", "does", "warning", lambda: stack(HALF, [8], does(lambda x: -x * 300.0), lambda: layers.Activation("sigmoid"), out), np.full([2, 8], 300.0, "float32")),
    ("bfloat16_bias", "conv", "warning", lambda: stack(BFLOAT, [32, 32, 3], lambda: layers.Conv2D(8, 3, name="conv"), out)),
    ("bfloat16_bias", "block/inner", "warning", lambda: own(BFLOAT, [8], lambda: Block(layers.Dense(8, name="inner"), name="block"), out), normal(1024, 8)),
    ("ignored_policy", "pinned", "info", lambda: stack(HALF, [8], lambda: Pinned(8, name="pinned"), out)),
    ("ignored_policy", "block/pinned", "info", lambda: own(BFLOAT, [8], lambda: Block(Pinned(8, name="pinned"), name="block"), out), normal(2, 8)),
    ("slow_on_cpu", "conv", "info", lambda: stack(HALF, PICTURE, lambda: layers.Conv2D(8, 3, name="conv"), out)),
    ("slow_on_cpu", "block/act", "info", lambda: own(HALF, [8], lambda: Block(layers.LeakyReLU(name="act"), name="block"), out), normal(2, 8)),
    ("tensor_cores", "body", "info", lambda: stack(HALF, [8], dense(100, name="body"), out)),
    ("tensor_cores", "attention/query", "info", lambda: attention_of(7)),
]  # fmt: skip


def attention_of(key_dim, policy=HALF):
    with under(policy):
        x = keras.Input([6, 8])
        return keras.Model(x, out()(layers.MultiHeadAttention(2, key_dim, name="attention")(x, x)))


# rule, the nearest sound model, sample
SOUND = [
    ("half_output", lambda: stack(HALF, [8], dense(name="head"), out)),
    ("half_variables", lambda: stack(HALF, [8], dense(name="body"), out)),
    ("half_variables", lambda: frozen(stack("float16", [8], dense(name="body"), out))),
    ("no_loss_scaling", lambda: compiled(stack(BFLOAT, [8], dense(), dense(2, **F32)))),
    ("no_loss_scaling", frozen_body),
    ("no_loss_scaling", lambda: compiled(stack(HALF, [8], dense(), out), keras.optimizers.SGD(loss_scale_factor=1024), auto_scale_loss=False)),
    ("no_loss_scaling", lambda: stack(HALF, [8], dense(), out)),
    ("keras_loss_scaling", lambda: ours(stack(HALF, [8], dense(), out))),
    ("ignored_setting", lambda: compiled(stack(HALF, [8], dense(), out), keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(clipnorm=1e-3)))),
    ("unguarded_statistics", lambda: ours(normed())),
    ("unguarded_statistics", lambda: compiled(normed(trainable=False))),
    ("half_loss", lambda: ours(penalised())),
    ("half_loss", lambda: compiled(penalised(kernel_regularizer="l2", dtype="float32"))),
    ("half_loss", lambda: compiled(adds_loss(wide=True))),
    ("ignored_policy_map", lambda: stack(policy_map(seq__head="float32"), [8], dense(name="body"), dense(name="head"), name="seq")),
    ("ignored_policy_map", lambda: stack(policy_map(other__head="float32"), [8], dense(name="body"), name="seq")),
    ("normalization_range", lambda: normalization("float32", [1.7e9, 0.0], [1e6, 1.0])),
    ("normalization_range", lambda: normalization(HALF, [123.0, 0.0], [58.0**2, 1.0])),
    ("normalization_range", lambda: normalization(BFLOAT, [10.0, 1e6], [1.0, 1e12])),
    ("non_finite_weights", lambda: changed(normed(), "moving_variance", 1e30)),
    ("storage_overflow", lambda: changed(normed(), "moving_variance", 65504.0)),
    ("storage_underflow", lambda: changed(normed(), "moving_variance", 7e-5)),
    ("storage_underflow", lambda: changed(normed(), "body/bias", 0.0)),
    ("vanishing_constant", lambda: stack(HALF, [8], does(lambda x: x / (x + 1e-3)), out)),
    ("vanishing_constant", lambda: stack(BFLOAT, [8], does(lambda x: x / (x + 1e-8)), out)),
    ("vanishing_constant", lambda: stack(HALF, [8], does(lambda x: ops.log(x + 0.0)), out)),
    ("vanishing_constant", lambda: stack(HALF, [8], does(lambda x: x + 1e-9), out)),
    ("vanishing_constant", lambda: stack(HALF, [8], does(lambda x: ops.log(x + 1e-3) + (x + 1e-9)), out)),
    ("vanishing_constant", lambda: stack(HALF, [8], does(lambda x: x / (x + 1e-8), **F32), out)),
    ("overflowing_constant", lambda: stack(HALF, [8], does(lambda x: x + (1.0 - ops.cast(x > 0, x.dtype)) * -3e4), out)),
    ("overflowing_constant", lambda: stack(HALF, [8], does(lambda x: ops.where(x > 0, x, -np.inf)), out)),
    ("overflowing_constant", lambda: stack(HALF, [8], does(lambda x: ops.clip(x, -1e9, 1e9)), out)),
    ("overflowing_constant", lambda: stack(HALF, [8], does(lambda x: x[:, None] + np.triu(np.full([8, 8], -1e9, "float32"), 1)[None]), out)),
    ("overflowing_constant", lambda: stack(BFLOAT, [8], does(lambda x: x * -1e9), out)),
    ("float_ids", lambda: stack(HALF, [6], embedding(), out)),
    ("float_ids", lambda: stack(HALF, [6], does(lambda x: x), embedding(2049), out)),
    ("float_ids", lambda: stack(HALF, [6], does(lambda x: x, **F32), embedding(), out)),
    ("rounded_positions", lambda: stack(HALF, [4], does(lambda x: x[:, :1] + ops.cast(ops.arange(2049), x.dtype)), out)),
    ("rounded_positions", lambda: stack(HALF, [4], does(lambda x: x[:, :1] + tf.cast(np.linspace(0, 1, 9000).astype("float32"), x.dtype)), out)),
    ("rounded_positions", lambda: stack(BFLOAT, [4], does(lambda x: x[:, :1] + ops.cast(ops.sin(ops.cast(ops.arange(3000), "float32")), x.dtype)), out)),
    ("sum_of_squares", lambda: stack(BFLOAT, [8], lambda: layers.UnitNormalization(name="unit"), out)),
    ("sum_of_squares", lambda: dotted(normalize=False)),
    ("sum_of_squares", lambda: stack(HALF, [8], does(lambda x: ops.sum(ops.square(ops.cast(x, "float32")), axis=-1)), out)),
    ("large_reduction", lambda: pooled(masked=False)),
    ("large_reduction", lambda: pooled(steps=512)),
    ("large_reduction", lambda: tfhalf.accelerate(pooled())),
    ("large_reduction", lambda: stack(HALF, [64, 64, 4], lambda: layers.GlobalAveragePooling2D(name="pool"), out)),
    ("large_reduction", lambda: stack(HALF, [64, 64, 4], lambda: layers.AveragePooling2D(8, name="pool"), out)),
    ("large_reduction", lambda: stack(HALF, [4096], does(lambda x: ops.einsum("bi,ci->bc", x, x)), out)),
    ("large_reduction", lambda: stack(HALF, [4096], does(lambda x: tf.einsum("bi,ci->bc", x, x)), out)),
    ("attention_mask", lambda: masked_attention(layers.Attention, masked=False)),
    ("attention_mask", lambda: masked_attention(layers.Attention, policy=BFLOAT)),
    ("missing_kernel", lambda: tfhalf.accelerate(stack(HALF, SOUND3D, lambda: layers.MaxPooling3D(2, name="pool"), out))),
    ("missing_kernel", lambda: stack(BFLOAT, SOUND3D, lambda: layers.MaxPooling3D(2, name="pool"), out)),
    ("fails_in_half", lambda: stack(HALF, [1000, 1], lambda: layers.STFTSpectrogram(name="spectrum"), out)),
    ("fails_in_half", lambda: stack(HALF, [8], lambda: Hesitant(Does(lambda x: tf.matmul(x, tf.ones([8, 8]))), name="block"), out), normal(2, 8)),
    ("forward_overflow", lambda: stack(HALF, [8], does(lambda x: x * 200.0), out), np.full([2, 8], 300.0, "float32")),
    ("forward_overflow", lambda: stack(BFLOAT, [8], does(lambda x: x * 300.0), out), np.full([2, 8], 300.0, "float32")),
    ("forward_overflow", lambda: stack(HALF, [8], does(lambda x: ops.log(x - x)), out), normal(2, 8)),
    ("bfloat16_bias", lambda: tfhalf.accelerate(stack(BFLOAT, [32, 32, 3], lambda: layers.Conv2D(8, 3, name="conv"), out))),
    ("bfloat16_bias", lambda: stack(BFLOAT, [32, 32, 3], lambda: layers.Conv2D(8, 3, use_bias=False), out)),
    ("bfloat16_bias", lambda: stack(BFLOAT, [8], dense(), out), normal(256, 8)),
    ("ignored_policy", lambda: stack(HALF, [8], dense(), lambda: layers.BatchNormalization(), out)),
    ("ignored_policy", lambda: tfhalf.accelerate(stack(HALF, [8], dense(), out))),
    ("slow_on_cpu", lambda: tfhalf.accelerate(stack(HALF, PICTURE, lambda: layers.Conv2D(8, 3, name="conv"), out))),
    ("slow_on_cpu", lambda: stack(BFLOAT, PICTURE, lambda: layers.Conv2D(8, 3, name="conv"), out)),
    ("tensor_cores", lambda: stack(HALF, [8], dense(104, name="body"), dense(3, **F32))),
    ("tensor_cores", lambda: attention_of(16)),
]  # fmt: skip


def names(rows) -> list[str]:
    return [f"{row[0]}-{index}" for index, row in enumerate(rows)]


@pytest.mark.parametrize("row", PLANTED, ids=names(PLANTED))
def test_planted_defect_is_named(row):
    rule, layer, severity, build, *sample = row
    model = tame(build())
    found = tfhalf.hazards.audit(model, *sample)
    assert [each.severity for each in found if (each.rule, each.layer) == (rule, layer)] == [severity], found


def tame(model):
    """What is planted in a float32 model computes in float16."""
    if model.compute_dtype == "float32" and isinstance(model, Own):
        for layer in precision.layers_by_path(model).values():
            layer.dtype_policy = HALF
    return model


@pytest.mark.parametrize("row", SOUND, ids=names(SOUND))
def test_sound_neighbour_is_left_alone(row):
    rule, build, *sample = row
    assert [each for each in hazards.audit(build(), *sample) if each.rule == rule] == []


def test_every_rule_has_two_planted_defects_and_a_sound_neighbour():
    planted, sound = [row[0] for row in PLANTED], {row[0] for row in SOUND}
    assert hazards.RULES.keys() == sound == set(planted)
    assert min(map(planted.count, hazards.RULES)) >= 2


# The hazards are real


def forward(model, x) -> np.ndarray:
    return np.asarray(model(x), "float32")


def trained(model, x, y, epochs=1) -> keras.Model:
    model.fit(x, y, batch_size=len(x), epochs=epochs, verbose=0)
    return model


def is_wrong(value, truth) -> bool:
    """Whether it isn't finite, or more than 2% of the largest number away: 20 times what half rounds."""
    value, truth = np.asarray(value, "float32"), np.asarray(truth, "float32")
    return not np.isfinite(value).all() or np.abs(value - truth).max() > 0.02 * np.abs(truth).max()


def single(policy, **settings):
    """One weight of 1."""
    return stack(policy, [1], lambda: layers.Dense(1, use_bias=False, kernel_initializer="ones", **settings), out)


def weight_after(model, loss, optimizer, wrap=False) -> np.ndarray:
    if wrap:
        tfhalf.compile_model(model, optimizer, loss=loss)
    else:
        model.compile(optimizer, loss, auto_scale_loss=False)
    trained(model, np.ones([4, 1]), np.zeros([4, 1]))
    return np.asarray(model.weights[0].numpy(), "float32")


def tiny_loss(y_true, y_pred):
    return ops.mean(y_pred) * 1e-9


def bias_gradient(model, x) -> np.ndarray:
    bias = next(each for each in model.trainable_weights if each.name == "bias")
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(x, training=True))
    return tape.gradient(loss, bias.value)


def both(build, x):
    """What a model gives in half, and what the same one gives in float32."""
    model = build(HALF)
    twin = build("float32")
    twin.set_weights(model.get_weights())
    return forward(model, x), forward(twin, x)


def done(function, shape=(8,)):
    return lambda policy: stack(policy, list(shape), does(function), out)


ZEROS, BIG, ONES = (np.full([2, 8], value, "float32") for value in (0.0, 300.0, 1.0))
MASKED = np.array([[0] * 6, [1, 2, 3, 4, 5, 6]])
QUERY_AND_MASKED = [np.full([2, 6, 32], 2.0, "float32"), MASKED]
STEPS = np.full([1, 4096, 2], 1.3, "float32")
FEATURES = np.array([[1.701e9, 0.5], [1.699e9, -0.5]], "float32")
UNIT = [lambda: layers.UnitNormalization(name="unit"), out]
POOL = [lambda: layers.AveragePooling2D(64, name="pool"), out]

# what is computed in half, and what it should be
WRONG = {
    "half_variables": lambda: (weight_after(single("float16"), "mae", keras.optimizers.SGD(1e-4)) - 1, -1e-4),
    "normalization_range": lambda: (
        forward(normalization(HALF, [1.7e9, 0.0], [1e12, 1.0]), FEATURES),
        forward(normalization("float32", [1.7e9, 0.0], [1e12, 1.0]), FEATURES),
    ),
    "normalization_range, set later": lambda: (
        forward(PrecisionPlan(layers={"scale": "float32"}).apply(normalization(HALF, [1.7e9, 0.0], [1e12, 1.0])), FEATURES),
        forward(normalization("float32", [1.7e9, 0.0], [1e12, 1.0]), FEATURES),
    ),
    "normalization_range, variance": lambda: both(lambda policy: normalization(policy, [0.0, 0.0], [1e6, 1e6]), np.full([2, 2], 500.0)),
    "storage_overflow": lambda: both(lambda policy: changed(stack(policy, [8], dense(name="body"), out), "body/kernel", 1e5), ONES * 1e-3),
    "storage_underflow": lambda: (np.full([3], 1e-8, "float32").astype("float16"), np.full([3], 1e-8)),
    "vanishing_constant, division": lambda: both(done(lambda x: x / (x + 1e-8)), ZEROS),
    "vanishing_constant, logarithm": lambda: both(done(lambda x: ops.log(ops.maximum(x, 1e-9))), ZEROS),
    "vanishing_constant, factor": lambda: both(done(lambda x: x * 1e-9), ONES),
    "overflowing_constant": lambda: both(done(lambda x: ops.softmax(x + (1.0 - ops.cast(x > 0, x.dtype)) * -1e9)), ONES),
    "overflowing_constant, where": lambda: both(done(lambda x: ops.softmax(ops.where(x > 0, x, -1e9))), ZEROS),
    "float_ids": lambda: both(lambda policy: stack(policy, [2], does(lambda x: x), embedding(), out), np.array([[2049, 4001]])),
    "rounded_positions": lambda: both(done(lambda x: ops.sin(x[:, :1] + ops.cast(ops.arange(3000), x.dtype))), ZEROS),
    "sum_of_squares": lambda: both(lambda policy: stack(policy, [8], *UNIT), BIG),
    "sum_of_squares, of 0": lambda: both(lambda policy: stack(policy, [8], *UNIT), ZEROS),
    "sum_of_squares, dot": lambda: both(dotted, [BIG, BIG]),
    "large_reduction, pool": lambda: both(lambda policy: stack(policy, [64, 64, 2], *POOL), STEPS.reshape([1, 64, 64, 2])),
    "large_reduction, sum": lambda: both(done(lambda x: ops.sum(x, axis=1), (4096, 2)), STEPS),
    "large_reduction, einsum": lambda: both(done(lambda x: ops.einsum("bi,bi->b", x, x)[:, None], (4096,)), np.ones([1, 4096], "float32")),
    "large_reduction, mask": lambda: both(lambda policy: changed(pooled(policy), "embeddings", 10.0), np.ones([1, 2048], "int32")),
    "attention_mask": lambda: both(lambda policy: masked_attention(layers.Attention, policy), QUERY_AND_MASKED),
    "attention_mask, additive": lambda: both(lambda policy: masked_attention(layers.AdditiveAttention, policy, use_scale=False), [QUERY_AND_MASKED[0] * -1, MASKED]),
    "forward_overflow": lambda: both(done(lambda x: x * 300.0), BIG),
    "bfloat16_bias": lambda: (bias_gradient(stack(BFLOAT, [8], dense(), out), np.ones([1024, 8])), np.full([8], 1024)),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_hazard_is_real(case):
    value, truth = WRONG[case]()
    assert is_wrong(value, truth), (value, truth)


def plan(model, path):
    return PrecisionPlan(layers={path: "float32"}).apply(model)


# what the finding's fix computes, and what it should be
MENDED = {
    "half_variables": lambda: (weight_after(single(HALF), "mae", keras.optimizers.SGD(1e-4), wrap=True), 1 - 1e-4),
    "no_loss_scaling": lambda: (weight_after(single(HALF), tiny_loss, keras.optimizers.SGD(1e8), wrap=True), 0.9),
    "storage_overflow": lambda: (forward(plan(changed(stack(HALF, [8], dense(name="body"), out), "body/kernel", 1e5), "body"), ONES * 1e-3), np.full([2, 8], 800.0)),
    "sum_of_squares": lambda: (forward(plan(stack(HALF, [8], *UNIT), "unit"), BIG), np.full([2, 8], 8**-0.5)),
    "sum_of_squares, dot": lambda: (forward(plan(dotted(), "dot"), [BIG, BIG]), np.ones([2, 1])),
    "overflowing_constant": lambda: (forward(done(lambda x: ops.softmax(ops.where(x > 0, x, -3e4)))(HALF), ZEROS), np.full([2, 8], 1 / 8)),
    "float_ids": lambda: (forward(changed_row(plan(stack(HALF, [2], does(lambda x: x), embedding(), out), "does")), np.array([[2049, 1]])), np.array([[[7.0] * 8, [0.0] * 8]])),
    "large_reduction, pool": lambda: (forward(tfhalf.accelerate(stack(HALF, [64, 64, 2], *POOL)), STEPS.reshape([1, 64, 64, 2])), np.full([1, 1, 1, 2], 1.3)),
    "large_reduction, mask": lambda: (forward(tfhalf.accelerate(changed(pooled(), "embeddings", 10.0)), np.ones([1, 2048], "int32")), np.full([1, 8], 10.0)),
    "attention_mask": lambda: (forward(plan(masked_attention(layers.Attention), "attention"), QUERY_AND_MASKED), np.full([2, 6, 32], -2.0)),
    "forward_overflow": lambda: (forward(plan(done(lambda x: x * 300.0)(HALF), "does"), BIG), np.full([2, 8], 9e4)),
    "bfloat16_bias": lambda: (bias_gradient(tfhalf.accelerate(stack(BFLOAT, [8], dense(), out)), np.ones([1024, 8])), np.full([8], 1024)),
}  # fmt: skip


def changed_row(model):
    table = np.zeros([5000, 8], "float32")
    table[2049] = 7
    model.get_layer("ids").embeddings.assign(table)
    return model


@pytest.mark.parametrize("case", MENDED)
def test_fix_mends_it(case):
    value, truth = MENDED[case]()
    assert not is_wrong(value, truth), (value, truth)


def test_small_steps_and_gradients_are_lost():
    assert weight_after(single("float16"), "mae", keras.optimizers.SGD(1e-4))[0, 0] == 1
    assert weight_after(single(HALF), tiny_loss, keras.optimizers.SGD(1e8))[0, 0] == 1


def test_half_output_has_no_gradient():
    def gradient(dtype):
        with tf.GradientTape() as tape:
            probability = tf.sigmoid(tf.constant([[12.0]], dtype))
            tape.watch(probability)
            loss = keras.losses.BinaryCrossentropy()(tf.zeros([1, 1]), probability)
        return float(tf.norm(tf.cast(tape.gradient(loss, probability), "float32")))

    assert gradient("float16") == 0
    assert gradient("float32") > 1


def test_keras_scale_falls_to_zero():
    def fit(model):
        bad = np.full([2 * 170, 8], np.nan, "float32")
        model.fit(bad, np.zeros([len(bad), 2]), batch_size=2, verbose=0)
        return trained(model, np.ones([2, 8]), np.zeros([2, 2])).weights[0].numpy()

    assert np.isnan(fit(compiled(stack(HALF, [8], dense(), dense(2, **F32)), stock()))).all()
    model = ours(stack(HALF, [8], dense(), dense(2, **F32)), max_consecutive_skips=1000)
    assert np.isfinite(fit(model)).all()


def test_settings_have_no_effect_on_keras_wrapper():
    values = {"clipnorm": 1e-3, "global_clipnorm": 1e-3, "clipvalue": 1e-3, "weight_decay": 0.5, "use_ema": True}
    values |= {"loss_scale_factor": 64.0}
    plain, asked = (weight_after(single(HALF), "mae", stock(**some)) for some in ({}, values))
    assert plain == asked == pytest.approx(0.9, abs=1e-3)
    assert tuple(values) == hazards._WITHOUT_EFFECT


def test_overflow_spoils_statistics_unless_guarded():
    bad = np.full([4, 8], 1e6, "float32")
    for compile_it, finite in ((compiled, False), (ours, True)):
        model = trained(compile_it(normed()), bad, np.zeros([4, 2]))
        assert np.isfinite(model.get_layer("norm").moving_variance.numpy()).all() == finite
        assert np.isfinite(model.get_layer("body").kernel.numpy()).all()


@pytest.mark.parametrize("build", [penalised, adds_loss, lambda: penalised(BFLOAT)])
def test_half_loss_ends_fit_unless_ours(build):
    with pytest.raises(TypeError):
        trained(compiled(build()), ONES, ONES[:, :2])
    trained(ours(build()), ONES, ONES[:, :2])


def test_policy_map_is_not_heard():
    model = stack(policy_map(ANY="float32"), [8], lambda: layers.Activation("relu", name="act"), dense())
    assert [layer.compute_dtype for layer in model.layers] == ["float16", "float32"]


@pytest.mark.parametrize("kind", POOL3D)
def test_operation_without_kernel_does_not_run(kind):
    model = stack(HALF, SOUND3D, lambda: kind(2, name="pool"), out)
    with pytest.raises(tf.errors.NotFoundError):
        forward(model, np.ones([1, *SOUND3D]))
    in_xla = compiled(stack(HALF, SOUND3D, lambda: kind(2, name="pool"), out), jit_compile=True)
    assert in_xla.predict(np.ones([1, *SOUND3D]), verbose=0).max() == 1
    assert forward(tfhalf.accelerate(model), np.ones([1, *SOUND3D])).max() == 1
    assert [each.rule for each in hazards.audit(model, np.ones([1, *SOUND3D], "float32"))] == []


def test_replicas_make_keras_scaling_an_error():
    code = """
import keras, tensorflow as tf, tfhalf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope(), tfhalf.PrecisionPlan().scope():
    model = keras.Sequential([keras.Input([8]), keras.layers.Dense(8), keras.layers.Dense(2, dtype="float32")])
    model.compile("sgd", "mse")
    print([finding.severity for finding in tfhalf.hazards.audit(model) if finding.rule == "keras_loss_scaling"])
    tfhalf.compile_model(model, keras.optimizers.SGD(), loss="mse")
    print([finding.rule for finding in tfhalf.hazards.audit(model)])
"""
    code = code.replace("import keras, ", "import keras, tfhalf.hazards, ")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.stdout.splitlines() == ["['error']", "[]"], result.stderr


def test_attention_of_a_masked_sequence_to_itself_spoils_gradients():
    for policy, finite in ((HALF, False), ("float32", True)):
        model = changed(self_attention(policy), "embeddings", -2.0)
        with tf.GradientTape() as tape:
            y = model(MASKED)
            loss = tf.reduce_sum(y)
        assert np.isfinite(np.asarray(y)).all()
        gradient = tf.convert_to_tensor(tape.gradient(loss, model.get_layer("embed").embeddings.value))
        assert bool(tf.reduce_all(tf.math.is_finite(gradient))) == finite


# Models that are sound


VOCABULARY = {"vocabulary_size": 100, "num_layers": 1, "hidden_dim": 16, "intermediate_dim": 32}
TEXT = VOCABULARY | {"num_heads": 2, "max_sequence_length": 16}
GROUPED = VOCABULARY | {"num_query_heads": 4, "num_key_value_heads": 2}
IDS = np.random.default_rng(0).integers(1, 90, [2, 16]).astype("int32")
TOKENS = {"token_ids": IDS, "padding_mask": np.repeat([[1] * 16, [1] * 9 + [0] * 7], 1, 0).astype("int32")}
SEGMENTS = TOKENS | {"segment_ids": IDS * 0}
PAIRS = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in TOKENS.items()}
SPEECH = {"encoder_features": normal(2, 32, 8)} | {name: PAIRS[name] for name in PAIRS if name.startswith("decoder")}
IMAGES, IMAGE = normal(2, 32, 32, 3), {"image_shape": (32, 32, 3)}
VIT = {"patch_size": (8, 8), "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
RESNET = {"input_conv_filters": [64], "input_conv_kernel_sizes": [7], "stackwise_num_filters": [64, 64]}
RESNET |= {"stackwise_num_blocks": [1, 1], "stackwise_num_strides": [1, 2], "block_type": "basic_block"}
HUB = {
    "Bert": (TEXT, SEGMENTS),
    "DistilBert": (TEXT, TOKENS),
    "Albert": (TEXT | {"embedding_dim": 8}, SEGMENTS),
    "DebertaV3": (TEXT | {"bucket_size": 8}, TOKENS),
    "GPT2": (TEXT, TOKENS),
    "Llama": (GROUPED, TOKENS),
    "Gemma": (GROUPED | {"head_dim": 8}, TOKENS),
    "Bart": (TEXT, PAIRS),
    "Whisper": (
        {name: value for name, value in TEXT.items() if name != "max_sequence_length"}
        | {"num_mels": 8, "max_encoder_sequence_length": 32, "max_decoder_sequence_length": 16},
        SPEECH,
    ),
    "ResNet": (RESNET | IMAGE, IMAGES),
    "DenseNet": (IMAGE | {"stackwise_num_repeats": [1, 1], "compression_ratio": 0.5, "growth_rate": 8}, IMAGES),
    "VGG": (IMAGE | {"stackwise_num_repeats": [1, 1], "stackwise_num_filters": [8, 8]}, IMAGES),
    "ViT": (IMAGE | VIT, IMAGES),
}


def hub_model(kind, settings):
    """A KerasHub backbone with float32 outputs, compiled by tfhalf."""
    import keras_hub

    with under(HALF):
        backbone = getattr(keras_hub.models, f"{kind}Backbone")(**settings)
    wide = [layers.Activation("linear", **F32)(each) for each in tf.nest.flatten(backbone.output)]
    return keras.Model(backbone.input, wide)


@pytest.mark.parametrize("kind", HUB)
def test_architectures_have_no_errors(kind):
    settings, sample = HUB[kind]
    model = ours(hub_model(kind, settings))
    found = hazards.audit(model, sample)
    assert [str(each) for each in found if each.severity != "info"] == []
    outputs = tf.nest.flatten(model(sample))
    assert all(bool(tf.reduce_all(tf.math.is_finite(each))) for each in outputs)


def test_t5_of_keras_hub_is_broken_in_float16():
    """Its mask of -1e9 is -infinity there, and 0 times that is NaN: the errors are true."""
    settings = {"vocabulary_size": 100, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 32}
    model = hub_model("T5", settings)
    rules = {each.rule: each for each in hazards.audit(model, PAIRS) if each.severity == "error"}
    assert rules.keys() == {"overflowing_constant", "forward_overflow"}
    assert "-1e+09 is -inf in float16" in rules["overflowing_constant"].message
    assert np.isnan(np.asarray(model(PAIRS)[0])).any()
    with precision.computing_in(model, "float32"):
        assert np.isfinite(np.asarray(model(PAIRS)[0])).all()
    with precision.computing_in(model, "bfloat16"):
        assert np.isfinite(np.asarray(model(PAIRS)[0])).all()
        assert [each for each in hazards.audit(model, PAIRS) if each.severity == "error"] == []


# What audit promises


def test_fix_names_acceleration_where_it_helps():
    kinds = layers.AveragePooling3D, layers.AdaptiveAveragePooling3D
    for kind, told in zip(kinds, (True, False), strict=True):
        model = stack(HALF, SOUND3D, lambda kind=kind: kind(2, name="pool"), out)
        assert [each.fix.startswith("tfhalf.accelerate(model), or keep it") for each in hazards.audit(model)] == [told]
        mended = {each.rule for each in hazards.audit(tfhalf.accelerate(model))} == set()
        assert mended is told
        assert hazards.audit(plan(model, "pool")) == []


def test_audit_leaves_the_model_as_it_was(build_convnet, pictures):
    model = tfhalf.accelerate(build_convnet())
    ours(model)
    before, weights = np.asarray(model(pictures)), model.get_weights()
    kept = [(layer.dtype_policy.name, layer.__dict__.get("call")) for layer in precision.layers_by_path(model).values()]
    train_step = model.train_step
    assert [each.rule for each in hazards.audit(model, pictures)] == []
    hazards.audit(stack(HALF, [8], does(lambda x: x / (x + 1e-8)), out), ONES)
    after = [
        (layer.dtype_policy.name, layer.__dict__.get("call")) for layer in precision.layers_by_path(model).values()
    ]
    assert after == kept
    assert model.train_step is train_step
    np.testing.assert_array_equal(np.asarray(model(pictures)), before)
    for old, new in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_float32_has_no_findings(build_convnet, pictures):
    assert hazards.audit(build_convnet("float32"), pictures) == []


def test_findings_come_by_severity_and_once():
    model = stack(
        HALF, [32, 32, 3], lambda: layers.Conv2D(7, 3, name="conv"), lambda: layers.UnitNormalization(name="unit")
    )
    found = hazards.audit(model)
    assert [each.rule for each in found] == ["half_output", "sum_of_squares", "slow_on_cpu", "tensor_cores"]
    shared = dense(7, name="shared")()
    with under(HALF):
        x = keras.Input([7])
        shared = layers.Dense(7, name="shared")
        model = keras.Model(x, out()(shared(shared(x))))
    assert [each.layer for each in hazards.audit(model)] == ["shared"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        found[0].rule = "other"


def test_unbuilt_models_and_wrong_samples_are_refused():
    with pytest.raises(ValueError, match="isn't built"):
        hazards.audit(keras.Sequential([layers.Dense(2)]))
    with pytest.raises(ValueError, match="incompatible"):
        hazards.audit(stack(HALF, [8], dense(), out), np.ones([2, 5], "float32"))


def test_documentation_lists_the_rules():
    told = [line.split("|")[1].strip() for line in hazards.__doc__.splitlines() if line.startswith("| ")][1:]
    assert told == list(hazards.RULES)
