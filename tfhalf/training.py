"""One training run: Keras `fit`, epoch by epoch, that can be watched, stopped, killed and taken up again.

Rules. The batches of an epoch are a pure function of the epoch (`train_data(epoch)`), so the state of a run is its
variables, the epoch and the step: one file, `last.npz`, written beside and renamed, holds them all, the random
generators' too. Resuming restores it and skips the batches that were seen. A folder that holds a run with another
configuration is refused. Loss scaling is decided by what the layers compute in, never by the model's own policy name.

A run's folder: `last.npz` (state), `best.npz` (weights of the best epoch, in the order of `model.weights`),
`metrics.json`, `tensorboard/`. One process at a time uses it.

It doesn't build models, read data or export, and runs on one device.
"""

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfhalf import precision, reporting
from tfhalf.optimizer import LossScaleOptimizer

_CHECKPOINT_SECONDS = 300.0
# What numpy and json raise for a file that is missing, cut or not theirs.
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


class TrainingError(Exception):
    """A run can't start or go on; the message says what was seen and what to do."""


class InterruptedRun(Exception):  # noqa: N818 - it is no error
    """Ctrl-C or SIGTERM: the state is saved, the same call goes on from there."""


@dataclasses.dataclass
class Progress:
    """Where a run is: what `last.npz` holds beside the variables.

    Attributes:
        epoch: epochs that are complete.
        step: batches seen of the epoch under way.
        best: value of the monitored metric in the best epoch, or None before the first.
        best_epoch: number of that epoch, from 1.
        history: one dict of metrics for each complete epoch.
    """

    epoch: int = 0
    step: int = 0
    best: float | None = None
    best_epoch: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)


def compile_model(
    model: keras.Model, optimizer: keras.optimizers.Optimizer, *, loss, metrics, jit_compile=False, **scaling
) -> None:
    """Compiles a model, with a `LossScaleOptimizer` exactly if one of its layers computes in float16.

    Args:
        model: a built model with float32 outputs.
        optimizer: a Keras optimizer that doesn't scale the loss.
        loss: as in `keras.Model.compile`.
        metrics: as in `keras.Model.compile`.
        jit_compile: whether XLA compiles the step.
        **scaling: arguments of `LossScaleOptimizer`; without effect where nothing computes in float16.

    Raises:
        ValueError: an output of the model isn't float32; the optimizer keeps a moving average of the weights.
    """
    precision.require_float32_outputs(model)
    if getattr(optimizer, "use_ema", False):
        raise ValueError("use_ema overwrites the weights at each end of fit, which is once an epoch here: leave it out")
    if precision.needs_loss_scaling(model):
        optimizer = LossScaleOptimizer(optimizer, **scaling)
    model.compile(optimizer=optimizer, loss=loss, metrics=metrics, jit_compile=jit_compile, auto_scale_loss=False)


def fit(
    model: keras.Model,
    train_data: Callable[[int], tf.data.Dataset],
    validation_data: tf.data.Dataset,
    *,
    workdir: str | os.PathLike,
    epochs: int,
    steps_per_epoch: int,
    monitor: str,
    config: dict[str, Any],
    show: Callable[[keras.Model], dict[str, bytes]] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Progress:
    """Trains, or goes on where this folder's run stopped, and leaves the best epoch's weights in the model.

    Args:
        model: compiled by `compile_model`.
        train_data: epoch (from 0) to its batches, at least `steps_per_epoch`; must give the same batches each time.
        validation_data: batches that the epochs are compared on.
        workdir: the run's folder; made if missing.
        epochs: number of epochs in all.
        steps_per_epoch: batches of one epoch.
        monitor: the metric of validation that is best when highest, as "val_accuracy"; best when lowest where it
            ends in "loss".
        config: plain JSON values that make this run what it is. A folder with another config is refused.
        show: gives PNG pictures by tag, after each epoch, for TensorBoard.
        report: is called with each line that a person should read.

    Returns:
        The run's `Progress`.

    Raises:
        TrainingError: the folder can't be used, the loss became non-finite, or every step was skipped.
        InterruptedRun: Ctrl-C or SIGTERM; the state is saved.
    """
    folder = Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".writable", "wb"):
            pass
        (folder / ".writable").unlink()
    except OSError as error:
        raise TrainingError(f"workdir {folder} can't be written: {error.strerror}; choose another one") from error
    with _locked(folder):
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        progress = _restore(model, folder, config)
        if progress.epoch or progress.step:
            report(f"resuming {folder} after epoch {progress.epoch}, step {progress.step}")
        board = reporting.TensorBoard(folder / "tensorboard", progress, config, steps_per_epoch, show)
        with _stop_signals() as stop, board:
            for epoch in range(progress.epoch, epochs):
                # fit once per epoch: each epoch has its own data, and a resumed one fewer steps.
                first = progress.step
                watch = _Watch(first, report)
                saver = _Saver(folder, progress, config, monitor, watch)
                model.fit(
                    train_data(epoch).skip(first),
                    initial_epoch=epoch,
                    epochs=epoch + 1,
                    steps_per_epoch=steps_per_epoch - first,
                    validation_data=validation_data,
                    shuffle=False,
                    verbose=0,
                    callbacks=[
                        reporting.ProgressBar(steps_per_epoch, first, epochs, report),
                        watch,
                        board,
                        saver,
                        _Interrupt(stop, saver),
                    ],
                )
        if not progress.best_epoch:
            raise TrainingError(f"{monitor} wasn't finite in any epoch; compare with a float32 run")
        try:
            with np.load(folder / "best.npz", allow_pickle=False) as file:
                model.set_weights(list(file.values()))
        except _DAMAGE as error:
            raise TrainingError(
                f"{folder / 'best.npz'} is damaged ({error}); delete the folder or choose another one"
            ) from error
        return progress


