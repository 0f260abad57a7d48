"""What a person sees of a run: a progress bar or lines in a log, and TensorBoard.

In a terminal it is Keras' bar; in a log file one line every half minute and one for each epoch. TensorBoard gets
losses, metrics, learning rate, loss scale, skipped steps, pictures, texts, the settings and the graph. Nothing here
changes the run.
"""

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboard.plugins.hparams import api as hparams

from tfhalf import precision
from tfhalf.optimizer import LossScaleOptimizer, parts

LOG_EVERY_STEPS = 50
_HEARTBEAT_SECONDS = 30.0


class ProgressBar(keras.callbacks.Callback):
    """Keras' bar in a terminal; in a log file one line every half minute and one for each epoch."""

    def __init__(self, steps: int, first: int, epochs: int, report: Callable[[str], None]):
        super().__init__()
        self._steps, self._first, self._epochs, self._report = steps, first, epochs, report
        self._bar: keras.utils.Progbar | None = None

    def on_epoch_begin(self, epoch, logs=None):
        self._start = self._last = time.monotonic()
        if sys.stdout.isatty():
            self._report(f"Epoch {epoch + 1}/{self._epochs}")

    def on_train_batch_end(self, batch, logs=None):
        step = self._first + batch + 1
        now = time.monotonic()
        if sys.stdout.isatty():
            if self._bar is None:  # the logs are running means already: the bar shall not average them again
                self._bar = keras.utils.Progbar(self._steps, stateful_metrics=list(logs or {}))
            self._bar.update(step, list(floats(logs).items()), finalize=False)
        elif now - self._last >= _HEARTBEAT_SECONDS:
            self._last = now
            self._report(f"  step {step}/{self._steps}, {now - self._start:.0f} s, {_readable(floats(logs))}")

    def on_epoch_end(self, epoch, logs=None):
        logs = floats(logs)
        if self._bar:
            self._bar.update(self._steps, list(logs.items()), finalize=True)
        else:
            seconds = time.monotonic() - self._start
            self._report(f"Epoch {epoch + 1}/{self._epochs}: {seconds:.0f} s, {_readable(logs)}")


class TensorBoard(keras.callbacks.Callback):
    """Losses, metrics, learning rate, loss scale, skipped steps, pictures, texts, the settings and the graph."""

    def __init__(self, folder: Path, progress, config: dict, steps_per_epoch: int, show):
        super().__init__()
        self._progress, self._config, self._steps, self._show = progress, config, steps_per_epoch, show
        self._train = tf.summary.create_file_writer(str(folder / "train"))
        self._validation = tf.summary.create_file_writer(str(folder / "validation"))
        self._begun = False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._train.close()
        self._validation.close()

    def on_train_begin(self, logs=None):
        if self._begun:
            return
        self._begun = True
        plain = {
            key: value if isinstance(value, int | float | str) else json.dumps(value)
            for key, value in self._config.items()
        }
        table = "\n".join(f"| {key} | `{value}` |" for key, value in plain.items())
        with self._train.as_default(0):
            tf.summary.text("settings", f"| setting | value |\n|---|---|\n{table}")
            hparams.hparams(plain)
            tf.summary.graph(precision.traced_graph(self.model))

    def on_train_batch_end(self, batch, logs=None):
        if batch % LOG_EVERY_STEPS == 0:
            step = self._progress.epoch * self._steps + self._progress.step + batch + 1
            with self._train.as_default(step):
                tf.summary.scalar("batch/loss", floats(logs).get("loss", float("nan")))
                for name, value in optimizer_state(self.model.optimizer).items():
                    tf.summary.scalar(f"optimizer/{name}", value)

    def on_epoch_end(self, epoch, logs=None):
        step = (epoch + 1) * self._steps
        for name, value in floats(logs).items():
            writer = self._validation if name.startswith("val_") else self._train
            with writer.as_default(step):
                tf.summary.scalar(f"epoch/{name.removeprefix('val_')}", value)
        with self._validation.as_default(step):
            write_shown(self._show(self.model) if self._show else {})
        self._train.flush()
        self._validation.flush()


def optimizer_state(optimizer: keras.optimizers.Optimizer) -> dict[str, float]:
    """Returns the learning rate (several of a MultiOptimizer), and loss scale and skipped steps where there are any."""
    rates = [float(keras.ops.convert_to_numpy(part.learning_rate)) for part in parts(optimizer)]
    state = {f"learning_rate_{index}" if index else "learning_rate": rate for index, rate in enumerate(rates)}
    if isinstance(optimizer, LossScaleOptimizer):
        state |= {"loss_scale": optimizer.scale, "skipped_steps": optimizer.steps_skipped}
    return state


def write_shown(shown: dict[str, bytes | str]) -> None:
    """Adds PNG pictures and WAV sounds (bytes) and texts in Markdown (str), by tag, at the default writer's step."""
    for tag, value in shown.items():
        if isinstance(value, str):
            tf.summary.text(tag, value)
        elif value.startswith(b"RIFF"):
            waveform, sampling_rate = tf.audio.decode_wav(value)
            tf.summary.audio(tag, waveform[tf.newaxis], sampling_rate)
        else:
            tf.summary.image(tag, tf.io.decode_png(value, channels=3)[tf.newaxis])


def floats(logs) -> dict[str, float]:
    """Returns a callback's logs as plain numbers."""
    return {name: float(value) for name, value in (logs or {}).items()}


def _readable(logs: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in logs.items())


def plain(value):
    """Returns a value as JSON has it, which knows no NaN and no infinity: they become words.

    Args:
        value: numbers, arrays, lists, dicts, or what has a `to_json`, within each other.
    """
    value = value.to_json() if hasattr(value, "to_json") else value
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def png(figure: Figure) -> bytes:
    """Returns a figure as a PNG picture."""
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()
