"""One training run: Keras `fit`, epoch by epoch, that can be watched, stopped, killed and taken up again.

Rules. The batches of an epoch are a pure function of the epoch (`train_data(epoch)`), so the state of a run is its
variables, the epoch and the step: one file in `checkpoints/` holds them all, the random generators' too, and the best
epoch's weights. Resuming restores it and skips the batches that were seen. A folder that holds another run is refused.

Under a distribution strategy the same holds: variables are equal in every replica, so that the chief's file is
everybody's. Only the chief writes; what one worker decides by its clock or a signal, all do at the same step.

A run's folder: `checkpoints/` (states), `best.npz` (weights of the best epoch, in the order of `model.weights`),
`metrics.json`, `tensorboard/`. One run at a time uses it.

It doesn't build models, read data or export; `compile_model` is in a file of its own.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfhalf import checkpoint, distribution, reporting
from tfhalf.compilation import compile_model, spread_random_states
from tfhalf.optimizer import REMEDY, LossScaleOptimizer, parts

__all__ = [
    "DivergedError",
    "InterruptedRun",
    "Progress",
    "StopWhenStalled",
    "TrainingError",
    "compile_model",
    "fit",
    "load_weights",
    "settings_of",
    "write_results",
]

# Workers ask each other about stopping and saving this often: a network round trip each.
_AGREE_EVERY_STEPS = 10
_BEST = "best:"
_INTERRUPTED = "interrupted; the state is saved, the same command goes on from here"


class TrainingError(Exception):
    """A run can't start or go on; the message says what was seen and what to do."""


class DivergedError(TrainingError):
    """The loss or the weights became non-finite, or every step was skipped: the run itself is what failed."""


class InterruptedRun(Exception):  # noqa: N818 - it is no error
    """Ctrl-C or SIGTERM: the state is saved, the same call goes on from there."""


