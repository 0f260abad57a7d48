"""The half-precision page: what is summed up, and the pictures. test_numerics.py reads it from real runs."""

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tfhalf import board, exponents
from tfhalf.exponents import Statistics


def statistics(*values: float) -> Statistics:
    return Statistics.of(exponents.measure([tf.constant(values, tf.float32)]).numpy(), "float16")


LAYERS = {
    "a": {"weights": statistics(3.0, 4.0, 0.0, 0.0), "updates": statistics(0.3, 0.4), "activations": statistics(2.0)},
    "b": {"weights": statistics(2.0**15, 1.0), "updates": statistics(1.0)},
    "zeros": {"weights": statistics(0.0), "updates": statistics(1.0)},
}


def test_scalars_sum_layers_up_by_their_sizes(tmp_path):
    page = board.Board(tmp_path)
    record = {"step": 7, "scale": 1024.0, "layers": LAYERS}
    page.write([record], [{"step": 5, "scale": 2.0, "layer": "a", "phase": "forward", "what": "its output"}])
    page.write([record | {"step": 9}], [])
    events = EventAccumulator(str(tmp_path))
    events.Reload()

    def last(tag: str) -> float:
        return float(tf.make_ndarray(events.Tensors(tag)[-1].tensor_proto))

    assert [event.step for event in events.Tensors("weights/zero/a")] == [7, 9]
    assert last("half_precision/zero/weights") == pytest.approx(3 / 7)
    assert last("half_precision/near_overflow/weights") == pytest.approx(1 / 7)
    assert (last("half_precision/log2_maximum/weights"), last("half_precision/log2_loss_scale")) == (15, 10)
    assert last("updates/ratio/a") == pytest.approx(0.1)
    assert "updates/ratio/zeros" not in events.Tags()["tensors"]
    ratios = [last(f"half_precision/update_ratio/{name}") for name in ("least", "median", "most")]
    assert ratios == pytest.approx([1 / 2**15, (0.1 + 1 / 2**15) / 2, 0.1], rel=1e-4)
    assert len(events.Tensors("custom_scalars__config__")) == 1
    (words,) = events.Tensors("half_precision/skipped")
    assert (words.step, words.tensor_proto.string_val[0]) == (5, b"step 5: a (forward: its output), scale 2")


def test_picture_shows_the_exponents_where_they_are():
    one = {"layer": statistics(*[2.0**-10] * 50)}
    other = {"layer": statistics(*[2.0**10] * 50)}
    pictures = [tf.io.decode_png(board.exponents_picture(found, "weights")).numpy()[..., :3] for found in (one, other)]
    height, width = pictures[0].shape[:2]
    low, high = (np.mean(np.nonzero(np.all(picture == [31, 119, 180], -1))[1]) for picture in pictures)  # tab:blue
    assert height > 200
    assert (high - low) / width == pytest.approx(20 / (exponents.HIGHEST - exponents.LOWEST + 1) * 0.58, rel=0.15)
    many = {f"layer_{index}": one["layer"] for index in range(200)}
    assert tf.io.decode_png(board.exponents_picture(many, "weights")).shape[0] < 2000
