"""Lines of a run, from values; test_runner.py reads them of a real one."""

import types
from pathlib import Path

import keras
import numpy as np

import tfhalf
from apps import summary
from tfhalf import training

TASK = types.SimpleNamespace(
    name="some_task", monitor="val_loss", describe=lambda scores: f"Test loss: {scores['loss']}"
)


def options(**changes):
    given = {"dataset": "some_set", "plan": tfhalf.PrecisionPlan(), "accelerate": True, "batch_size": 12}
    return types.SimpleNamespace(**given | {"distribute": "none", "monitor_every": 0} | changes)


def compiled() -> keras.Model:
    with tfhalf.PrecisionPlan().scope():
        layers = [keras.layers.Dense(3, name="body"), keras.layers.Dense(2, dtype="float32", name="head")]
        model = keras.Sequential([keras.Input([4]), *layers])
    tfhalf.compile_model(model, keras.optimizers.SGD(0.0), loss="mse", initial_scale=2.0**15)
    return model


def test_a_run_begins_with_what_is_in_half_and_how_a_batch_is_shared():
    model = compiled()
    measured = tfhalf.coverage(model)
    assert list(summary.introduction(TASK, options(), model, measured, 1)) == [
        "some_task on some_set, mixed_float16: 23 parameters",
        "66.7% of multiply-adds in half; float32 islands: head",
    ]
    shared = options(distribute="mirrored", accelerate=False)
    *_, last = summary.introduction(TASK, shared, model, measured, 3)
    assert last == "3 replicas, 4 of a batch's 12 examples each"


def test_a_run_ends_with_scores_sizes_errors_and_commands():
    model = compiled()
    x = np.array([[np.inf, 0, 0, 0]], "float32")
    model.train_on_batch(x, np.zeros([1, 2]))
    manifest = types.SimpleNamespace(
        metadata={"metrics": {"trained": {"loss": 0.25, "total": 8}, "serving_default": {"loss": 0.26, "total": 8}}},
        sizes={"variables": 1234, "graph": 5678},
        kept={"body/kernel": "why"},
        signatures={
            "serving_default": {"max_error": {"a": 1e-4, "b": 2e-3}, "tolerance": 0.01},
            "decided": {"max_error": {"a": 1.0}, "tolerance": None},
        },
    )
    progress = training.Progress(epoch=3, best=0.5, best_epoch=2)
    told = summary.conclusion(
        TASK, options(), Path("my run"), Path("models/1"), manifest, tfhalf.coverage(model), progress, 9, model
    ).splitlines()
    assert told[1] == "Test loss: 0.25"
    assert told[4].split() == ["the", "trained", "model", "0.2500", "8"]
    assert told[5].split() == ["the", "artefact,", "serving_default", "0.2600", "8"]
    facts = {line[2:17].strip(): line[18:] for line in told[7:] if line}
    assert facts["loss scale"] == "32768 at the end; 1 of 9 steps skipped; --monitor_every=50 tells where"
    assert facts["in half"] == "66.7% of multiply-adds, 65.2% of parameters"
    assert facts["epoch taken"] == "2 of 3, val_loss 0.5000"
    assert facts["variables"] == "1,234 bytes; the weights in float32 are 92"
    assert facts["kept in float32"] == "body/kernel"
    assert facts["largest error"] == "serving_default 2.0e-03 (at most 0.01)"
    assert facts["look"] == ".venv/bin/tensorboard --logdir='my run'/tensorboard"
    assert facts["predict"].endswith("--saved_model=models/1 'my run'/examples")