@dataclasses.dataclass
class Progress:
    """Where a run is: what a checkpoint holds beside the variables.

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


def fit(
    model: keras.Model,
    train_data: Callable[[int], tf.data.Dataset],
    validation_data: tf.data.Dataset,
    *,
    workdir: str | os.PathLike,
    epochs: int,
    steps_per_epoch: int,
    monitor: str | None,
    config: dict[str, Any],
    keep: int = 2,
    checkpoint_seconds: float = 300.0,
    show: Callable[[keras.Model], dict[str, bytes]] | None = None,
    report: Callable[[str], None] = lambda line: None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> Progress:
    """Trains, or goes on where this folder's run stopped, and leaves the best epoch's weights in the model.

    Args:
        model: compiled by `compile_model`.
        train_data: epoch (from 0) to its global batches, at least `steps_per_epoch`; must give the same ones each time.
            On several replicas each batch must have a multiple of their number of examples.
        validation_data: global batches that the epochs are compared on.
        workdir: the run's folder; made if missing. Several workers must see the same one.
        epochs: number of epochs in all.
        steps_per_epoch: batches of one epoch.
        monitor: the metric of validation that is best when highest, as "val_accuracy"; best when lowest where it
            ends in "loss". None: the last epoch is taken, where validation is too small to choose by.
        config: plain JSON values that make this run what it is. A folder with another config is refused.
        keep: checkpoints that stay, at least 1.
        checkpoint_seconds: time between checkpoints within an epoch; there is one after each epoch anyway.
        show: gives what `shown` of `write_results` is, after each epoch, for TensorBoard.
        report: is called with each line that a person should read, in the chief only.
        callbacks: more of Keras' callbacks, called before those that save and stop.

    Returns:
        The run's `Progress`.

    Raises:
        TrainingError: the folder can't be used.
        DivergedError: the loss became non-finite, or every step was skipped.
        distribution.DistributionError: workers were started with different settings.
        InterruptedRun: Ctrl-C or SIGTERM; the state is saved.
    """
    if any(part.use_ema for part in parts(model.optimizer)):
        raise TrainingError(
            "use_ema overwrites the weights at each end of Keras' fit, which is once an epoch here: leave it out"
        )
    folder = Path(workdir)
    workers = distribution.Workers(model.distribute_strategy)
    report = report if workers.is_chief else lambda line: None
    try:
        with checkpoint.locked(folder) if workers.is_chief else contextlib.nullcontext():
            run = _Run(model, folder, config, keep, report, workers)
            progress = run.progress
            if progress.epoch or progress.step:
                report(f"resuming {folder} after epoch {progress.epoch}, step {progress.step}")
            board = contextlib.nullcontext()
            if workers.is_chief:
                board = reporting.TensorBoard(folder / "tensorboard", progress, config, steps_per_epoch, show)
            with _stop_signals() as stop, board:
                for epoch in range(progress.epoch, epochs):
                    # fit once per epoch: each epoch has its own data, and a resumed one fewer steps.
                    first = progress.step
                    watch = _Watch(first, report)
                    saver = _Saver(run, monitor, watch, stop, checkpoint_seconds)
                    called = [*callbacks, watch, saver]
                    if workers.is_chief:
                        progress_bar = reporting.ProgressBar(steps_per_epoch, first, epochs, report)
                        called = [progress_bar, *callbacks, watch, board, saver]
                    with watch.explained():
                        model.fit(
                            distribution.shard(distribution.even(train_data(epoch).skip(first), workers.num_replicas)),
                            initial_epoch=epoch,
                            epochs=epoch + 1,
                            steps_per_epoch=steps_per_epoch - first,
                            validation_data=distribution.shard(validation_data),
                            shuffle=False,
                            verbose=0,
                            callbacks=called,
                        )
            if not progress.best_epoch:
                raise DivergedError(f"{monitor} wasn't finite in any epoch; compare with a float32 run")
            run.finish()
            model.set_weights(list(run.best.values()))
            return progress
    except checkpoint.CheckpointError as error:
        raise TrainingError(str(error)) from error


def load_weights(model: keras.Model, path: str | os.PathLike) -> None:
    """Puts a checkpoint's weights, as they were at that step, into a model; nothing else of its run.

    Args:
        model: compiled as the run's was.
        path: a file in a run's `checkpoints/`.

    Raises:
        TrainingError: the file is damaged, isn't there, or is of another model.
    """
    try:
        arrays, about = checkpoint.read(Path(path))
        checkpoint.require_same(Path(path), about, about | {"model": checkpoint.describe(model)})
    except checkpoint.CheckpointError as error:
        raise TrainingError(str(error)) from error
    values = [array for name, array in arrays.items() if not name.startswith(_BEST)]
    weights = {id(weight) for weight in model.weights}
    pairs = [pair for pair in zip(_state(model).values(), values, strict=False) if id(pair[0]) in weights]
    if len(pairs) != len(weights) or any(tuple(variable.shape) != value.shape for variable, value in pairs):
        raise TrainingError(f"{path} holds another model's variables; build the model as the run did")
    for variable, value in pairs:
        variable.assign(value)


def settings_of(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """Returns the `config` of the run that a folder's newest checkpoint is of; None where there is none.

    Raises:
        TrainingError: there are checkpoints, and all are damaged.
    """
    try:
        states = checkpoint.Checkpoints(Path(workdir) / "checkpoints", 1, lambda line: None, is_writer=False)
        found = states.newest()
    except checkpoint.CheckpointError as error:
        raise TrainingError(str(error)) from error
    return found[1]["config"] if found else None


def write_results(
    workdir: str | os.PathLike,
    progress: Progress,
    config: dict[str, Any],
    results: dict[str, Any],
    shown: dict[str, bytes | str],
    step: int,
) -> None:
    """Adds what was measured after training to `metrics.json`, and what is to be seen of it to TensorBoard.

    Args:
        workdir: the run's folder.
        progress: as `fit` returned it.
        config: as given to `fit`.
        results: JSON values, added to `metrics.json` as "results".
        shown: PNG pictures and WAV sounds (bytes) and texts in Markdown (str), by tag.
        step: training steps taken in all.
    """
    folder = Path(workdir)
    _write_metrics(folder, progress, config, results)
    with tf.summary.create_file_writer(str(folder / "tensorboard" / "validation")).as_default(step):
        reporting.write_shown(shown)


class StopWhenStalled(keras.callbacks.Callback):
    """Ends `fit` once its LossScaleOptimizer is stalled, where XLA dropped the optimizer's own error.

    Args:
        every: batches between two looks, at least 1; a look waits for the device. Default 50.

    Raises:
        RuntimeError: out of `fit`, when the last `max_consecutive_skips` batches were all skipped.
    """

    def __init__(self, every: int = 50):
        super().__init__()
        self._every = every
        self._last = 0

    def on_epoch_begin(self, epoch, logs=None):
        self._last = -1

    def on_train_batch_end(self, batch, logs=None):
        if batch - self._last >= self._every:  # `steps_per_execution` leaves batches out
            self._last = batch
            self._look(logs)

    def on_epoch_end(self, epoch, logs=None):
        self._look(logs)

    def _look(self, logs) -> None:
        optimizer = self.model.optimizer
        if isinstance(optimizer, LossScaleOptimizer) and optimizer.stalled:
            loss = float((logs or {}).get("loss", np.nan))
            raise RuntimeError(
                f"LossScaleOptimizer: every batch was skipped, {optimizer.consecutive_skips} in a row; the loss "
                f"(the epoch's mean) is {loss:g}; the loss scale is {optimizer.scale:g}; {REMEDY}"
            )


class _Watch(keras.callbacks.Callback):
    """Stops a run that can't become good again, says why, and lets no such state be saved."""

    def __init__(self, first: int, report: Callable[[str], None]):
        super().__init__()
        self._first, self._report = first, report
        self._step = first

    def on_train_batch_end(self, batch, logs=None):
        # The logged loss is the epoch's running mean: once NaN it stays NaN, so that no batch is missed.
        self._step = self._first + batch + 1
        if batch % reporting.LOG_EVERY_STEPS == 0:
            stalled = isinstance(self.model.optimizer, LossScaleOptimizer) and self.model.optimizer.stalled
            if stalled or not np.isfinite(reporting.floats(logs).get("loss", 0.0)):
                self.check(f"step {self._step}", logs)

    def on_epoch_end(self, epoch, logs=None):
        self.check(f"the end of epoch {epoch + 1}", logs)
        if not np.isfinite(reporting.floats(logs).get("loss", 0.0)):
            skipped = self.model.optimizer.steps_skipped
            self._report(f"the loss of a batch wasn't finite; {skipped} steps skipped so far, all weights are finite")

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turns the optimizer's own error, out of the graph, into ours."""
        try:
            yield
        except tf.errors.InvalidArgumentError as error:
            said = re.search(r"assertion failed: \[(LossScaleOptimizer: .*)\]", str(error))
            if not said:
                raise
            reason = said[1].replace("] [", " ").replace(" ;", ";")
            raise DivergedError(f"training stopped at step {self._step + 1}: {reason}") from error

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
        raise DivergedError(f"training stopped at {when}: {stalled}loss is {loss:g}; {state}{scale}; {REMEDY}")


