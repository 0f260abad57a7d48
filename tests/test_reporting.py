"""What a person sees: TensorBoard's events, and lines in a log."""

import json

import keras
import numpy as np
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tfhalf import reporting, training


def test_tensorboard_shows_the_run(build_convnet, pictures, tmp_path):
    wav = tf.audio.encode_wav(np.linspace(-1, 1, 80, dtype=np.float32)[:, np.newaxis], 16_000).numpy()
    png = tf.io.encode_png(np.full([5, 7, 3], 200, np.uint8)).numpy()
    data = tf.data.Dataset.from_tensor_slices((pictures, pictures.mean(axis=(1, 2)))).batch(2)
    model = build_convnet()
    training.compile_model(model, keras.optimizers.Adam(0.01), loss="mse", metrics=["mae"])
    progress = training.fit(
        model, lambda epoch: data, data, workdir=tmp_path, epochs=3, steps_per_epoch=6, monitor="val_loss",
        config={"seed": 1, "plan": {"default": "x"}}, show=lambda model: {"predictions": png},
    )  # fmt: skip
    shown = {"confusion": png, "table": "| a |", "voice": wav}
    training.write_results(tmp_path, progress, {"seed": 1}, {"accuracy": 0.5}, shown, 18)
    train, validation = (EventAccumulator(str(tmp_path / "tensorboard" / name)) for name in ("train", "validation"))
    train.Reload()
    validation.Reload()
    tags = train.Tags()
    assert set(tags["tensors"]) >= {
        "batch/loss", "epoch/loss", "epoch/mae", "settings",
        "optimizer/learning_rate", "optimizer/loss_scale", "optimizer/skipped_steps",
    }  # fmt: skip
    assert tags["graph"]
    assert "_hparams_/session_start_info" in train.summary_metadata
    assert set(validation.Tags()["tensors"]) == {"epoch/loss", "epoch/mae", "predictions", *shown}
    (table,) = validation.Tensors("table")
    assert (table.step, table.tensor_proto.string_val[0]) == (18, b"| a |")
    plugins = {tag: validation.summary_metadata[tag].plugin_data.plugin_name for tag in shown}
    assert plugins == {"confusion": "images", "table": "text", "voice": "audio"}
    (voice,) = validation.Tensors("voice")
    waveform, sampling_rate = tf.audio.decode_wav(voice.tensor_proto.string_val[0])
    np.testing.assert_allclose(waveform[:, 0], np.linspace(-1, 1, 80), atol=2**-14)
    assert sampling_rate == 16_000
    assert [event.step for event in train.Tensors("epoch/loss")] == [6, 12, 18]
    seen = [float(tf.make_ndarray(event.tensor_proto)) for event in validation.Tensors("epoch/loss")]
    np.testing.assert_allclose(seen, [epoch["val_loss"] for epoch in progress.history], rtol=1e-6)
    assert json.loads((tmp_path / "metrics.json").read_text())["results"] == {"accuracy": 0.5}


def test_log_file_gets_one_line_for_an_epoch(capsys):
    lines = []
    bar = reporting.ProgressBar(steps=4, first=0, epochs=2, report=lines.append)
    bar.on_epoch_begin(0)
    for batch in range(4):
        bar.on_train_batch_end(batch, {"loss": 0.5})
    bar.on_epoch_end(0, {"loss": 0.5, "val_loss": 0.25})
    assert lines == ["Epoch 1/2: 0 s, loss 0.5000, val_loss 0.2500"]
    assert capsys.readouterr().out == ""


def test_json_knows_no_nan():
    assert reporting.plain(np.array([[1.5, np.nan], [-np.inf, 0.0]])) == [[1.5, "nan"], ["-inf", 0.0]]
    assert [reporting.plain(value) for value in (None, True, "a", 2.5, np.inf)] == [None, True, "a", 2.5, "inf"]
    assert json.dumps(reporting.plain({"a": {"b": [np.nan]}}), allow_nan=False) == '{"a": {"b": ["nan"]}}'