def write_results(
    workdir: str | os.PathLike,
    progress: Progress,
    config: dict[str, Any],
    results: dict[str, Any],
    pictures: dict[str, bytes],
    step: int,
) -> None:
    """Adds what was measured after training to `metrics.json`, and pictures of it to TensorBoard.

    Args:
        workdir: the run's folder.
        progress: as `fit` returned it.
        config: as given to `fit`.
        results: JSON values, added to `metrics.json` as "results".
        pictures: PNG pictures by tag.
        step: training steps taken in all.
    """
    folder = Path(workdir)
    _write_metrics(folder, progress, config, results)
    with tf.summary.create_file_writer(str(folder / "tensorboard" / "validation")).as_default(step):
        reporting.write_pngs(pictures)


class _Watch(keras.callbacks.Callback):
    """Stops a run that can't become good again, says why, and lets no such state be saved."""

    def __init__(self, first: int, report: Callable[[str], None]):
        super().__init__()
        self._first, self._report = first, report

    def on_train_batch_end(self, batch, logs=None):
        # The logged loss is the epoch's running mean: once NaN it stays NaN, so that no batch is missed.
        if batch % reporting.LOG_EVERY_STEPS == 0:
            stalled = isinstance(self.model.optimizer, LossScaleOptimizer) and self.model.optimizer.stalled
            if stalled or not np.isfinite(reporting.floats(logs).get("loss", 0.0)):
                self.check(f"step {self._first + batch + 1}", logs)

    def on_epoch_end(self, epoch, logs=None):
        self.check(f"the end of epoch {epoch + 1}", logs)
        if not np.isfinite(reporting.floats(logs).get("loss", 0.0)):
            skipped = self.model.optimizer.steps_skipped
            self._report(f"the loss of a batch wasn't finite; {skipped} steps skipped so far, all weights are finite")

    def check(self, when: str, logs) -> None:
        """Raises unless all weights are finite and a non-finite loss was one whose step was skipped."""
        optimizer = self.model.optimizer
        loss = reporting.floats(logs).get("loss", 0.0)
        scaled = isinstance(optimizer, LossScaleOptimizer)
        bad = [w.path for w in self.model.weights if not np.all(np.isfinite(keras.ops.convert_to_numpy(w)))]
        if not bad and (np.isfinite(loss) or scaled) and not (scaled and optimizer.stalled):
            return
        stalled = f"{optimizer.consecutive_skips} steps in a row were skipped; " if scaled and optimizer.stalled else ""
        state = f"non-finite weights: {', '.join(bad[:5])}" if bad else "all weights are finite"
        scale = f"; loss scale {optimizer.scale:g}, {optimizer.steps_skipped} steps skipped" if scaled else ""
        raise TrainingError(
            f"training stopped at {when}: {stalled}loss is {loss:g}; {state}{scale}. Look for NaN or huge values in "
            "the data, lower the learning rate, or compare with a float32 run"
        )