class _Run:
    """A run's state, in memory and on disk: the model's variables, the progress, the best epoch's weights."""

    def __init__(self, model, folder: Path, config: dict, keep: int, report, workers: distribution.Workers):
        self.folder, self.workers = folder, workers
        self.progress, self.best = Progress(), {}
        self._model, self._config = model, config
        self._checkpoints = checkpoint.Checkpoints(folder / "checkpoints", keep, report, workers.is_chief)
        if not model.optimizer.built:
            with model.distribute_strategy.scope():
                model.optimizer.build(model.trainable_variables)
        self._about = {"config": config, "model": checkpoint.describe(model)}  # now: training changes learning rates
        failed = None
        try:
            self._restore()
        except checkpoint.CheckpointError as error:
            failed = error
        if workers.any(failed is not None)[0]:
            raise failed or checkpoint.CheckpointError("another worker can't use its checkpoint, and says why")
        place = {"epoch": self.progress.epoch, "step": self.progress.step}
        workers.check_same(config | place, "the settings and the checkpoint")

    def _restore(self) -> None:
        """Reads the newest checkpoint into the model; nothing is assigned unless all of it fits."""
        found = self._checkpoints.newest()
        if not found:
            return
        arrays, about = found
        checkpoint.require_same(self.folder, about, self._about)
        self.best = {name: array for name, array in arrays.items() if name.startswith(_BEST)}
        values = [array for name, array in arrays.items() if name not in self.best]
        variables = list(_state(self._model).values())
        shapes, others = [tuple(variable.shape) for variable in variables], [value.shape for value in values]
        if shapes != others:  # of what no name and no setting shows, as random states
            raise checkpoint.CheckpointError(
                f"workdir {self.folder} holds another model's variables; choose another one"
            )
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        spread_random_states(self._model)  # the file has the first replica's
        self.progress = Progress(**about["progress"])

    def note_best(self) -> None:
        """Keeps the weights as they are now as the best epoch's."""
        weights = {f"{index:05d}:{weight.path}": weight for index, weight in enumerate(self._model.weights)}
        self.best = _values(weights, _BEST)
        self._write_best()

    def save(self) -> None:
        """Writes a checkpoint and `metrics.json`."""
        if self.workers.is_chief:
            progress = self.progress
            about = self._about | {"progress": dataclasses.asdict(progress)}
            self._checkpoints.save(progress.epoch, progress.step, _values(_state(self._model)) | self.best, about)
            self._write_metrics()

    def finish(self) -> None:
        """Writes again what people read: a kill may have come between the last checkpoint and these files."""
        self._write_best()
        self._write_metrics()

    def _write_best(self) -> None:
        if self.workers.is_chief:
            weights = {name.removeprefix(_BEST): array for name, array in self.best.items()}
            with checkpoint.guard_disk(self.folder):
                checkpoint.replace(self.folder / "best.npz", lambda file: np.savez(file, **weights))

    def _write_metrics(self) -> None:
        if self.workers.is_chief:
            with checkpoint.guard_disk(self.folder):
                _write_metrics(self.folder, self.progress, self._config, {})


