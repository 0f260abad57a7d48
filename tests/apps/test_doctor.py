"""The three commands, what they refuse, and their exit status."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import flags

import tfhalf
from apps import any_app, doctor, runner
from tests import fakes
from tests.apps.test_any_app import options_for, tiny_task
from tests.conftest import run_module
from tfhalf import training
from tfhalf.bundle_watch import Operation
from tfhalf.datasets import mnist_5k


def values_of(*arguments) -> flags.FlagValues:
    values = flags.FlagValues()
    doctor.define_flags(values)
    values(["doctor", *arguments])
    return values


def huge(options, data) -> keras.Model:
    """A model whose forward pass overflows."""
    scaled = [keras.layers.Rescaling(256.0, name="large"), keras.layers.Rescaling(1024.0, name="huge")]
    return keras.Sequential(
        [keras.Input([8]), *scaled, keras.layers.ReLU(6.0), keras.layers.Dense(2, dtype="float32", name="head")]
    )


@pytest.fixture(scope="module")
def hiding(tmp_path_factory):
    """A bundle that is sound with its own samples, and hides an overflow of larger ones."""
    with tfhalf.PrecisionPlan().scope():
        layers = [keras.layers.Rescaling(256.0, name="large"), keras.layers.ReLU(6.0)]
        layers.append(keras.layers.Dense(1, dtype="float32", name="y"))
        model = keras.Sequential([keras.Input([2], name="x"), *layers], name="small")
    directory = tmp_path_factory.mktemp("bundles") / "hiding" / "1"
    tfhalf.export_saved_model(model, directory, inputs=np.ones([3, 2], "float32"))
    return directory


@pytest.mark.slow
def test_window_of_an_app(tmp_path):
    fakes.write_mnist_csv(tmp_path / "mnist_5k.csv.gz", 200)
    config = tfds.download.DownloadConfig(manual_dir=tmp_path)
    mnist_5k.Mnist5k(data_dir=tmp_path / "data").download_and_prepare(download_config=config)
    arguments = ["--app=image.classification", f"--data_dir={tmp_path}/data", "--batch_size=16", "--batches=1"]
    result = run_module("apps.doctor", "--window", *arguments, f"--output={tmp_path}/out")
    assert result.returncode == 0, result.stderr
    assert "loss scales 2^" in result.stdout
    assert "conv1/kernel" in result.stdout
    told = json.loads((tmp_path / "out" / "window.json").read_text())
    assert told["trouble"] == []
    assert told["bits"] > 20
    assert len(told["variables"]) == 10
    assert tf.io.decode_png((tmp_path / "out" / "window.png").read_bytes()).shape[1] > 100


@pytest.mark.slow
def test_overflow_in_a_bundle_is_status_1(hiding, tmp_path):
    np.savez(tmp_path / "large.npz", x=np.full([2, 2], 300.0))
    result = run_module("apps.doctor", f"--saved_model={hiding}", f"--inputs={tmp_path}/large.npz")
    assert result.returncode == doctor.TROUBLE, result.stderr
    assert result.stdout.startswith("overflow: small/large: ")
    assert "least room:" in result.stdout


@pytest.mark.soak  # test_bundle_watch.py measures a sound bundle on its own samples, below is the text, above status 0
def test_sound_bundle_is_status_0(hiding):
    result = run_module("apps.doctor", f"--saved_model={hiding}")
    assert result.returncode == doctor.WELL, result.stderr
    assert "operations in half overflows" in result.stdout
    assert "least room:" in result.stdout


@pytest.mark.slow
def test_hardware_is_a_page_and_status_0(monkeypatch):
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "1")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    result = run_module("apps.doctor", "--hardware", is_forked=False)  # TensorFlow reads both when it is imported
    assert result.returncode == doctor.WELL, result.stderr
    lines = result.stdout.splitlines()
    is_on = "oneDNN custom operations are on" in result.stderr  # as TensorFlow's log says
    assert is_on is ("float32: matrix product" in result.stdout)
    assert lines[0].startswith("CPU  ")
    assert max(map(len, lines)) <= 130
    (row,) = [line for line in lines if line.startswith("matrix product, TensorFlow")]
    assert all(float(rate) > 0 for rate in row.split()[3:6])


@pytest.mark.slow
def test_what_cannot_be_looked_at_ends_in_2_with_one_line(tmp_path):
    result = run_module("apps.doctor", f"--saved_model={tmp_path}")
    assert (result.returncode, result.stdout) == (2, "")
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert "is no tfhalf bundle" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "has_app", "message"),
    [
        ([], False, "exactly one of --window"),
        ([], True, "exactly one of --window"),
        (["--window", "--saved_model=x"], True, "exactly one of --window"),
        (["--window"], False, "--window needs --app=<name>"),
        (["--saved_model=x"], True, "--saved_model and --app exclude each other"),
        (["--window", "--inputs=x"], True, "--inputs has no effect on --window"),
        (["--saved_model=x", "--batches=2"], False, "--batches has no effect on --saved_model"),
        (["--saved_model=x", "--checkpoint=y"], False, "--checkpoint has no effect on --saved_model"),
        (["--hardware", "--window"], True, "exactly one of --window"),
        (["--hardware"], True, "--hardware and --app exclude each other"),
        (["--hardware", "--inputs=x"], False, "--inputs has no effect on --hardware"),
        (["--hardware", "--output=y"], False, "--output has no effect on --hardware"),
        (["--saved_model=x", "--output=y"], False, "--output has no effect on --saved_model"),
    ],
)
def test_exactly_one_mode(arguments, has_app, message):
    with pytest.raises(runner.AppError, match=message):
        doctor.require_one_mode(tiny_task() if has_app else None, values_of(*arguments))


def test_each_mode_is_let_through():
    doctor.require_one_mode(None, values_of("--hardware"))
    doctor.require_one_mode(tiny_task(), values_of("--window", "--batches=3", "--checkpoint=x", "--output=y"))
    doctor.require_one_mode(None, values_of("--saved_model=x", "--inputs=y"))


@pytest.mark.parametrize("name", any_app.names())
def test_flags_do_not_clash_with_any_app(name):
    values = flags.FlagValues()
    doctor.define_flags(values)
    any_app.define_flags(["doctor", f"--app={name}"], values)
    assert "batches" in values


def test_trouble_is_status_1_and_written(tmp_path, capsys):
    task = tiny_task(build_model=huge)
    assert doctor.measure(task, options_for(task), 1, None, tmp_path / "out") == doctor.TROUBLE
    told = capsys.readouterr().out
    assert "trouble: batch 0: the forward pass overflows" in told
    assert 'PrecisionPlan(layers={"huge": "float32"})' in told
    assert json.loads((tmp_path / "out" / "window.json").read_text())["trouble"]
    assert (tmp_path / "out" / "window.png").exists()


def test_checkpoints_weights_are_taken(tmp_path, capsys):
    """Where all is 0, as the targets are, the loss is flat."""
    task = tiny_task()
    options = options_for(task)
    _, _, data, model = any_app.load(task, options)
    model.set_weights([np.zeros_like(weight) for weight in model.get_weights()])
    saved = {"workdir": tmp_path, "epochs": 1, "steps_per_epoch": 1, "monitor": None, "config": {}}
    training.fit(model, data.train, data.validation, **saved)
    checkpoint = next((tmp_path / "checkpoints").iterdir())
    assert doctor.measure(task, options, 1, str(checkpoint), tmp_path / "out") == doctor.TROUBLE
    assert "trouble: no variable has a gradient" in capsys.readouterr().out
    assert doctor.measure(task, options, 1, None, tmp_path / "out") == doctor.WELL
    assert "trouble" not in capsys.readouterr().out
    with pytest.raises(training.TrainingError, match="none"):
        doctor.measure(task, options, 1, str(tmp_path / "none.npz"), tmp_path)


def test_what_cannot_be_measured_is_told(tmp_path):
    task = tiny_task()
    with pytest.raises(runner.AppError, match=r"--batches=2 is more than the 1 that mnist_5k has"):
        doctor.measure(task, options_for(task), 2, None, tmp_path)
    with pytest.raises(runner.AppError, match=r"no layer computes in float16.*choose another --dtype_policy"):
        doctor.measure(task, options_for(task, "--dtype_policy=mixed_bfloat16"), 1, None, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(runner.AppError, match=r"--output=.*file: .*choose another folder"):
        doctor.measure(task, options_for(task), 1, None, tmp_path / "file")


def test_inputs_that_cannot_be_read(tmp_path):
    (tmp_path / "text.npz").write_text("nothing")
    np.save(tmp_path / "one.npy", np.ones(2))
    for name in ("none.npz", "text.npz", "one.npy"):
        with pytest.raises(runner.AppError, match=r"is no \.npz file of arrays by name"):
            doctor.watch(str(tmp_path), str(tmp_path / name))


def test_text_has_overflows_first_and_the_least_room():
    def operation(index: int, overflows: bool = False) -> Operation:
        return Operation(f"m/{index}", "add", "AddV2", "float16", int(overflows), overflows, 2.0**index, 16.0 - index)

    lines = doctor.as_text([operation(index) for index in range(12)] + [operation(15, True)]).splitlines()
    assert lines[0] == "overflow: m/15: add (AddV2, float16), 1 values"
    assert [line.split()[0] for line in lines[4:]] == ["m/15", *(f"m/{index}" for index in range(11, 2, -1))]
    assert doctor.as_text([]) == "none of 0 operations in half overflows"
