"""Planted layers that need float32 are found, and no others; every subset as an oracle; sets by themselves."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

import tfhalf
from tests.test_twins import Factors
from tfhalf import precision, search, sensitivity

KINDS = ("overflow", "cancellation", "squares", "epsilon", "softmax", "gradients")


class Plant(keras.layers.Layer):
    """Computes what float32 holds and float16 doesn't, and hands on numbers of the size that it was given."""

    def __init__(self, kind, **kwargs):
        super().__init__(**kwargs)
        self.kind = kind

    def build(self, input_shape):
        # Weights, for constants would be put together beforehand.
        values = {"large": 2.0**12, "offset": 4096.0, "tiny": 1e-8, "zero": 0.0}
        self.numbers = {
            name: self.add_weight(shape=[], initializer=keras.initializers.Constant(value), trainable=False, name=name)
            for name, value in values.items()
        }

    def call(self, x):
        large, offset, tiny, zero = (tf.convert_to_tensor(self.numbers[name]) for name in self.numbers)
        if self.kind == "overflow":
            return x * large * large / large / large
        if self.kind == "cancellation":
            return (x + offset) - offset
        if self.kind == "squares":
            large = x * large
            return large / tf.sqrt(tf.reduce_mean(large * large, -1, keepdims=True))
        if self.kind == "epsilon":
            return x * ((zero + tiny) / (zero + tiny))
        return tf.nn.softmax(x + offset) * float(x.shape[-1])


def plant(kind: str, name: str) -> keras.layers.Layer:
    return Factors("up", "down", name=name) if kind == "gradients" else Plant(kind, name=name)


def far(name: str) -> list[keras.layers.Layer]:
    """Three that only together are of any use: between the first and the last numbers are 2^20 times as large."""
    return [
        keras.layers.Rescaling(2.0**20, name=f"{name}_a"),
        keras.layers.ReLU(negative_slope=0.5, name=f"{name}_b"),
        keras.layers.Rescaling(2.0**-20, name=f"{name}_c"),
    ]


def compiled(layers: list[keras.layers.Layer], width: int = 8, loss="mse") -> keras.Model:
    """Layers that were made under mixed_float16, with a float32 head behind."""
    with tfhalf.PrecisionPlan().scope():
        head = keras.layers.Dense(2, dtype="float32", name="head")
        model = keras.Sequential([keras.Input([width]), *layers, head])
    tfhalf.compile_model(model, keras.optimizers.SGD(), loss=loss)
    return model


def batches(model: keras.Model, seed: int, number: int = 2) -> list:
    random = np.random.default_rng(seed)
    shapes = ([16, *model.input_shape[1:]], [16, *model.output_shape[1:]])
    return [tuple(random.normal(size=shape).astype("float32") for shape in shapes) for _ in range(number)]


def planted(seed: int, number: int) -> tuple[keras.Model, set[str]]:
    """A network of random depth, width and layers; of it none, one or three need float32, at random places."""
    random = np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    depth, width, layers = int(random.integers(2, 7)), int(2 * random.integers(3, 13)), []
    with tfhalf.PrecisionPlan().scope():
        for index in range(depth):
            activation = str(random.choice(["tanh", "relu", "gelu", "linear"]))
            layers.append([keras.layers.Dense(width, activation=activation, name=f"dense{index}")])
            mild = int(random.integers(4))
            layers[-1] += [[], [keras.layers.LayerNormalization(name=f"norm{index}")]][mild == 1]
            layers[-1] += [[], [keras.layers.Rescaling(30.0, name=f"up{index}")]][mild == 2]
            layers[-1] += [[], [keras.layers.Rescaling(1 / 30.0, name=f"down{index}")]][mild == 2]
            layers[-1] += [[], [keras.layers.Dropout(0.2, seed=seed, name=f"drop{index}")]][mild == 3]
        if number == 3 and random.integers(2):
            plants = [far("plant")]
        else:
            plants = [[plant(str(random.choice(KINDS)), f"plant{index}")] for index in range(number)]
        for some in plants:
            layers.insert(int(random.integers(1, len(layers) + 1)), some)
    needed = {layer.name for some in plants for layer in some}
    return compiled([layer for some in layers for layer in some], width), needed


def trial(seed: int, number: int, **arguments) -> tuple[set[str], set[str], search.Search]:
    model, needed = planted(seed, number)
    found = search.find_islands(model, batches(model, seed), "loss", 0.01, rounds=0, **arguments)
    return set(found.islands), needed, found


