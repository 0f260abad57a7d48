"""What every task must do: build, a few steps, the same without kernels, export, run in a fresh process, parity.

In mixed_float16 by make test, in the other policies, and beside the same model without kernels, by make soak.
Each `tests/apps/<kind>/test_contract.py` takes these tests over for the apps of its folder: so two workers share them.
"""

import functools
import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from absl import flags

import tfhalf
from apps import runner, sets
from tests.conftest import options_for

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "apps").glob("*/*.py")
    if re.search(r"^TASK = ", path.read_text(), re.MULTILINE)
)
# What makes a task's step small enough for a test; the rest is as users get it.
SMALLER = {
    "apps.audio.enhancement": ["--width=4", "--units=16", "--window_seconds=0.5"],
    "apps.audio.recognition": ["--width=128", "--depth=1", "--beam_size=4"],
    "apps.audio.synthesis": ["--width=32", "--depth=1", "--iterations=2"],
    "apps.image.detection": ["--image_size=64", "--width=8"],
    "apps.image.segmentation": ["--image_size=64", "--width=8"],
    "apps.text.classification": ["--width=32", "--depth=1", "--vocabulary_size=1000"],
    "apps.text.sentiment": ["--width=32", "--depth=1", "--vocabulary_size=1000"],
    "apps.text.translation": ["--width=32", "--depth=1", "--vocabulary_size=1000"],
}
# What tests of their own export in mixed_float16, with what it decides; here it takes soak.
_EXPORTED_ELSEWHERE = {
    "apps.image.classification",  # conftest.trained
    "apps.text.translation",
    "apps.audio.recognition",
}
_FEW = {"audio": 50}  # speech takes longest; else 300
POLICIES = {"float32": {"float32"}, "mixed_float16": {"float16", "float32"}, "mixed_bfloat16": {"bfloat16", "float32"}}
# The others take three times as long again; test_acceleration.py compares each layer's kernel with Keras.
IN_POLICIES = pytest.mark.parametrize(
    ("policy", "beside_keras"),
    [("mixed_float16", False), *(pytest.param(policy, True, marks=pytest.mark.soak) for policy in POLICIES)],
)


def pytest_generate_tests(metafunc):
    """Gives a test the tasks of the folder that took it over."""
    if "module" in metafunc.fixturenames:
        kind = Path(metafunc.module.__file__).parent.name
        metafunc.parametrize("module", [module for module in MODULES if module.split(".")[1] == kind])


def small_options(module: str, data_dir: str, *arguments: str):
    task, small = importlib.import_module(module).TASK, SMALLER.get(module, [])
    return options_for(task, f"--data_dir={data_dir}", "--batch_size=16", *small, *arguments)


@pytest.fixture
def few_examples(monkeypatch, request):
    """Some of each part: reading, learning pieces and counting words of all would be most of the time."""
    all_of, most = sets.split_names, _FEW.get(Path(request.module.__file__).parent.name, 300)

    def few(builder):
        names, parts = all_of(builder), builder.info.splits
        return tuple(
            f"{name}[:{most}]" if name in parts and parts[name].num_examples > most else name for name in names
        )

    monkeypatch.setattr(sets, "split_names", few)


@functools.cache
def data_of(module: str, data_dir: str) -> runner.Data:
    return importlib.import_module(module).TASK.load_data(small_options(module, data_dir))


def test_task_is_a_value_and_importing_defines_no_flag(module):
    before = set(flags.FLAGS)
    task = importlib.import_module(module).TASK
    assert isinstance(task, runner.Task)
    assert set(flags.FLAGS) == before
    shared = flags.FlagValues()
    names = runner.define_flags(task, shared)
    own = flags.FlagValues()
    task.define_flags(own)
    assert len(list(own)) <= 6, "an app adds at most six flags"
    assert all(shared[name].help and shared[name].help.endswith(".") for name in names)


