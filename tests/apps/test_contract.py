"""What every task must do, in every policy: build, one step, export, run in a fresh process, parity."""

import importlib
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from absl import flags

import tfhalf
from apps import runner

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "apps").glob("*/*.py")
    if path.name != "__init__.py"
)
POLICIES = {"float32": {"float32"}, "mixed_float16": {"float16", "float32"}, "mixed_bfloat16": {"bfloat16", "float32"}}


def options_for(task: runner.Task, *arguments: str) -> types.SimpleNamespace:
    values = flags.FlagValues()
    names = runner.define_flags(task, values)
    values(["test", *arguments])
    return runner.options_of(values, names)


def test_every_task_is_found():
    assert "apps.image.classification" in MODULES


@pytest.mark.parametrize("module", MODULES)
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


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("module", MODULES)
def test_one_step_then_a_bundle_that_agrees(module, policy, tmp_path, data_dir):
    task = importlib.import_module(module).TASK
    options = options_for(task, f"--dtype_policy={policy}", f"--data_dir={data_dir}", "--batch_size=16")
    data = task.load_data(options)
    model = runner.build(task, options, data)
    assert tfhalf.precision.compute_dtypes(model) == POLICIES[policy]
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}
    assert isinstance(model.optimizer, tfhalf.LossScaleOptimizer) is (policy == "mixed_float16")
    if policy != "float32":
        assert tfhalf.coverage(model).multiply_adds_in_half > 0.9

    batch = next(iter(data.train(0)))
    before = [weight.numpy() for weight in model.trainable_variables]
    assert np.isfinite(model.train_on_batch(*batch)[0])
    changed = [np.any(old != new.numpy()) for old, new in zip(before, model.trainable_variables, strict=True)]
    assert np.mean(changed) > 0.9, "one step leaves weights as they were"

    serve, signature = task.serve(model, data)
    samples = runner._samples(data)
    manifest = tfhalf.export_saved_model(
        model, tmp_path / "1", inputs=samples, serve=serve, input_signature=signature, metadata={"about": data.about}
    )
    assert all(
        about["dtype"] not in ("float16", "bfloat16")
        for about in manifest.signatures["serving_default"]["outputs"].values()
    )
    # The oracle is the computation in float32, by the model's own weights, whatever the policy.
    with tfhalf.precision.computing_in(model, "float32"):
        expected = serve(**{name: tf.constant(value) for name, value in samples.items()})
    for signature in manifest.signatures:
        for name, array in tfhalf.load_saved_model(tmp_path / "1", signature)(samples).items():
            assert array.dtype == np.float32
            atol = 1e-4 if policy == signature == "float32" else 2e-2
            np.testing.assert_allclose(array, expected[name], atol=atol, err_msg=f"{signature}: {name}")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("module", MODULES)
def test_kernels_change_nothing_but_speed(module, policy, data_dir):
    task = importlib.import_module(module).TASK
    losses = {}
    for accelerate in (True, False):
        options = options_for(
            task, f"--dtype_policy={policy}", f"--data_dir={data_dir}", "--batch_size=16", f"--accelerate={accelerate}"
        )
        data = task.load_data(options)
        model = runner.build(task, options, data)
        assert any("call" in vars(layer) for layer in model.layers) is accelerate
        assert tfhalf.left_alone(model) == {}
        batches = data.train(0).take(3).as_numpy_iterator()
        losses[accelerate] = [float(model.train_on_batch(*batch)[0]) for batch in batches]
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-4 if policy == "float32" else 2e-2)


@pytest.mark.parametrize("module", MODULES)
def test_training_data_is_a_pure_function_of_seed_and_epoch(module, data_dir):
    task = importlib.import_module(module).TASK

    def batch(seed: int, epoch: int):
        data = task.load_data(options_for(task, f"--seed={seed}", f"--data_dir={data_dir}"))
        return [array.numpy().tobytes() for array in tf.nest.flatten(next(iter(data.train(epoch))))]

    first = batch(1, 0)
    assert batch(1, 0) == first
    assert batch(1, 1) != first
    assert batch(2, 0) != first
