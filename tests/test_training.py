"""One run: what it writes, how it stops, and that it goes on exactly where it was."""

import json
import re
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfhalf
from tfhalf import training


def batches(epoch: int, poison: float | None = None) -> tf.data.Dataset:
    """Six batches of four examples, a pure function of the epoch."""
    random = np.random.default_rng([9, epoch])
    x = random.normal(size=[24, 8, 8, 3]).astype("float32")
    y = x.mean(axis=(1, 2))
    if poison is not None:
        x[13, 0, 0, 0] = poison
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(4)


def fit(model, workdir, **changes):
    arguments = {"workdir": workdir, "epochs": 3, "steps_per_epoch": 6, "monitor": "val_loss", "config": {"seed": 1}}
    train = changes.pop("train_data", batches)
    return training.fit(model, train, batches(99), **arguments | changes)


@pytest.fixture
def model(build_convnet):
    return compiled(build_convnet())


def compiled(model, **scaling):
    training.compile_model(model, keras.optimizers.Adam(0.01), loss="mse", metrics=["mae"], **scaling)
    return model


def test_leaves_the_best_weights_and_a_record(model, tmp_path):
    lines = []
    progress = fit(model, tmp_path, epochs=4, report=lines.append)
    losses = [epoch["val_loss"] for epoch in progress.history]
    assert progress.best == min(losses) == losses[progress.best_epoch - 1]
    evaluated = model.evaluate(batches(99), return_dict=True, verbose=0)
    assert evaluated["loss"] == pytest.approx(progress.best, rel=1e-6)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["epochs"] == progress.history
    assert metrics["config"] == {"seed": 1}
    assert metrics["epochs"][0].keys() >= {
        "epoch",
        "seconds",
        "loss",
        "mae",
        "val_mae",
        "learning_rate",
        "loss_scale",
        "skipped_steps",
    }
    assert [line.split(":")[0] for line in lines] == [f"Epoch {n}/4" for n in (1, 2, 3, 4)]
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoints", "best.npz", "metrics.json", "tensorboard"}


def test_epochs_differ_and_repeat(tmp_path, build_convnet):
    first, second = (fit(compiled(build_convnet()), tmp_path / name).history for name in "ab")
    strip = lambda history: [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in history]  # noqa: E731
    assert strip(first) == strip(second)
    assert first[0]["loss"] != first[1]["loss"]


def test_monitor_of_accuracy_is_best_when_highest(model, tmp_path):
    progress = fit(model, tmp_path, monitor="val_mae")
    assert progress.best == max(epoch["val_mae"] for epoch in progress.history)


SCRIPT = """
import os, signal, sys
import keras, numpy as np, tensorflow as tf, tfhalf
from tfhalf import training
workdir, mode = sys.argv[1:]
keras.utils.set_random_seed(1)
with tfhalf.PrecisionPlan().scope():
    inputs = keras.Input([12])
    x = keras.layers.Dense(32, name="dense")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Dropout(0.4, name="dropout")(x)
    model = keras.Model(inputs, keras.layers.Dense(2, dtype="float32", name="head")(x))
schedule = keras.optimizers.schedules.CosineDecay(0.01, 30)
training.compile_model(model, keras.optimizers.Adam(schedule), loss="mse", metrics=[], dynamic_growth_steps=4)
def batches(epoch):
    if mode == "kill" and epoch == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    def stop(x, y):
        if epoch == 2 and np.array_equal(x.numpy(), marked):
            os.kill(os.getpid(), signal.SIGTERM)
        return x
    x = np.random.default_rng([1, epoch]).normal(size=[48, 12]).astype("float32")
    marked = x[16:24].copy()
    if mode == "poison" and epoch == 2:
        x[:16] = np.nan
    data = tf.data.Dataset.from_tensor_slices((x, x[:, :2])).batch(8)
    if mode in ("term", "poison"):
        data = data.map(lambda x, y: (tf.ensure_shape(tf.py_function(stop, [x, y], tf.float32), [None, 12]), y))
    return data
try:
    progress = training.fit(model, batches, batches(99), workdir=workdir, epochs=5, steps_per_epoch=6,
                            monitor="val_loss", config={}, report=print)
except training.InterruptedRun as error:
    print(error)
    sys.exit(130)
except training.TrainingError as error:
    print(error)
    sys.exit(1)
"""


