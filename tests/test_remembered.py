"""What changes a key, and what becomes of files that are damaged or can't be written."""

import keras
import tensorflow as tf

import tfhalf
from tests.test_choice import X, Y, builder, choose
from tfhalf import remembered
from tfhalf.fastest import FLOAT32


def test_what_a_choice_rests_on():
    def key(build=None, x=X, settings=(), **changes):
        def compiled(policy):
            with tfhalf.PrecisionPlan(policy).scope():
                model = (build or builder({}))()
            given = {"loss": "mse", "optimizer": keras.optimizers.Adam(), "jit_compile": False}
            model.compile(**given | changes)
            return model

        batch = (tf.constant(x), tf.constant(Y), None)
        return remembered.key(compiled, batch, list(settings))

    def with_an_island():
        model = builder({})()
        model.get_layer("body_0").dtype_policy = "float32"
        return model

    assert key() == key()
    others = [
        key(builder({}, units=24)),
        key(with_an_island),
        key(x=X[:4]),
        key(x=X.astype("float64")),
        key(settings=[1]),
        key(loss="mae"),
        key(loss=keras.losses.Huber()),
        key(loss=keras.losses.Huber(reduction="sum")),
        key(optimizer=keras.optimizers.SGD()),
        key(jit_compile=True),
    ]
    assert len({key(), *others}) == 1 + len(others)


def test_damaged_choices_are_measured_again_and_said(tmp_path):
    build = builder({"float32": 0.005})
    settings = {"cache": tmp_path, "seconds": 0.1, "policies": (FLOAT32,)}
    choose(build, **settings)
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    for damaged in ("", text[: len(text) // 2], text.replace("float32", "float64")):
        path.write_text(damaged)
        lines = []
        assert not choose(build, **settings, report=lines.append).is_cached
        assert sum("is damaged" in line and "measured again" in line for line in lines) == 1
        assert choose(build, **settings).is_cached


def test_folder_that_cannot_be_written_changes_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    lines = []
    settings = {"seconds": 0.1, "policies": (FLOAT32,), "report": lines.append}
    assert choose(builder({}), cache=tmp_path / "file" / "cache", **settings).policy == FLOAT32
    assert any("can't be kept" in line for line in lines)