@pytest.mark.parametrize("number", [0, 1, 3])
def test_planted_layers_are_found(number):
    islands, needed, found = trial(1, number)
    assert islands == needed
    assert found.is_minimal
    assert found.with_plan.within
    assert found.half.within is (number == 0)


@pytest.mark.soak
def test_planted_layers_are_found_in_95_of_100_random_trials():
    outcomes: dict[int, list[tuple[bool, bool, int]]] = {0: [], 1: [], 3: []}
    for index in range(100):
        number = (0, 1, 3)[index % 3]
        islands, needed, found = trial(1000 + index // 3, number)
        at_most_one_more = needed <= islands and len(islands) <= len(needed) + 1
        outcomes[number].append((islands == needed, at_most_one_more, found.evaluations))
        keras.backend.clear_session()
    for number, some in outcomes.items():
        exact, near, evaluations = (sum(each) for each in zip(*some, strict=True))
        print(
            f"{number} planted: {exact} of {len(some)} exactly, {near} with at most one more, "
            f"{evaluations / len(some):.1f} evaluations each"
        )
    assert sum(near for some in outcomes.values() for _, near, _ in some) >= 95


def needed_of(total: int, seed: int, number: int) -> set[str]:
    return {f"layer{index}" for index in np.random.default_rng(seed).permutation(total)[:number]}


@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 9999))
def test_set_is_found_whatever_the_ranking(total, number, seed):
    """Where a set passes if it holds the planted ones, those are what is found, in few tests."""
    number = min(number, total)
    ranked, planted, asked = [f"layer{index}" for index in range(total)], needed_of(total, seed, number), set()

    def passes(some):
        asked.add(frozenset(some))
        return planted <= set(some)

    if number:
        assert set(search.smallest(ranked, dict.fromkeys(ranked, 1), passes)) == planted
        assert len(asked) <= 3 * np.log2(total + 1) + 2 * number * (np.log2(total) + 2)


@given(st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=4), st.permutations(range(6)))
def test_where_several_sets_pass_a_minimal_one_is_found(enough, ranked):
    """Every subset of six as the oracle."""

    def passes(some):
        return any(each <= set(some) for each in enough)

    every = [set(some) for number in range(7) for some in itertools.combinations(range(6), number) if passes(some)]
    minimal = [some for some in every if not any(other < some for other in every)]
    assert set(search.smallest(ranked, dict.fromkeys(range(6), 1), passes)) in minimal


@given(st.integers(0, 2**31), st.permutations(range(5)))
def test_where_more_islands_may_be_worse_no_single_one_can_be_left_out(seed, ranked):
    """Any predicate that the whole set fulfils."""
    random = np.random.default_rng(seed)
    table = {
        frozenset(some): bool(random.integers(2)) for n in range(5) for some in itertools.combinations(range(5), n)
    }
    table[frozenset(range(5))], table[frozenset()] = True, False
    found = search.smallest(ranked, dict.fromkeys(range(5), 1), lambda some: table[frozenset(some)])
    assert table[frozenset(found)]
    assert not any(table[frozenset(found) - {one}] for one in found)


def test_of_two_that_would_do_the_cheaper_one_is_kept():
    everything = ["x", "y", "a", "b"]  # x and y only together; then a or b
    costs = {"a": 9, "b": 1, "x": 5, "y": 5}
    found = search.smallest(everything, costs, lambda some: {"x", "y"} <= set(some) and bool({"a", "b"} & set(some)))
    assert set(found) == {"x", "y", "a"}  # b isn't in the shortest part of the ranking
    found = search.smallest(["b", "a", "x", "y"], costs, lambda some: {"x", "y"} <= set(some) and len(some) > 2)
    assert set(found) == {"x", "y", "b"}


def evaluations_for(ranked: list[str], planted: set[str]) -> int:
    asked = set()

    def passes(some):
        asked.add(frozenset(some))
        return planted <= set(some)

    assert set(search.smallest(ranked, dict.fromkeys(ranked, 1), passes)) == planted
    return len(asked)