def run_script(workdir, mode: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(workdir), mode], capture_output=True, text=True, timeout=120, check=False
    )


def validation_losses(about) -> list:
    progress = json.loads(str(about))["progress"]
    return [progress["best"], progress["best_epoch"], *(epoch["val_loss"] for epoch in progress["history"])]


@pytest.mark.slow
def test_killed_and_stopped_runs_go_on_exactly(tmp_path):
    assert run_script(tmp_path / "whole", "whole").returncode == 0
    assert run_script(tmp_path / "killed", "kill").returncode == -signal.SIGKILL
    stopped = run_script(tmp_path / "stopped", "term")
    assert stopped.returncode == 130
    assert "the same command goes on from here" in stopped.stdout
    with np.load(tmp_path / "whole" / "last.npz") as file:
        whole = dict(file)
    # The signal is sent when batch 3 is read, which may be before batch 2 is done.
    for name, place in (("killed", "after epoch 3, step 0"), ("stopped", "after epoch 2, step [1-5]")):
        resumed = run_script(tmp_path / name, "whole")
        assert re.match(f"resuming .*{name} {place}\n", resumed.stdout), resumed.stderr
        with np.load(tmp_path / name / "last.npz") as file:
            for key in set(whole) - {"about"}:
                np.testing.assert_array_equal(file[key], whole[key], err_msg=f"{name}: {key}")
            assert validation_losses(file["about"]) == validation_losses(whole["about"])


@pytest.mark.slow
def test_stop_does_not_save_a_poisoned_state(tmp_path):
    stopped = run_script(tmp_path / "run", "poison")
    assert stopped.returncode == 1
    assert "non-finite weights" in stopped.stdout
    with np.load(tmp_path / "run" / "last.npz") as file:  # of epoch 2
        assert all(np.all(np.isfinite(array)) for name, array in file.items() if name != "about")


def test_finished_run_is_not_trained_again(model, tmp_path, build_convnet):
    first = fit(model, tmp_path)
    again = compiled(build_convnet())
    lines = []
    assert fit(again, tmp_path, report=lines.append) == first
    assert lines == [f"resuming {tmp_path} after epoch 3, step 0"]
    for old, new in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_folder_of_another_run_is_refused_and_kept(model, tmp_path, build_convnet):
    fit(model, tmp_path)
    before = (tmp_path / "last.npz").read_bytes()
    with pytest.raises(training.TrainingError, match="seed: 1 there, 2 here"):
        fit(compiled(build_convnet()), tmp_path, config={"seed": 2})
    other = keras.Sequential([keras.Input([8, 8, 3]), keras.layers.Flatten(), keras.layers.Dense(3)])
    with pytest.raises(training.TrainingError, match="holds another model"):
        fit(compiled(other), tmp_path)
    assert (tmp_path / "last.npz").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", None])
def test_damaged_checkpoint_is_refused(model, tmp_path, content, build_convnet):
    fit(model, tmp_path, epochs=1)
    path = tmp_path / "last.npz"
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    with pytest.raises(training.TrainingError, match=r"last\.npz is damaged"):
        fit(compiled(build_convnet()), tmp_path)


def test_missing_best_weights_are_told(model, tmp_path, build_convnet):
    fit(model, tmp_path, epochs=1)
    (tmp_path / "best.npz").unlink()
    with pytest.raises(training.TrainingError, match=r"best\.npz is damaged .*No such file"):
        fit(compiled(build_convnet()), tmp_path, epochs=1)


