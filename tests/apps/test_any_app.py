"""Which apps there are, and what a program gets of the one that --app names."""

import os
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import flags

from apps import any_app, runner
from tests.conftest import ROOT

DEFAULTS = {"dataset": "mnist_5k", "batch_size": 4, "epochs": 1, "learning_rate": 1e-3}


def tiny_task(**changes) -> runner.Task:
    """A task that needs no data set."""

    def load_data(options):
        batches = tf.data.Dataset.from_tensors((tf.ones([4, 8]), tf.zeros([4, 2])))
        return runner.Data(lambda epoch: batches, 1, batches, batches, about={"units": 2})

    def build_model(options, data):
        layers = [keras.Input([8]), keras.layers.Dense(8, name="body")]
        return keras.Sequential([*layers, keras.layers.Dense(data.about["units"], dtype="float32", name="head")])

    given = {
        "name": "tiny",
        "define_flags": lambda values: flags.DEFINE_integer("depth", 3, "Depth.", flag_values=values),
        "defaults": DEFAULTS,
        "load_data": load_data,
        "build_model": build_model,
        "build_optimizer": lambda options, steps: keras.optimizers.SGD(options.learning_rate),
        "build_loss": lambda options: keras.losses.MeanSquaredError(),
        "build_metrics": lambda options: [],
        "monitor": None,
        "metric": "loss",
        "margin": 0.1,
    }
    unused = dict.fromkeys(["serve", "score", "describe", "show", "conclude"])
    return runner.Task(**given | unused | changes)


def options_for(task, *arguments) -> types.SimpleNamespace:
    values = flags.FlagValues()
    names = runner.define_flags(task, values)
    values(["test", *arguments])
    return runner.options_of(values, names)


def test_every_module_with_a_task_is_an_app():
    named = [name for name in any_app.names() if "TASK = runner.Task(" in (ROOT / "apps" / f"{name.replace('.', '/')}.py").read_text()]  # noqa: E501  # fmt: skip
    assert named == any_app.names()
    assert {"image.classification", "audio.recognition", "text.translation"} <= set(named)
    assert "image.resnet" not in named


def test_unknown_app_is_told_with_the_known_ones():
    with pytest.raises(runner.AppError, match=r"--app=image\.clasification .*image\.classification, image\.detection"):
        any_app.define_flags(["audit", "--app=image.clasification"], flags.FlagValues())
    with pytest.raises(runner.AppError, match=r"--app=image\.resnet is none"):
        any_app.task_of("image.resnet")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--app=image.classification", "--depth=8"],
        ["--app", "image.classification", "--depth", "8"],
        ["-app=image.classification", "--depth=8"],
        ["--depth=8", "--app=text.sentiment", "--app=image.classification"],
    ],
)
def test_flags_of_the_app_are_defined_before_parsing(arguments):
    values = flags.FlagValues()
    task, names = any_app.define_flags(["audit", *arguments], values)
    assert task.name == "image_classification"
    assert values(["audit", *arguments]) == ["audit"]
    assert values.app == "image.classification"
    options = runner.options_of(values, names)
    assert (options.depth, options.dataset, options.given) == (8, "mnist_5k", {"depth"})
    assert "app" not in names


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--", "--app=image.classification"], ["x=--app"]])
def test_without_an_app_only_its_flag_is_there(arguments):
    values = flags.FlagValues()
    assert any_app.define_flags(["audit", *arguments], values) == (None, [])
    assert set(values) == {"app"}
    assert "text.translation" in values["app"].help


def test_missing_name_is_told():
    with pytest.raises(runner.AppError, match="--app= is none"):
        any_app.define_flags(["audit", "--app"], flags.FlagValues())


@pytest.mark.parametrize("name", any_app.names())
def test_programs_flags_do_not_clash_with_any_app(name):
    from apps import audit

    values = flags.FlagValues()
    audit.define_flags(values)
    task, names = any_app.define_flags(["audit", f"--app={name}"], values)
    assert isinstance(task, runner.Task)
    assert "dtype_policy" in names


def test_load_gives_what_the_runner_builds():
    task = tiny_task()
    chosen, options, data, model = any_app.load(task, options_for(task, "--dtype_policy=mixed_bfloat16", "--seed=3"))
    assert chosen is task
    assert options.seed == 3
    assert data.about == {"units": 2}
    assert [layer.compute_dtype for layer in model.layers] == ["bfloat16", "float32"]
    assert model.compiled
    again = any_app.load(task, options_for(task, "--seed=3"))[-1]
    np.testing.assert_array_equal(model.get_weights()[0], again.get_weights()[0])


def test_load_takes_the_task_that_the_flags_choose():
    other = tiny_task(name="other", defaults=DEFAULTS | {"learning_rate": 0.5})
    task = tiny_task(choose=lambda options: other if options.depth == 5 else tiny_task())
    chosen, options, _, model = any_app.load(task, options_for(task, "--depth=5"))
    assert (chosen, options.learning_rate) == (other, 0.5)
    assert float(model.optimizer.learning_rate) == 0.5


def test_load_refuses_what_has_no_effect():
    task = tiny_task()
    with pytest.raises(runner.AppError, match="--distribute=mirrored has no effect"):
        any_app.load(task, options_for(task, "--distribute=mirrored"))


@pytest.mark.parametrize(("ends", "status"), [("return 1", 1), ("raise KeyError('x')", 2), ("return 0", 0)])
def test_only_what_was_found_ends_in_1(ends, status):
    program = f"""
from apps import any_app
def run(task, values, names):
    {ends}
any_app.main(lambda values: None, run)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, env=environment)
    assert result.returncode == status, result.stderr


def test_load_chooses_where_the_policy_is_auto(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    task = tiny_task()
    _, options, _, model = any_app.load(task, options_for(task, "--dtype_policy=auto"))
    assert f"dtype_policy auto: {options.plan.default} (" in capsys.readouterr().out
    assert model.get_layer("body").dtype_policy.name == options.plan.default