@pytest.mark.usefixtures("few_examples")
@pytest.mark.slow
@IN_POLICIES
def test_steps_then_a_bundle_that_agrees(module, policy, beside_keras, tmp_path, data_dir):
    task, data = importlib.import_module(module).TASK, data_of(module, data_dir)
    options = small_options(module, data_dir, f"--dtype_policy={policy}")
    model = runner.build(task, options, data)
    assert tfhalf.precision.compute_dtypes(model) == POLICIES[policy]
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}
    assert isinstance(model.optimizer, tfhalf.LossScaleOptimizer) is (policy == "mixed_float16")
    batch = next(data.train(0).as_numpy_iterator())  # one: others may be of other lengths, and so traced again

    before = [weight.numpy() for weight in model.trainable_variables]
    losses = [float(model.train_on_batch(*batch)[0]) for _ in range(3)]
    changed = [np.any(old != new.numpy()) for old, new in zip(before, model.trainable_variables, strict=True)]
    assert np.mean(changed) > 0.9, "steps leave weights as they were"

    if policy != "float32":
        assert tfhalf.coverage(model, inputs=batch[0]).multiply_adds_in_half > 0.9
    assert tfhalf.left_alone(model) == {}
    assert any("call" in vars(layer) for layer in model.layers)
    if beside_keras:
        plain = runner.build(task, small_options(module, data_dir, f"--dtype_policy={policy}", "--noaccelerate"), data)
        assert not any("call" in vars(layer) for layer in plain.layers)
        as_keras = [float(plain.train_on_batch(*batch)[0]) for _ in range(3)]
        np.testing.assert_allclose(losses, as_keras, rtol=1e-4 if policy == "float32" else 2e-2)
    errors = [finding for finding in tfhalf.audit(model, inputs=batch[0]) if finding.severity == "error"]
    assert errors == []
    if module in _EXPORTED_ELSEWHERE and not beside_keras:
        return

    serve, signature = task.serve(model, data)
    decide = task.decide and task.decide(model, data)
    if isinstance(decide, dict) and policy != "mixed_float16":
        decide = {"": decide[""]}
    samples = {name: array[:4] for name, array in runner._samples(data).items()}
    manifest = tfhalf.export_saved_model(
        model,
        tmp_path / "1",
        inputs=samples,
        serve=serve,
        input_signature=signature,
        decide=decide,
        resources=data.resources,
        metadata={"about": data.about},
    )
    dtypes = {about["dtype"] for signature in manifest.signatures.values() for about in signature["outputs"].values()}
    assert not dtypes & {"float16", "bfloat16"}
    tensors = {name: tf.constant(value) for name, value in samples.items()}
    # The oracle is the computation in float32, by the model's own weights, whatever the policy.
    with tfhalf.precision.computing_in(model, "float32"):
        expected = serve(**tensors)
    compared = [name for name, about in manifest.signatures.items() if about["tolerance"] is not None]
    assert len(compared) == (2 if policy == "float32" else 3)
    served = tf.saved_model.load(tmp_path / "1").signatures
    wanted = {*compared, "serving_float32"}  # a decision has its numbers beside it, as serving_float32_raw
    answers = {name: served[name](**tensors) for name in wanted}
    for signature in compared:
        for name, answer in answers[signature].items():
            assert answer.dtype == expected[name].dtype
            atol = 2e-2 * max(1.0, np.max(np.abs(expected[name])))  # boxes are in pixels
            np.testing.assert_allclose(answer, expected[name], atol=atol, err_msg=f"{signature}: {name}")
    if callable(decide):
        for name, tensor in decide(answers["serving_float32_raw"]).items():
            np.testing.assert_array_equal(answers["serving_float32"][name], tensor, err_msg=name)
    elif decide:  # what needs the model again has no bit the same: the metric judges
        assert {"serving_default", "serving_float32"} <= {*manifest.signatures}


@pytest.mark.usefixtures("few_examples")
def test_training_data_is_a_pure_function_of_seed_and_epoch(module, data_dir):
    task = importlib.import_module(module).TASK

    def batch(data: runner.Data, epoch: int):
        return [array.numpy().tobytes() for array in tf.nest.flatten(next(iter(data.train(epoch))))]

    first = data_of(module, data_dir)
    assert batch(task.load_data(small_options(module, data_dir)), 0) == batch(first, 0)
    assert batch(first, 1) != batch(first, 0)


@pytest.mark.usefixtures("few_examples")
@pytest.mark.soak
def test_another_seed_gives_other_batches(module, data_dir):
    loaded = importlib.import_module(module).TASK.load_data(small_options(module, data_dir, "--seed=1"))
    one, other = (next(iter(data.train(0))) for data in (data_of(module, data_dir), loaded))
    bits = [[array.numpy().tobytes() for array in tf.nest.flatten(each)] for each in (one, other)]
    assert bits[0] != bits[1]