def test_ranking_has_the_planted_layers_first_and_a_broken_one_is_noticed():
    model, needed = planted(2, 3)
    found = sensitivity.measure(model, batches(model, 2, 1)[0])
    ranked = sorted(found, key=lambda path: -found[path].rank)
    assert set(ranked[: len(needed)]) == needed
    broken = ranked[::-1]
    assert set(broken[: len(needed)]) != needed
    assert evaluations_for(ranked, needed) < 10 < evaluations_for(broken, needed)


def test_every_subset_agrees():
    """Each of 32 plans in eager mode: three layers fail together, one alone, one not."""
    keras.utils.set_random_seed(3)
    with tfhalf.PrecisionPlan().scope():
        layers = [keras.layers.Dense(6, name="dense"), *far("far"), plant("cancellation", "alone")]
    model = compiled(layers, 6)
    data = batches(model, 3, 1)
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    names, losses = [layer.name for layer in layers], {}
    for some in itertools.product([False, True], repeat=5):
        islands = [name for name, one in zip(names, some, strict=True) if one]
        with precision.keeping_policies(twin):
            tfhalf.PrecisionPlan(layers=dict.fromkeys(islands, "float32")).apply(twin)
            losses[frozenset(islands)] = np.mean((twin(data[0][0]).numpy() - data[0][1]) ** 2)
    enough = [some for some, loss in losses.items() if abs(loss - losses[frozenset(names)]) <= 0.01]
    smallest = min(enough, key=len)
    assert smallest == {"far_a", "far_b", "far_c", "alone"}
    assert all(smallest <= some for some in enough)
    assert set(tfhalf.search_precision(model, data, "loss", 0.01).layers) == smallest


@pytest.mark.parametrize("size", [2.0**-40, 2.0**24], ids=["underflow", "overflow"])
def test_gradients_that_another_loss_scale_mends_need_no_island(size):
    with tfhalf.PrecisionPlan().scope():
        layers = [keras.layers.Dense(8, name="dense")]
    model = compiled(layers, loss=lambda y, y_pred: size * keras.ops.square(y - y_pred))
    found = search.find_islands(model, batches(model, 1, 1), "loss", 0.01 * size, rounds=0)
    assert found.islands == []
    assert (found.half.scale > 2.0**15) is (size < 1)
    assert found.half.gradient < 0.1


@pytest.mark.parametrize("policy", ["mixed_float16", pytest.param("mixed_bfloat16", marks=pytest.mark.soak)])
def test_gradients_count_where_the_metric_looks_fine(policy):
    """A loss that the islands don't move, and gradients that no scale mends."""
    with tfhalf.PrecisionPlan(policy).scope():
        layers = [
            keras.layers.Dense(8, name="dense"),
            Naive(name="sum"),
            keras.layers.Dense(2, dtype="float32", name="head"),
        ]
        model = keras.Sequential([keras.Input([8]), *layers])
    tfhalf.compile_model(model, keras.optimizers.SGD(), loss="mse")
    found = search.find_islands(model, batches(model, 1, 1), "loss", 0.05, rounds=0)
    assert found.plan == tfhalf.PrecisionPlan(policy, {"sum": "float32"})
    assert found.half.layer == "dense"
    assert (found.half.scale is None) is (policy == "mixed_bfloat16")
    assert (
        search.find_islands(model, batches(model, 1, 1), "loss", 0.05, gradient_tolerance=1.0, rounds=0).islands == []
    )


class Naive(keras.layers.Layer):
    """Hands on what it gets; adds 4096 times the gradient's size to the gradient, and takes it off again."""

    def call(self, x):
        @tf.custom_gradient
        def through(x):
            def gradient(by_output):
                size = tf.cast(4096.0, by_output.dtype) * tf.reduce_max(tf.abs(by_output))
                return tf.raw_ops.Sub(x=by_output + size, y=tf.stop_gradient(size))

            return x, gradient

        return through(x)


class Block(keras.layers.Layer):
    """Layers that it calls, and itself an addition: Keras' own takes two dtypes, TensorFlow's one."""

    def __init__(self, mixes, **kwargs):
        super().__init__(**kwargs)
        self.mixes = mixes
        self.inner = [keras.layers.Dense(8, name="dense"), Plant("overflow", name="plant")]

    def call(self, x):
        y = x
        for layer in self.inner:
            y = layer(y)
        return keras.ops.add(x, y) if self.mixes else tf.raw_ops.AddV2(x=x, y=y)