class _Saver(keras.callbacks.Callback):
    """Writes the state after each epoch, the best weights before it, and every five minutes within an epoch."""

    def __init__(self, folder: Path, progress: Progress, config: dict, monitor: str, watch: _Watch):
        super().__init__()
        self._folder, self._progress, self._config, self._monitor = folder, progress, config, monitor
        self._watch = watch
        self._sign = -1.0 if monitor.endswith("loss") else 1.0

    def on_epoch_begin(self, epoch, logs=None):
        self._start = self._saved = time.monotonic()
        self._first = self._progress.step

    def on_train_batch_end(self, batch, logs=None):
        if time.monotonic() - self._saved >= _CHECKPOINT_SECONDS and not self.is_last(batch):
            self.save(batch, logs)

    def is_last(self, batch: int) -> bool:
        """Whether the epoch ends with this batch of the present `fit`, and saves by itself."""
        return batch + 1 == self.params["steps"]

    def on_epoch_end(self, epoch, logs=None):
        logs = reporting.floats(logs)
        if self._monitor not in logs:
            raise TrainingError(f"monitor {self._monitor!r} isn't among the metrics: {', '.join(logs)}")
        progress = self._progress
        value = logs[self._monitor]
        if np.isfinite(value) and (progress.best is None or self._sign * value > self._sign * progress.best):
            progress.best, progress.best_epoch = value, epoch + 1
            _guard_disk(self._folder, self._save_best)
        seconds = round(time.monotonic() - self._start, 3)
        progress.history.append(
            {"epoch": epoch + 1, "seconds": seconds} | logs | reporting.optimizer_state(self.model.optimizer)
        )
        progress.epoch, progress.step = epoch + 1, 0
        _guard_disk(self._folder, self._save_state)

    def save(self, batch: int, logs) -> None:
        """Saves the state in mid-epoch, after this batch of the present `fit`."""
        self._watch.check(f"step {self._first + batch + 1}", logs)
        self._progress.step = self._first + batch + 1
        _guard_disk(self._folder, self._save_state)
        self._progress.step = self._first
        self._saved = time.monotonic()

    def _save_best(self) -> None:
        weights = {f"{i:05d}:{w.path}": keras.ops.convert_to_numpy(w) for i, w in enumerate(self.model.weights)}
        _replace(self._folder / "best.npz", lambda file: np.savez(file, **weights))

    def _save_state(self) -> None:
        arrays = {name: keras.ops.convert_to_numpy(variable) for name, variable in _state(self.model).items()}
        about = json.dumps({"progress": dataclasses.asdict(self._progress), "config": self._config})
        _replace(self._folder / "last.npz", lambda file: np.savez(file, about=np.array(about), **arrays))
        _write_metrics(self._folder, self._progress, self._config, {})


class _Interrupt(keras.callbacks.Callback):
    """Leaves `fit` between two batches once a stop was asked for, so that the saved state is a whole step."""

    def __init__(self, stop: threading.Event, saver: _Saver):
        super().__init__()
        self._stop, self._saver = stop, saver

    def on_train_batch_end(self, batch, logs=None):
        if self._stop.is_set() and not self._saver.is_last(batch):
            self._saver.save(batch, logs)
            raise InterruptedRun("interrupted; the state is saved, the same command goes on from here")

    def on_epoch_end(self, epoch, logs=None):
        if self._stop.is_set():
            raise InterruptedRun("interrupted; the state is saved, the same command goes on from here")


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Turns the first SIGINT or SIGTERM into an event; the second one acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def on_signal(number, frame):
        stop.set()
        signal.signal(number, before[number])

    for number in numbers:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number in numbers:
            signal.signal(number, before[number])


def _state(model: keras.Model) -> dict[str, keras.Variable]:
    """Everything that a step reads and writes, but the epoch's running metrics: weights, random states, optimizer."""
    metrics = {id(variable) for variable in model.metrics_variables}
    variables = [variable for variable in model.variables if id(variable) not in metrics] + model.optimizer.variables
    return {f"{index:05d}:{variable.path}": variable for index, variable in enumerate(variables)}


def _restore(model: keras.Model, folder: Path, config: dict) -> Progress:
    """Reads `last.npz` into the model; nothing is assigned unless all of it fits."""
    path = folder / "last.npz"
    if not path.exists():
        return Progress()
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        about = json.loads(str(arrays.pop("about")))
    except _DAMAGE as error:
        raise TrainingError(f"{path} is damaged ({error}); delete the folder or choose another one") from error
    config = json.loads(json.dumps(config))
    differing = [
        key for key in sorted(config.keys() | about["config"].keys()) if config.get(key) != about["config"].get(key)
    ]
    if differing:
        changes = ", ".join(f"{key}: {about['config'].get(key)!r} there, {config.get(key)!r} here" for key in differing)
        raise TrainingError(
            f"workdir {folder} holds a run with other settings ({changes}); use the same settings or another folder"
        )
    state = _state(model)
    shapes = {name: tuple(variable.shape) for name, variable in state.items()}
    # Names carry Keras' counters, which differ between processes; order and shapes are what must agree.
    if list(shapes.values()) != [array.shape for array in arrays.values()]:
        raise TrainingError(f"workdir {folder} holds another model; choose another folder")
    for variable, array in zip(state.values(), arrays.values(), strict=True):
        variable.assign(array)
    return Progress(**about["progress"])


def _guard_disk(folder: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise TrainingError(
            f"can't write the checkpoint in {folder}: {error}; an earlier one is intact: free space and run again"
        ) from error


def _replace(path: Path, write: Callable[[io.BufferedWriter], Any]) -> None:
    """Writes a file beside, syncs it, and renames it over the old one."""
    beside = path.with_name(f".{path.name}")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock on a run's folder that ends with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(f"workdir {folder} is in use by another run; choose another one") from error
        yield
    finally:
        os.close(descriptor)


def _write_metrics(folder: Path, progress: Progress, config: dict[str, Any], results: dict[str, Any]) -> None:
    value = {"config": config, "best_epoch": progress.best_epoch, "epochs": progress.history, "results": results}
    _replace(folder / "metrics.json", lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))
