"""States on disk: damage at every byte, full disks, and what is refused."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from tests.conftest import ROOT
from tfhalf import LossScaleOptimizer, PrecisionPlan, checkpoint

# Longer than what zipfile reads ahead: it sees a checksum at an array's end only.
KERNEL = np.arange(3000, dtype="float32").reshape(30, 100)
ARRAYS = {"00000:a/kernel": KERNEL, "00001:seed": np.array([1, 2], "uint32")}


def store(folder, keep=2, lines=None, is_writer=True) -> checkpoint.Checkpoints:
    return checkpoint.Checkpoints(folder / "checkpoints", keep, (lines if lines is not None else []).append, is_writer)


def save(folder, *places, keep=2) -> None:
    for epoch, step in places:
        store(folder, keep).save(epoch, step, ARRAYS, {"place": [epoch, step]})


def test_round_trip_of_the_newest(tmp_path):
    assert store(tmp_path).newest() is None
    save(tmp_path, (1, 0), (1, 7), (2, 0))
    arrays, about = store(tmp_path).newest()
    assert about == {"place": [2, 0]}
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype


@pytest.mark.parametrize("keep", [1, 3])
def test_keeps_the_newest(tmp_path, keep):
    save(tmp_path, (0, 9), (1, 0), (1, 10), (2, 0), keep=keep)
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    save(tmp_path, (10, 0), keep=keep)
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.npz"))
    assert (
        names
        == [
            "epoch-000001-step-000000010.npz",
            "epoch-000002-step-000000000.npz",
            "epoch-000010-step-000000000.npz",
        ][-keep:]
    )
    assert (tmp_path / "checkpoints" / "notes.txt").exists()


def test_at_least_one_is_kept(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        store(tmp_path, keep=0)


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "text", "folder"])
def test_damaged_newest_falls_back_with_a_warning(tmp_path, damage):
    save(tmp_path, (1, 0), (2, 0))
    path = tmp_path / "checkpoints" / "epoch-000002-step-000000000.npz"
    content = bytearray(path.read_bytes())
    place = content.index(ARRAYS["00000:a/kernel"].tobytes())
    content[place] ^= 1
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "cut": content[:200], "changed": content, "text": b"PK no zip"}[damage])
    lines = []
    assert store(tmp_path, lines=lines, is_writer=False).newest()[1] == {"place": [1, 0]}
    assert path.exists(), "a reader changed the folder"
    assert store(tmp_path, lines=lines).newest()[1] == {"place": [1, 0]}
    assert "epoch-000002-step-000000000.npz is damaged" in lines[0]
    assert "the checkpoint before it is used" in lines[0]
    assert (tmp_path / "checkpoints" / f"{path.name}.damaged").exists()
    # The good one outlives the next, older-named one, even where only one is kept.
    save(tmp_path, (1, 3), keep=1)
    assert store(tmp_path).newest()[1] == {"place": [1, 3]}


def test_nothing_but_damage_is_an_error(tmp_path):
    save(tmp_path, (1, 0), (2, 0))
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(checkpoint.CheckpointError, match=r"is damaged .* no older one is left; delete the folder"):
        store(tmp_path).newest()


def test_every_changed_byte_is_seen_or_does_no_harm(tmp_path):
    save(tmp_path, (1, 0))
    path = tmp_path / "checkpoints" / "epoch-000001-step-000000000.npz"
    content = path.read_bytes()
    seen = 0
    start = content.index(KERNEL.tobytes())
    data = set(range(start, start + KERNEL.nbytes))
    places = [place for place in range(len(content)) if place not in data or place % 100 == 0]
    for place, bit in ((place, bit) for place in places for bit in range(8)):
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        path.write_bytes(changed)
        try:
            arrays, about = store(tmp_path, is_writer=False).newest()
        except checkpoint.CheckpointError:
            seen += 1
            continue
        assert about == {"place": [1, 0]}, place
        assert {name: array.tobytes() for name, array in arrays.items()} == {k: v.tobytes() for k, v in ARRAYS.items()}
    assert seen > len(places) * 4


def test_full_disk_keeps_the_ones_before(tmp_path):
    save(tmp_path, (1, 0), (2, 0))
    program = (
        "import resource, signal, sys; from pathlib import Path; from tests.test_checkpoint import save;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300));"
        "save(Path(sys.argv[1]), (3, 0))"
    )
    # A limit on the size of files fails writes in the middle, as a full disk does.
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False, env=environment
    )
    assert "CheckpointError: can't write the checkpoint" in result.stderr
    assert "an earlier one is intact: free space and run again" in result.stderr
    names = sorted(os.listdir(tmp_path / "checkpoints"))
    assert names == ["epoch-000001-step-000000000.npz", "epoch-000002-step-000000000.npz"]
    assert store(tmp_path).newest()[1] == {"place": [2, 0]}


def test_what_a_kill_left_is_swept_up(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".epoch-000003-step-000000000.npz").write_bytes(b"half")
    assert store(tmp_path).newest() is None
    save(tmp_path, (1, 0))
    assert os.listdir(tmp_path / "checkpoints") == ["epoch-000001-step-000000000.npz"]


def about(units=4, optimizer=None, layers=None, config=None, activation="relu", drop=0.1, frozen=False) -> dict:
    with PrecisionPlan().scope():
        inputs = keras.Input([3])
        x = keras.layers.Dense(units, activation, name="body")(inputs)
        x = keras.layers.Dropout(drop, name="drop")(x) if drop is not None else x
        model = keras.Model(inputs, keras.layers.Dense(2, dtype="float32", name="head")(x))
    model.get_layer("body").trainable = not frozen
    PrecisionPlan("mixed_float16", layers or {}).apply(model)
    model.compile(optimizer or LossScaleOptimizer(keras.optimizers.Adam(0.01)), "mse")
    return {"config": config or {"seed": 1}, "model": checkpoint.describe(model)}


def test_same_run_is_accepted_whatever_keras_counted(tmp_path):
    there = json.loads(json.dumps(about()))
    checkpoint.require_same(tmp_path, there, about())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"config": {"seed": 2, "new": 3}}, "other settings (new: None there, 3 here, seed: 1 there, 2 here)"),
        ({"units": 5}, "another model (body/kernel: float32 [3, 4] there, float32 [3, 5] here, "),
        ({"activation": "gelu"}, "another model (body activation: 'relu' there, 'gelu' here)"),
        ({"drop": 0.5}, "another model (drop rate: 0.1 there, 0.5 here)"),
        ({"frozen": True}, "another model (body trainable: True there, False here)"),
        ({"drop": None}, "another model (4 layers there, 3 here, head: Dropout there, Dense here)"),
        ({"layers": {"body": "float32"}}, "another precision plan (body: float16 there, float32 here)"),
        ({"optimizer": LossScaleOptimizer(keras.optimizers.SGD(0.01))}, "class_name: 'Adam' there, 'SGD' here"),
        (
            {"optimizer": LossScaleOptimizer(keras.optimizers.Adam(0.02))},
            "another optimizer (optimizer.inner_optimizer.learning_rate: 0.009999999776482582 there, 0.01999999955",
        ),
        (
            {"optimizer": LossScaleOptimizer(keras.optimizers.Adam(0.01), 4.0)},
            "another optimizer (optimizer.initial_scale: 32768.0 there, 4.0 here)",
        ),
    ],
)
def test_another_run_is_refused_by_the_name_of_the_difference(tmp_path, other, message):
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.require_same(tmp_path, about(), about(**other))
    assert message in str(caught.value)
    assert f"workdir {tmp_path} holds " in str(caught.value)
    assert "another folder" in str(caught.value)


def test_more_weights_are_counted(tmp_path):
    more = about()
    more["model"]["weights"].append(["tail/kernel", "float32", [2]])
    with pytest.raises(checkpoint.CheckpointError, match=r"another model \(4 weights there, 5 here\)"):
        checkpoint.require_same(tmp_path, about(), more)


def test_folder_is_locked_while_it_is_used(tmp_path):
    run = tmp_path / "run"
    with (
        checkpoint.locked(run),
        pytest.raises(checkpoint.CheckpointError, match="in use by another run"),
        checkpoint.locked(run),
    ):
        pass
    with checkpoint.locked(tmp_path / "run"):
        pass
