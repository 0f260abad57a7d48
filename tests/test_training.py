"""One run: what it writes, how it stops, and that it goes on exactly where it was."""

import json
import re
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfhalf
from tests.conftest import ROOT, run_module
from tests.test_optimizer import replicas
from tfhalf import checkpoint, training


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


def test_weights_of_an_epoch_can_be_looked_at_again(model, tmp_path, build_convnet):
    seen = []
    fit(model, tmp_path, keep=10, show=lambda model: seen.append(model.get_weights()) or {})
    paths = sorted((tmp_path / "checkpoints").glob("*.npz"))
    assert len(seen) == len(paths) == 3
    other = compiled(build_convnet())
    for path, expected in zip(paths, seen, strict=True):
        training.load_weights(other, path)
        for ours, theirs in zip(other.get_weights(), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(training.TrainingError, match=r"another precision plan .*conv"):
        training.load_weights(compiled(build_convnet("float32")), paths[0])
    paths[0].write_bytes(paths[0].read_bytes()[:-100])
    with pytest.raises(training.TrainingError, match="is damaged"):
        training.load_weights(other, paths[0])


def test_epochs_differ_and_repeat(tmp_path, build_convnet):
    first, second = (fit(compiled(build_convnet()), tmp_path / name).history for name in "ab")
    strip = lambda history: [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in history]  # noqa: E731
    assert strip(first) == strip(second)
    assert first[0]["loss"] != first[1]["loss"]


def test_without_a_monitor_the_last_epoch_is_taken(model, tmp_path):
    seen = []
    progress = fit(model, tmp_path, monitor=None, show=lambda model: seen.append(model.get_weights()) or {})
    assert (progress.best_epoch, progress.best) == (3, None)
    with np.load(tmp_path / "best.npz") as file:
        for ours, kept, last in zip(model.get_weights(), file.values(), seen[-1], strict=True):
            np.testing.assert_array_equal(ours, last)
            np.testing.assert_array_equal(kept, last)


def test_monitor_of_accuracy_is_best_when_highest(model, tmp_path):
    progress = fit(model, tmp_path, monitor="val_mae")
    assert progress.best == max(epoch["val_mae"] for epoch in progress.history)


def run_script(workdir, mode: str) -> subprocess.CompletedProcess:
    return run_module("tests.resumable", str(workdir), mode)


def newest(folder) -> tuple[dict, dict]:
    """Arrays and JSON of a run's newest checkpoint."""
    return checkpoint.Checkpoints(folder / "checkpoints", 9, print, is_writer=False).newest()


def validation_losses(about) -> list:
    progress = about["progress"]
    return [progress["best"], progress["best_epoch"], *(epoch["val_loss"] for epoch in progress["history"])]


def assert_same_result(one, two) -> None:
    """Whether two runs ended with the same bits: weights, random states, optimizer, the best weights, the history."""
    (arrays, about), (others, other) = newest(one), newest(two)
    for (name, array), other_array in zip(arrays.items(), others.values(), strict=True):
        np.testing.assert_array_equal(array, other_array, err_msg=name)
    assert validation_losses(about) == validation_losses(other)
    with np.load(one / "best.npz") as best, np.load(two / "best.npz") as best_other:
        for name in best:
            np.testing.assert_array_equal(best[name], best_other[name], err_msg=name)


@pytest.mark.slow
def test_killed_and_stopped_runs_go_on_exactly(tmp_path):
    assert run_script(tmp_path / "whole", "whole").returncode == 0
    assert run_script(tmp_path / "killed", "kill").returncode == -signal.SIGKILL
    stopped = run_script(tmp_path / "stopped", "term")
    assert stopped.returncode == 130
    assert "the same command goes on from here" in stopped.stdout
    # The signal is sent when batch 3 is read, which may be before batch 2 is done.
    for name, place in (("killed", "after epoch 3, step 0"), ("stopped", "after epoch 2, step [1-5]")):
        resumed = run_script(tmp_path / name, "whole")
        assert re.match(f"begun\nresuming .*{name} {place}\n", resumed.stdout), resumed.stderr
        assert_same_result(tmp_path / "whole", tmp_path / name)


def start_script(folder) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.resumable", str(folder), "often"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def kill_at_random(folder, kills: int, random, seconds: float) -> None:
    """Kills a run with SIGKILL at random moments, then lets it end."""
    for _ in range(kills):
        process = start_script(folder)
        assert process.stdout.readline() == "begun\n"  # importing isn't what is tested
        time.sleep(random.uniform(0, seconds))
        process.kill()
        printed = process.communicate()[0]
        assert process.returncode in (-signal.SIGKILL, 0), printed
    ended = run_script(folder, "often")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "damaged" not in ended.stdout


def run_whole(folder) -> float:
    """Lets a run end; returns the seconds from its begin."""
    process = start_script(folder)
    assert process.stdout.readline() == "begun\n"
    start = time.monotonic()
    process.communicate()
    assert process.returncode == 0
    return time.monotonic() - start


@pytest.mark.slow
@pytest.mark.soak  # the test above kills at one moment
def test_kill_at_random_moments_loses_nothing(tmp_path):
    # A checkpoint after each batch, so that many kills hit one being written.
    seconds = run_whole(tmp_path / "whole")
    kill_at_random(tmp_path / "killed", 3, np.random.default_rng(), seconds)
    assert_same_result(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_stop_does_not_save_a_poisoned_state(tmp_path):
    stopped = run_script(tmp_path / "run", "poison")
    assert stopped.returncode == 130  # the bad batches were skipped, statistics and all
    arrays, about = newest(tmp_path / "run")
    assert about["progress"]["epoch"] == 2
    assert about["progress"]["step"] > 0
    assert all(np.all(np.isfinite(array)) for array in arrays.values())


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
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.npz")}
    with pytest.raises(training.TrainingError, match="seed: 1 there, 2 here"):
        fit(compiled(build_convnet()), tmp_path, config={"seed": 2})
    other = keras.Sequential([keras.Input([8, 8, 3]), keras.layers.Flatten(), keras.layers.Dense(3)])
    with pytest.raises(training.TrainingError, match="holds another model"):
        fit(compiled(other), tmp_path)
    plan = tfhalf.PrecisionPlan("mixed_float16", {"dense": "float32"})
    with pytest.raises(training.TrainingError, match=r"another precision plan \(dense: float16 there, float32 here\)"):
        fit(compiled(plan.apply(build_convnet())), tmp_path)
    model = build_convnet()
    training.compile_model(model, keras.optimizers.SGD(0.01), loss="mse", metrics=["mae"])
    with pytest.raises(training.TrainingError, match=r"another optimizer \(.*class_name: 'Adam' there, 'SGD' here"):
        fit(model, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.npz")} == before


def test_damaged_checkpoint_falls_back_and_ends_the_same(model, tmp_path, build_convnet):
    fit(model, tmp_path / "whole")
    fit(compiled(build_convnet()), tmp_path / "run", epochs=2)
    (tmp_path / "run" / "checkpoints" / "epoch-000002-step-000000000.npz").write_bytes(b"")
    (tmp_path / "run" / "best.npz").unlink()
    lines = []
    fit(compiled(build_convnet()), tmp_path / "run", report=lines.append)
    assert "epoch-000002-step-000000000.npz is damaged" in lines[0]
    assert lines[1] == f"resuming {tmp_path}/run after epoch 1, step 0"
    assert_same_result(tmp_path / "whole", tmp_path / "run")


def test_settings_of_a_run_are_in_its_checkpoint(model, tmp_path):
    assert training.settings_of(tmp_path / "run") is None
    fit(model, tmp_path / "run", epochs=1, config={"plan": {"default": "float32"}})
    assert training.settings_of(tmp_path / "run") == {"plan": {"default": "float32"}}
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(training.TrainingError, match="is damaged"):
        training.settings_of(tmp_path / "run")
    assert path.exists()  # looking changes nothing


def test_nothing_but_damage_is_refused(model, tmp_path, build_convnet):
    fit(model, tmp_path, epochs=1)
    (tmp_path / "checkpoints" / "epoch-000001-step-000000000.npz").write_bytes(b"")
    with pytest.raises(training.TrainingError, match="no older one is left"):
        fit(compiled(build_convnet()), tmp_path)


def test_checkpoints_that_stay(model, tmp_path):
    fit(model, tmp_path, keep=3, epochs=2, checkpoint_seconds=0.0)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [
        "epoch-000001-step-000000004.npz",
        "epoch-000001-step-000000005.npz",
        "epoch-000002-step-000000000.npz",
    ]


def test_place_that_cannot_be_written_is_named(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(training.TrainingError, match=r"workdir .*file/run can't be written: Not a directory"):
        fit(model, tmp_path / "file" / "run")


def test_checkpoint_that_cannot_be_written_stops_the_run_and_keeps_the_last(model, tmp_path, build_convnet):
    fit(model, tmp_path, epochs=1)
    (tmp_path / "checkpoints" / ".epoch-000002-step-000000000.npz").mkdir()  # takes the name that is written beside
    with pytest.raises(training.TrainingError, match="an earlier one is intact"):
        fit(compiled(build_convnet()), tmp_path, epochs=2)
    assert newest(tmp_path)[1]["progress"]["epoch"] == 1


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_bad_data_stops_an_unscaled_run_with_the_reason(build_convnet, tmp_path, poison, policy):
    with pytest.raises(training.DivergedError, match=r"loss is .*; non-finite weights: .*; look for NaN"):
        fit(compiled(build_convnet(policy)), tmp_path, train_data=lambda epoch: batches(epoch, poison))
    assert not list(tmp_path.rglob("*.npz")), "a poisoned state was saved"


def test_run_whose_steps_are_all_skipped_stops(build_convnet, tmp_path):
    model = compiled(build_convnet(), initial_scale=2.0**24, min_scale=2.0**24, max_consecutive_skips=5)

    def huge(epoch):
        return batches(epoch).map(lambda x, y: (x, y + 1000))

    with pytest.raises(
        training.DivergedError,
        match=r"stopped at step 5: LossScaleOptimizer: every batch was skipped, this many in a row: 5; the loss was "
        r"finite \(1\) or not \(0\): 1; the loss scale was: 16777216; look for NaN or huge values",
    ):
        fit(model, tmp_path, train_data=huge)


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
    with checkpoint.locked(tmp_path), pytest.raises(training.TrainingError, match="is in use by another run"):
        fit(model, tmp_path)
    fit(model, tmp_path, epochs=1)


def test_moving_average_of_weights_is_refused(build_convnet, tmp_path):
    for policy in ("float32", "mixed_float16"):
        model = build_convnet(policy)
        training.compile_model(model, keras.optimizers.Adam(use_ema=True), loss="mse", metrics=[])
        with pytest.raises(training.TrainingError, match="use_ema overwrites the weights"):
            fit(model, tmp_path)


@pytest.mark.slow
def test_two_replicas_go_on_exactly_and_draw_other_random_numbers():
    (result,) = replicas("resume", "mirrored")
    whole, _, resumed = result["digests"]
    assert whole == resumed
    assert result["equal"], "statistics differ between replicas"
    one, two = result["dropped"]
    assert one != two, "KERAS: the same units are dropped in every replica"


@pytest.mark.parametrize("scaled", [True, False])
def test_several_optimizers_in_one(build_convnet, tmp_path, scaled):
    model = build_convnet("mixed_float16" if scaled else "float32")
    several = keras.optimizers.OptimizerMap(keras.optimizers.Adam(0.01), {".*bias": keras.optimizers.SGD(0.5)})
    training.compile_model(model, keras.optimizers.MultiOptimizer(several), loss="mse", metrics=[])
    last = fit(model, tmp_path, epochs=1).history[-1]
    assert sorted([last["learning_rate"], last["learning_rate_1"]]) == pytest.approx([0.01, 0.5])


def test_files_for_people_are_mended_after_a_kill(model, tmp_path, build_convnet):
    fit(model, tmp_path, epochs=2)
    before = {name: (tmp_path / name).read_bytes() for name in ("best.npz", "metrics.json")}
    for name in before:  # as if the kill had come right after the checkpoint
        (tmp_path / name).unlink()
    fit(compiled(build_convnet()), tmp_path, epochs=2)
    assert (tmp_path / "metrics.json").read_bytes() == before["metrics.json"]
    with np.load(tmp_path / "best.npz") as file:
        assert len(file.files) == len(model.weights)


def test_stock_keras_forgets_random_states(build_convnet, tmp_path, pictures):
    # KERAS.md row 15: no format of Keras has them, so that a resumed run draws other numbers.
    model = build_convnet("float32")
    model.compile("sgd", "mse")
    model.fit(pictures, np.ones([12, 3], "float32"), batch_size=4, verbose=0)
    model.save(tmp_path / "model.keras")
    count = lambda m: int(m.get_layer("dropout").seed_generator.state.numpy()[1])  # noqa: E731
    assert (count(model), count(keras.saving.load_model(tmp_path / "model.keras"))) == (3, 0)


def test_history_tells_what_stock_keras_does_not(build_convnet, tmp_path, pictures):
    # KERAS.md row 14.
    model = build_convnet()
    model.compile("adam", "mse")
    assert set(model.fit(pictures, np.ones([12, 3], "float32"), verbose=0).history) == {"loss"}
    ours = fit(compiled(build_convnet()), tmp_path, epochs=1).history[0]
    assert ours["loss_scale"] == 2.0 ** (15 - ours["skipped_steps"])


def test_callback_ends_training_where_xla_drops_the_assertion():
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
    optimizer = tfhalf.LossScaleOptimizer(keras.optimizers.SGD(), max_consecutive_skips=5)
    model.compile(optimizer, "mse", jit_compile=True)
    x = np.full([40, 1], np.nan, "float32")
    model.fit(x, x, batch_size=1, verbose=0)
    assert optimizer.consecutive_skips == 40  # else the callback isn't needed any more
    with pytest.raises(RuntimeError, match=r"every batch was skipped, 80 in a row; the loss .* is nan; the loss scale"):
        model.fit(x, x, batch_size=1, verbose=0, callbacks=[training.StopWhenStalled()])
