"""Plans, paths, formats."""

import contextlib
import json
import subprocess
import sys

import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras.dtype_policies import DTypePolicy, DTypePolicyMap

from tfhalf import precision
from tfhalf.precision import PrecisionPlan

POLICIES = st.sampled_from(["float32", "mixed_float16", "mixed_bfloat16"])


class Block(keras.layers.Layer):
    """A custom layer with two sublayers of one name."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = keras.layers.Dense(4, name="dense")
        self.second = keras.layers.Dense(4, name="dense")

    def call(self, inputs):
        return self.second(self.first(inputs))


def nested_model() -> keras.Model:
    inputs = keras.Input([6, 5], name="tokens")
    x = keras.layers.Bidirectional(keras.layers.LSTM(3, return_sequences=True, name="lstm"), name="both")(inputs)
    x = keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = keras.layers.TimeDistributed(keras.layers.Dense(7, name="inner"), name="each")(x)
    x = Block(name="block")(x)
    x = keras.layers.GlobalAveragePooling1D(name="pool")(x)
    return keras.Model(inputs, keras.layers.Dense(2, name="head", dtype="float32")(x))


def test_walker_finds_every_layer_that_keras_finds():
    model = nested_model()
    ours = precision.layers_by_path(model)
    assert {id(layer) for layer in ours.values()} == {id(layer) for layer in model._flatten_layers(include_self=False)}
    assert {
        "both/forward_lstm/lstm_cell",
        "attention/query",
        "each/inner",
        "block/dense",
        "block/dense_1",
    } <= ours.keys()
    assert list(ours).index("block") < list(ours).index("block/dense")


def test_shared_layer_has_one_path():
    shared = keras.layers.Dense(3, name="shared")
    inputs = keras.Input([3])
    model = keras.Model(inputs, shared(shared(inputs)))
    assert [path for path, layer in precision.layers_by_path(model).items() if layer is shared] == ["shared"]


def test_apply_reaches_layers_that_a_policy_map_misses():
    # KERAS.md row 20: pooling, Activation and Softmax read their policy when they are made.
    plan = PrecisionPlan("mixed_float16", {"block|pool|both": "float32"})
    with plan.scope():
        model = nested_model()
    plan.apply(model)
    layers = precision.layers_by_path(model)
    float32 = {path for path, layer in layers.items() if layer.compute_dtype == "float32"}
    assert float32 == {"head"} | {p for p in layers if p.split("/")[0] in ("block", "pool", "both")}
    assert keras.config.dtype_policy().name == "float32"


def test_apply_changes_what_is_computed():
    plan = PrecisionPlan("mixed_float16", {"dense": "float32"})
    with plan.scope():
        model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1, name="dense", kernel_initializer="ones")])
    value = np.array([[1.0 + 2.0**-13]], "float32")  # not a float16
    assert model.predict(value, verbose=0)[0, 0] == 1.0
    assert plan.apply(model).predict(value, verbose=0)[0, 0] == value[0, 0]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"haed": "float32"}, "matches no layer.*both/forward_lstm.*head"),
        ({"attention": "float32", "attention/query": "float32"}, "matched twice"),
        ({"he": "float32"}, "matches no layer"),  # the whole path must match
    ],
)
def test_apply_refuses_keys_that_do_not_fit(layers, message):
    model = nested_model()
    with pytest.raises(ValueError, match=message):
        PrecisionPlan("mixed_float16", layers).apply(model)
    assert precision.compute_dtypes(model) == {"float32"}


@pytest.mark.parametrize("policy", ["float16", "float61", "int8", "", 5])
def test_plan_refuses_policies_without_master_weights(policy):
    with pytest.raises(ValueError, match="PrecisionPlan: default"):
        PrecisionPlan(policy)
    with pytest.raises(ValueError, match=r"layers\['head'\]"):
        PrecisionPlan("mixed_float16", {"head": policy})


def test_plan_refuses_a_broken_expression():
    with pytest.raises(ValueError, match="no regular expression"):
        PrecisionPlan("mixed_float16", {"(": "float32"})


@given(default=POLICIES, layers=st.dictionaries(st.from_regex(r"[a-z_/]{1,9}(\.\*)?", fullmatch=True), POLICIES))
def test_plan_survives_json(default, layers):
    plan = PrecisionPlan(default, layers)
    assert PrecisionPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_plan_survives_a_file_and_a_fresh_process(tmp_path):
    plan = PrecisionPlan("mixed_bfloat16", {"head.*": "float32"})
    plan.save(tmp_path / "plan.json")
    code = f"import tfhalf; print(tfhalf.PrecisionPlan.load({str(tmp_path / 'plan.json')!r}).to_json())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(plan.to_json())


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"layers": {}}', '{"default": "float32", "more": 1}', '{"default": "float32", "layers": []}']
)
def test_plan_refuses_a_broken_file(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match="PrecisionPlan"):
        PrecisionPlan.load(tmp_path / "plan.json")


def test_plan_applies_again_after_loading(tmp_path, build_convnet):
    plan = PrecisionPlan("mixed_float16", {"conv": "float32"})
    model = plan.apply(build_convnet())
    model.save(tmp_path / "model.keras")
    loaded = plan.apply(keras.saving.load_model(tmp_path / "model.keras"))
    assert loaded.get_layer("conv").compute_dtype == "float32"
    assert loaded.get_layer("dense").compute_dtype == "float16"


def test_computing_in_switches_half_layers_and_comes_back(build_convnet, pictures):
    model, twin = build_convnet("mixed_float16"), build_convnet("float32")
    twin.set_weights(model.get_weights())
    half = np.asarray(model(pictures))
    with precision.computing_in(model, "float32"):
        np.testing.assert_array_equal(model(pictures), twin(pictures))
    with contextlib.suppress(KeyError), precision.computing_in(model, "bfloat16"):
        assert model.get_layer("conv").compute_dtype == "bfloat16"
        assert model.get_layer("head").compute_dtype == "float32"
        raise KeyError
    np.testing.assert_array_equal(model(pictures), half)


def mapped_twins() -> tuple[DTypePolicyMap, list[keras.Model]]:
    """Two models whose layers have the same paths, made under one map."""
    policies = DTypePolicyMap("mixed_float16", {"twin/head": DTypePolicy("float32")})
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policies)
    try:
        body, head = (lambda: keras.layers.Dense(4, name="body")), (lambda: keras.layers.Dense(4, name="head"))
        return policies, [keras.Sequential([keras.Input([4]), body(), head()], name="twin") for _ in range(2)]
    finally:
        keras.config.set_dtype_policy(before)


def computed(model) -> list[str]:
    return [layer.compute_dtype for layer in model.layers]


def test_computing_in_leaves_a_shared_policy_map_alone():
    # Keras' setter of a layer's policy writes into the map instead.
    policies, (model, other) = mapped_twins()
    with precision.computing_in(model, "float32"):
        assert computed(model) == ["float32", "float32"]
        assert computed(other) == ["float16", "float32"]
    assert computed(model) == computed(other) == ["float16", "float32"]
    assert list(policies) == ["twin/head"]
    assert all(layer.dtype_policy is policies for layer in [model, *model.layers])


def test_apply_leaves_a_shared_policy_map_alone():
    policies, (model, other) = mapped_twins()
    plan = PrecisionPlan(layers={"head": "mixed_bfloat16", "body": "float32"})
    for _ in range(2):
        assert computed(plan.apply(model)) == ["float32", "bfloat16"]
    assert computed(other) == ["float16", "float32"]
    assert {key: policy.name for key, policy in policies.items()} == {"twin/head": "float32"}


def test_half_outputs_are_refused_with_the_fix(build_convnet):
    model = build_convnet(output=None)
    with pytest.raises(ValueError, match=r'head is float16.*PrecisionPlan\(layers=\{"head": "float32"\}\)') as error:
        precision.require_float32_outputs(model)
    assert 'dtype="float32"' in str(error.value)
    precision.require_float32_outputs(PrecisionPlan(layers={"head": "float32"}).apply(model))


@pytest.mark.parametrize("dtype", precision.FORMATS)
def test_formats_are_those_of_ml_dtypes(dtype):
    about, known = precision.FORMATS[dtype], ml_dtypes.finfo(dtype)
    assert about.largest == float(known.max)
    assert 2.0**about.normal == float(known.tiny)
    assert 2.0 ** (1 - about.bits) == float(known.eps)
    assert 2.0 ** (about.zero + 1) == float(known.smallest_subnormal)
    assert np.asarray([about.exact + 1], "float64").astype(dtype)[0] == about.exact
