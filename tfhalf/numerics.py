"""What half precision does to a model while it trains: statistics, and the first culprit of every skipped step.

`Monitor` is a Keras callback. It puts its own part beside the training step, in the graph and under a condition:

* before every `every`-th step, the step's forward and backward pass is made a second time, watched (`tfhalf.taps`), and
  measured (`tfhalf.exponents`);
* after a skipped step, that step's pass is made again, from the random states and at the loss scale that it had;
* in evaluation, where loss scaling sees nothing, the first batch, every `every`-th, and the first whose loss isn't
  finite are watched.

What is found goes into variables, a ring of the last few records, which are read every hundred steps or so. The step
itself is left as it is: with the monitor the weights are the same, bit by bit.

Source: Micikevicius et al. 2018, section 3.2 and figure 3, https://arxiv.org/abs/1710.03740
"""

import collections
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import keras

from tfhalf import board, exponents, reporting
from tfhalf.recorder import STATISTICS_KEPT, Recorder

_READ_EVERY_STEPS = 100
# Of the time; the pictures take a second.
_DRAWING_SHARE = 0.01


class Monitor(keras.callbacks.Callback):
    """Shows in TensorBoard what half precision does to each layer, and tells where skipped steps began.

    For `model.fit`, on one device and under `MirroredStrategy` and `MultiWorkerMirroredStrategy`, with the training
    step of Keras and of `tfhalf.compile_model`. Steps are skipped by a loss-scaling optimizer; with another one there
    are statistics only. It costs a forward and backward pass more at every `every`-th step, and one copy of the weights
    in memory.

    Args:
        log_dir: folder of `numerics.jsonl` and TensorBoard's events; made if missing, added to if not.
        every: steps from one measurement to the next, at least 1. Default 50.
        report: is called with each line that a person should read, at the end of each epoch. Default: a warning of the
            logger "tfhalf".

    Raises:
        ValueError: `every` is below 1; or, out of `fit`, the model has a `train_step` of its own, or a synchronized
            BatchNormalization on several replicas, whose pass can't be made a second time.

    Example:

    >>> import tempfile
    >>> import numpy as np
    >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(2)])
    >>> model.compile("sgd", "mse")
    >>> monitor = Monitor(tempfile.mkdtemp(), every=10)
    >>> history = model.fit(np.ones([8, 4]), np.ones([8, 2]), callbacks=[monitor], verbose=0)
    >>> sorted(path.suffix for path in monitor.log_dir.iterdir())
    ['.jsonl', '.v2']

    Source: Micikevicius et al. 2018, section 3.2, https://arxiv.org/abs/1710.03740
    """

    def __init__(self, log_dir: str | os.PathLike, every: int = 50, report: Callable[[str], None] | None = None):
        super().__init__()
        if every < 1 or every != int(every):
            raise ValueError(f"Monitor: every must be at least 1, and whole; got {every}")
        self.log_dir, self.every = Path(log_dir), int(every)
        self._report = report or logging.getLogger("tfhalf").warning
        self._recorder: Recorder | None = None
        self._file: Path | None = None
        self._unread, self._seconds_drawn, self._began = 0, 0.0, time.monotonic()
        self._skips: list[dict] = []
        self._first_step = 0
        self._to_draw: dict[str, dict[str, exponents.Statistics]] = {}

    def set_model(self, model):
        super().set_model(model)
        if self._recorder and self._recorder.is_on(model):
            return
        self.close()
        self._recorder = Recorder(model, self.every)
        self.log_dir.mkdir(parents=True, exist_ok=True)
        worker = self._recorder.workers.index
        self._file = self.log_dir / (f"numerics-{worker}.jsonl" if worker else "numerics.jsonl")
        self._board = None if worker else board.Board(self.log_dir)

    def close(self) -> None:
        """Reads and reports what is left, and takes off what was put on the model.

        To be called where `fit` ended with an error, of which callbacks don't hear. A model that isn't closed, nor
        compiled again, goes on recording in the next `fit`.
        """
        if self._recorder:
            self._read()
            self._tell()
            self._draw()
            self._recorder.take_off()
            self._recorder = None

    def on_epoch_begin(self, epoch, logs=None):
        self._first_step = self._recorder.step()

    def on_train_batch_end(self, batch, logs=None):
        self._unread += self.model.steps_per_execution
        if self._unread >= min(_READ_EVERY_STEPS, STATISTICS_KEPT * self.every):
            self._read()

    def on_epoch_end(self, epoch, logs=None):
        self._read()
        if self._seconds_drawn <= _DRAWING_SHARE * (time.monotonic() - self._began):
            self._draw()
        self._tell()

    def on_test_begin(self, logs=None):
        self._recorder.begin_evaluation()

    def on_test_end(self, logs=None):
        records = self._recorder.read_evaluations()
        self._write(records)
        if records:
            first, num_batches = records[0], len({record["batch"] for record in records})
            self._report(
                f"evaluation: {first['what']} of {first['layer']} isn't finite in {num_batches} of the batches that "
                f"were looked at, batch {first['batch']} first; loss scaling can't see it"
            )

    def _tell(self) -> None:
        for line in _in_words(
            self._skips, self._recorder.step() - self._first_step, self._recorder.workers.num_replicas > 1
        ):
            self._report(line)
        self._skips = []

    def _draw(self) -> None:
        if self._board and self._to_draw:
            began = time.monotonic()
            self._board.draw(self._to_draw, self._recorder.step())
            self._seconds_drawn += time.monotonic() - began
            self._to_draw = {}

    def _read(self) -> None:
        self._unread = 0
        statistics, skips, lost = self._recorder.read()
        self._skips += skips
        self._write(statistics + skips)
        if lost:
            self._report(f"{lost} records were overwritten before they were read")
        if statistics:
            self._to_draw = statistics[-1]["layers"]
        if self._board:
            self._board.write(statistics, skips)

    def _write(self, records: list[dict]) -> None:
        if not records or self._file is None:
            return
        try:
            with open(self._file, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(reporting.plain(record), allow_nan=False) + "\n" for record in records)
        except OSError as error:  # a full disk shall not end the training
            self._report(f"{self._file} can't be written: {error.strerror}; the records from here on are lost")
            self._file = None


def _in_words(skips: list[dict], steps: int, several: bool) -> list[str]:
    """Says where an epoch's skipped steps began."""
    if not skips:
        return []
    by_place = collections.defaultdict(list)
    for skip in skips:
        by_place[skip["layer"], skip["phase"], skip["what"]].append(skip)
    skipped = len({skip["step"] for skip in skips})
    parts = []
    for (layer, phase, what), some in sorted(by_place.items(), key=lambda item: -len(item[1])):
        scales = sorted({skip["scale"] for skip in some})
        scale = f"scale {scales[0]:g}" if len(scales) == 1 else f"scales {scales[0]:g} to {scales[-1]:g}"
        replicas = sorted({skip["replica"] for skip in some if skip["replica"] is not None})
        where = f", replica {', '.join(map(str, replicas))}" if several and replicas else ""
        parts.append((len({skip["step"] for skip in some}), f"in {layer} ({phase}: {what}), {scale}{where}"))
    lead = f"{skipped:,} of {steps:,} steps skipped; "
    if len(parts) == 1:
        return [f"{lead}{'each' if skipped > 1 else 'it'} began {parts[0][1]}"]
    return [lead + "; ".join(f"{count} began {words}" for count, words in parts)]