@pytest.mark.parametrize(("mixes", "islands"), [(True, {"block/plant"}), (False, {"block"})])
def test_block_is_searched_inside_where_it_can_be_mixed(mixes, islands):
    with tfhalf.PrecisionPlan().scope():
        layers = [Block(mixes, name="block"), keras.layers.Dense(8, name="after")]
    model, said = compiled(layers), []
    found = search.find_islands(model, batches(model, 1, 1), "loss", 0.01, rounds=0, report=said.append)
    assert set(found.islands) == islands
    assert any("can't be computed" in line for line in said) is not mixes
    assert [one.path for one in found.layers] == ["block", "block/dense", "block/plant", "after"]


def test_report_tells_all_and_nothing_is_left_behind():
    with tfhalf.PrecisionPlan().scope():
        made = [keras.layers.Dense(8, name="dense"), keras.layers.Dropout(0.5), Plant("overflow", name="plant")]
    model, said = compiled(made), []
    layers = [model, *precision.layers_by_path(model).values()]
    before = [(layer.dtype_policy.name, layer.__dict__.get("call")) for layer in layers]
    values = [np.array(variable) for variable in model.variables]
    data = batches(model, 1, 1)
    found = search.find_islands(model, data, "loss", 0.01, report=said.append, rounds=2)
    assert [(layer.dtype_policy.name, layer.__dict__.get("call")) for layer in layers] == before
    for old, new in zip(values, model.variables, strict=True):
        np.testing.assert_array_equal(old, new)
    assert len(said) == found.evaluations
    assert said[0].startswith("evaluation 1: no layers in float32: loss nan: not within tolerance")
    assert set(found.seconds) == {"half", "plan", "float32"}
    assert str(found).startswith("float32 islands: plant")
    again = search.find_islands(model, data, "loss", 0.01, rounds=0)
    assert (again.plan, again.evaluations, again.layers) == (found.plan, found.evaluations, found.layers)
    tfhalf.PrecisionPlan.from_json(found.to_json()["plan"]).apply(model)
    assert model.evaluate(*data[0], verbose=0) == pytest.approx(found.with_plan.value, rel=1e-4)


def test_too_few_evaluations_are_told():
    with tfhalf.PrecisionPlan().scope():
        layers = [keras.layers.Dense(8, name="dense"), *far("far")]
    model = compiled(layers)
    found = search.find_islands(model, batches(model, 2, 1), "loss", 0.01, most_evaluations=3, rounds=0)
    assert found.evaluations == 3
    assert not found.is_minimal
    assert found.with_plan.within
    assert {"far_a", "far_b", "far_c"} < set(found.islands)
    assert "didn't suffice" in str(found)


class Casting(keras.Model):
    """Multiplies in its own call, where no layer is."""

    def __init__(self):
        super().__init__()
        self.body = keras.layers.Rescaling(1.0, name="body")

    def call(self, x):
        return tf.cast(self.body(tf.cast(x, self.compute_dtype) * 300.0 * 300.0), tf.float32)


def test_what_cannot_be_searched_is_told():
    with tfhalf.PrecisionPlan().scope():
        layers = [keras.layers.Dense(8, name="dense")]
        casting = Casting()
    model = compiled(layers)
    data = batches(model, 1, 1)
    for arguments, message in (
        (([], "loss", 0.1), "data is empty"),
        ((data, "loss", -0.1), "tolerance must be 0 or more"),
        ((data, "accuracy", 0.1), "metric 'accuracy' is none of the compiled: loss"),
        (([(np.inf * data[0][0], data[0][1])], "loss", 0.1), "loss is (nan|inf) in float32 too"),
    ):
        with pytest.raises(ValueError, match=message):
            tfhalf.search_precision(model, *arguments)
    with pytest.raises(ValueError, match="most_evaluations must be 3 or more"):
        tfhalf.search_precision(model, data, "loss", 0.1, most_evaluations=2)
    casting(data[0][0])
    with pytest.raises(ValueError, match="isn't compiled: give a function"):
        tfhalf.search_precision(casting, data, "loss", 0.1)
    with pytest.raises(
        search.NoPlanError, match=r"even with all layers .* outside of the layers, as in the model's own"
    ):
        tfhalf.search_precision(casting, [(data[0][0], data[0][0])], keras.losses.MeanSquaredError(), 0.1)
    with precision.computing_in(model, "float32"), pytest.raises(ValueError, match=r"no layer of model .* in half"):
        tfhalf.search_precision(model, data, "loss", 0.1)
