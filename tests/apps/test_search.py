"""The command: a plan that trains, resumes and is exported; what it refuses; exit statuses."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import flags

import tfhalf
from apps import any_app, runner, search
from tests import fakes
from tests.apps.test_any_app import options_for, tiny_task
from tests.conftest import run_module
from tfhalf import training
from tfhalf.datasets import mnist_5k


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> str:
    """A folder with a set of 200 made-up digits."""
    folder = tmp_path_factory.mktemp("digits")
    fakes.write_mnist_csv(folder / "mnist_5k.csv.gz", 200)
    config = tfds.download.DownloadConfig(manual_dir=folder)
    mnist_5k.Mnist5k(data_dir=folder / "data").download_and_prepare(download_config=config)
    return f"{folder}/data"


def values_of(task, *arguments) -> tuple[flags.FlagValues, list[str]]:
    values = flags.FlagValues()
    search.define_flags(values)
    flags.DEFINE_string("app", None, "App.", flag_values=values)
    names = runner.define_flags(task, values) if task else []
    values(["search", "--app=image.classification", *arguments])
    return values, names


def huge(options, data) -> keras.Model:
    """A model of which two layers need float32."""
    layers = [keras.layers.Rescaling(2.0**20, name="up"), keras.layers.Rescaling(2.0**-20, name="down")]
    return keras.Sequential([keras.Input([8]), *layers, keras.layers.Dense(2, dtype="float32", name="head")])


def run(task, *arguments) -> int:
    return search.run(task, *values_of(task, *arguments))


@pytest.mark.soak  # test_runner.py trains, resumes and exports; here it is with a plan that was found
def test_plan_trains_resumes_and_is_exported(digits, tmp_path):
    """By real command lines. A tolerance that half can't keep makes islands in a sound model."""
    small = [f"--data_dir={digits}", "--batch_size=16", "--steps_per_epoch=3", "--seed=4"]
    wanted = ["--tolerance=0.0", "--batches=1", "--most_evaluations=3", f"--output={tmp_path}/out"]
    result = run_module("apps.search", "--app=image.classification", *small, *wanted)
    assert result.returncode == search.FOUND, result.stderr
    assert result.stdout.startswith("image_classification on mnist_5k: loss of 1 validation batches may move by 0\n")
    told = json.loads((tmp_path / "out" / "search.json").read_text())
    plan = tfhalf.PrecisionPlan.load(tmp_path / "out" / "plan.json")
    assert plan.to_json() == told["plan"]
    assert {"conv1": "float32"}.items() <= plan.layers.items()
    assert set(told["seconds"]) == {"half", "plan", "float32"}
    assert tf.io.decode_png((tmp_path / "out" / "search.png").read_bytes()).shape[1] > 100

    command = result.stdout.splitlines()[-1].split()
    assert command[:4] == [
        ".venv/bin/python",
        "-m",
        "apps.image.classification",
        f"--precision_plan={tmp_path}/out/plan.json",
    ]
    assert set(command[4:]) == {*small}
    places = [f"--workdir={tmp_path}/run", f"--saved_model_dir={tmp_path}/sm", "--epochs=1"]
    trained = run_module(*command[2:], *places)
    assert trained.returncode == 0, trained.stderr
    manifest = tfhalf.verify(tmp_path / "sm" / "image_classification_mnist_5k" / "1")
    assert manifest.metadata["plan"] == plan.to_json()
    again = run_module(*command[2:], *places)
    assert again.returncode == 0, again.stderr
    assert "resuming" in again.stdout
    assert tfhalf.verify(tmp_path / "sm" / "image_classification_mnist_5k" / "2").metadata["plan"] == plan.to_json()


def test_islands_are_found_and_told(tmp_path, capsys):
    assert run(tiny_task(build_model=huge), f"--output={tmp_path}/out", "--batches=1") == search.FOUND
    printed = capsys.readouterr().out
    assert "float32 islands: up, down" in printed
    assert "evaluation 1: no layers in float32: loss nan" in printed
    task = tiny_task(build_model=huge)
    *_, data, model = any_app.load(task, options_for(task, f"--precision_plan={tmp_path}/out/plan.json"))
    assert [layer.compute_dtype for layer in model.layers] == ["float32"] * 3
    saved = {"workdir": tmp_path, "epochs": 1, "steps_per_epoch": 1, "monitor": None, "config": {}}
    assert np.isfinite(training.fit(model, data.train, data.validation, **saved).history[-1]["loss"])