def test_place_that_cannot_be_written_is_named(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(training.TrainingError, match=r"workdir .*file/run can't be written: Not a directory"):
        fit(model, tmp_path / "file" / "run")


def test_checkpoint_that_cannot_be_written_stops_the_run_and_keeps_the_last(model, tmp_path, build_convnet):
    fit(model, tmp_path, epochs=1)
    before = (tmp_path / "last.npz").read_bytes()
    (tmp_path / ".last.npz").mkdir()  # takes the name that is written beside
    with pytest.raises(training.TrainingError, match="an earlier one is intact"):
        fit(compiled(build_convnet()), tmp_path, epochs=2)
    assert (tmp_path / "last.npz").read_bytes() == before


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_bad_data_stops_the_run_with_the_reason(model, tmp_path, poison):
    with pytest.raises(training.TrainingError, match=r"loss is nan; .*loss scale.*[1-6] steps skipped\. Look for NaN"):
        fit(model, tmp_path, train_data=lambda epoch: batches(epoch, poison))
    assert not (tmp_path / "last.npz").exists(), "a poisoned state was saved"


def test_run_whose_steps_are_all_skipped_stops(build_convnet, tmp_path):
    model = compiled(build_convnet(), initial_scale=2.0**24, min_scale=2.0**24, max_consecutive_skips=5)

    def huge(epoch):
        return batches(epoch).map(lambda x, y: (x, y + 1000))

    with pytest.raises(
        training.TrainingError, match=r"6 steps in a row were skipped; loss is .*; all weights are finite"
    ):
        fit(model, tmp_path, train_data=huge)


@pytest.mark.parametrize(("policy", "scaled"), [("mixed_float16", True), ("mixed_bfloat16", False), ("float32", False)])
def test_loss_is_scaled_exactly_if_a_layer_computes_in_float16(build_convnet, policy, scaled):
    assert isinstance(compiled(build_convnet(policy)).optimizer, tfhalf.LossScaleOptimizer) is scaled


def test_loss_is_scaled_for_one_float16_layer_in_a_float32_model(build_convnet):
    # KERAS.md row 7: stock Keras looks at the model's own policy only.
    model = tfhalf.PrecisionPlan("float32", {"conv": "mixed_float16"}).apply(build_convnet("float32"))
    assert isinstance(compiled(model, initial_scale=4.0).optimizer, tfhalf.LossScaleOptimizer)
    assert model.optimizer.scale == 4.0


def test_half_outputs_are_refused(build_convnet):
    with pytest.raises(ValueError, match="head is float16"):
        compiled(build_convnet(output=None))


def test_signals_are_given_back(model, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    fit(model, tmp_path, epochs=1)
    assert signal.getsignal(signal.SIGINT) is before


def test_loss_scale_is_the_run_s_and_not_the_best_epoch_s(build_convnet, tmp_path):
    model = compiled(build_convnet(), initial_scale=4.0, dynamic_growth_steps=6)
    progress = fit(model, tmp_path, monitor="val_mae", epochs=4)
    assert progress.best_epoch < 4  # else this test says nothing
    assert model.optimizer.scale == progress.history[-1]["loss_scale"] == 64.0
    assert model.optimizer.steps_taken == 24


def test_batch_whose_step_was_skipped_does_not_end_a_run_with_finite_weights(tmp_path):
    with tfhalf.PrecisionPlan().scope():
        inputs = keras.Input([8, 8, 3])
        x = keras.layers.Dense(8, name="dense")(keras.layers.Flatten()(inputs))
        head = keras.layers.Dense(3, dtype="float32", name="head")
        model = compiled(keras.Model(inputs, head(x)), initial_scale=1.0)
    lines = []
    progress = fit(model, tmp_path, train_data=lambda epoch: batches(epoch, np.nan), report=lines.append, epochs=2)
    assert (model.optimizer.steps_taken, model.optimizer.steps_skipped) == (10, 2)
    assert "the loss of a batch wasn't finite; 1 steps skipped so far, all weights are finite" in lines
    assert np.isfinite(progress.best)


def test_epoch_without_a_finite_metric_is_never_best(model, tmp_path):
    bad = batches(99, np.nan)
    with pytest.raises(training.TrainingError, match="val_loss wasn't finite in any epoch"):
        training.fit(model, batches, bad, workdir=tmp_path, epochs=2, steps_per_epoch=6, monitor="val_loss", config={})


def test_folder_in_use_is_refused(model, tmp_path):
    with training._locked(tmp_path), pytest.raises(training.TrainingError, match="is in use by another run"):
        fit(model, tmp_path)
    fit(model, tmp_path, epochs=1)


def test_moving_average_of_weights_is_refused(build_convnet):
    with pytest.raises(ValueError, match="use_ema"):
        training.compile_model(build_convnet(), keras.optimizers.Adam(use_ema=True), loss="mse", metrics=[])