class _Saver(keras.callbacks.Callback):
    """Saves after each epoch and by the clock within one, and leaves `fit` between two batches when asked to stop."""

    def __init__(self, run: _Run, monitor: str | None, watch: _Watch, stop: threading.Event, seconds: float):
        super().__init__()
        self._run, self._monitor, self._watch, self._stop, self._seconds = run, monitor, watch, stop, seconds
        self._sign = -1.0 if monitor and monitor.endswith("loss") else 1.0
        self._first = run.progress.step

    def on_epoch_begin(self, epoch, logs=None):
        self._start = self._saved = time.monotonic()

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 == self.params["steps"]:  # the end of the epoch saves by itself
            return
        if self._run.workers.several and batch % _AGREE_EVERY_STEPS:
            return
        due = time.monotonic() - self._saved >= self._seconds
        stop, due = self._run.workers.any(self._stop.is_set(), due)
        if stop or due:
            step = self._first + batch + 1
            self._watch.check(f"step {step}", logs)
            self._run.progress.step = step
            self._run.save()
            self._run.progress.step = self._first
            self._saved = time.monotonic()
        if stop:
            raise InterruptedRun(_INTERRUPTED)

    def on_epoch_end(self, epoch, logs=None):
        logs = reporting.floats(logs)
        if self._monitor is not None and self._monitor not in logs:
            raise TrainingError(f"monitor {self._monitor!r} isn't among the metrics: {', '.join(logs)}")
        progress = self._run.progress
        value = None if self._monitor is None else logs[self._monitor]
        if value is None or (np.isfinite(value) and self._is_best(value)):
            progress.best, progress.best_epoch = value, epoch + 1
            self._run.note_best()
        seconds = round(time.monotonic() - self._start, 3)
        progress.history.append(
            {"epoch": epoch + 1, "seconds": seconds} | logs | reporting.optimizer_state(self.model.optimizer)
        )
        progress.epoch, progress.step = epoch + 1, 0
        self._run.save()
        if self._run.workers.any(self._stop.is_set())[0]:
            raise InterruptedRun(_INTERRUPTED)

    def _is_best(self, value: float) -> bool:
        best = self._run.progress.best
        return best is None or self._sign * value > self._sign * best


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


def _values(variables: dict[str, keras.Variable], prefix: str = "") -> dict[str, np.ndarray]:
    """The variables' values, copied: a view would follow the training."""
    return {prefix + name: np.array(keras.ops.convert_to_numpy(v)) for name, v in variables.items()}


def _write_metrics(folder: Path, progress: Progress, config: dict[str, Any], results: dict[str, Any]) -> None:
    value = {"config": config, "best_epoch": progress.best_epoch, "epochs": progress.history, "results": results}
    checkpoint.replace(folder / "metrics.json", lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))