def test_clearance_of_an_app(tmp_path, capsys):
    task = tiny_task(build_model=huge)
    arguments = ["--clearance", "--dtype_policy=mixed_bfloat16", "--headroom_bits=1", f"--output={tmp_path}/out"]
    assert run(task, *arguments) == search.FOUND
    assert "float32 island: up: outputs up to 1.05e+06, -4.0 bits to float16's end" in capsys.readouterr().out
    plan = tfhalf.PrecisionPlan.load(tmp_path / "out" / "plan.json")
    assert plan == tfhalf.PrecisionPlan("mixed_float16", {"up": "float32", "down": "float32"})
    assert (tmp_path / "out" / "search.png").exists()


def test_weights_of_a_checkpoint_are_searched(tmp_path, capsys):
    """Weights of 1e5, which float16 doesn't hold, come from a run."""
    task = tiny_task()
    options = options_for(task)
    _, _, data, model = any_app.load(task, options)
    model.set_weights([np.full_like(weight, 1e5) if weight.ndim > 1 else weight for weight in model.get_weights()])
    training.fit(
        model, data.train, data.validation, workdir=tmp_path, epochs=1, steps_per_epoch=1, monitor=None, config={}
    )
    checkpoint = next((tmp_path / "checkpoints").iterdir())
    arguments = ["--batches=1", "--clearance", f"--output={tmp_path}/out"]
    assert run(task, f"--checkpoint={checkpoint}", *arguments) == search.FOUND
    printed = capsys.readouterr().out
    assert "float32 island: body: outputs up to 8e+05" in printed
    assert "a float16 file can't hold" in printed


class Casting(keras.Model):
    """Multiplies in its own call, where no layer is."""

    def call(self, x, training=None, mask=None):
        return super().call(tf.cast(x, self.compute_dtype) * 300.0 * 300.0)


def test_no_plan_is_status_1(tmp_path, capsys):
    def build(options, data):
        inputs = keras.Input([8])
        return Casting(inputs, keras.layers.Dense(2, dtype="float32")(keras.layers.Dense(8)(inputs)))

    assert run(tiny_task(build_model=build), f"--output={tmp_path}/out") == search.NO_PLAN
    assert "no plan: search_precision: even with all layers as float32 islands loss " in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_metric_is_the_one_that_chooses_the_best_epoch():
    accuracy = keras.metrics.MeanAbsoluteError(name="accuracy")
    named = tiny_task(build_metrics=lambda options: [accuracy], monitor="val_accuracy")
    assert search.metric_of(named, None) is accuracy
    assert search.metric_of(dataclasses.replace(named, monitor="val_loss"), None) == "loss"
    assert search.metric_of(dataclasses.replace(named, monitor=None), None) == "loss"
    assert search.metric_of(dataclasses.replace(named, monitor="val_part_loss"), None) == "loss"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision_plan={plan}"], "--precision_plan has no effect here"),
        (["--dtype_policy=float32"], "--dtype_policy=float32 has nothing in half"),
        (["--headroom_bits=3"], "--headroom_bits has no effect without --clearance"),
        (["--clearance", "--tolerance=1"], "--tolerance has no effect on --clearance"),
        (["--output={plan}/out"], r"--output=.*Not a directory; choose another folder"),
        (["--distribute=mirrored"], "--distribute=mirrored has no effect here"),
    ],
)
def test_what_has_no_effect_is_refused(arguments, message, tmp_path):
    tfhalf.PrecisionPlan().save(tmp_path / "plan.json")
    with pytest.raises(runner.AppError, match=message):
        run(tiny_task(), *(argument.format(plan=tmp_path / "plan.json") for argument in arguments))


def test_app_is_needed():
    with pytest.raises(runner.AppError, match="give --app=<name>"):
        run(None)


@pytest.mark.parametrize("name", any_app.names())
def test_flags_do_not_clash_with_any_app(name):
    values = flags.FlagValues()
    search.define_flags(values)
    any_app.define_flags(["search", f"--app={name}"], values)
    assert "gradient_tolerance" in values
