"""What `tfhalf.Monitor` puts on a model: the rings of records in variables, and the steps around Keras' own.

A replica writes into rings of its own, in the graph, and under a condition: where nothing is due and no step was
skipped, nothing is done. A second pass is made beside the step (`tfhalf.taps`), not in it: the step is optimized as if
it were alone, and its numbers are the same bits.
"""

import collections
import functools
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from tfhalf import distribution, exponents, precision, taps
from tfhalf.compilation import random_states
from tfhalf.optimizer import LossScaleOptimizer, parts

KINDS = ("activations", "activation_gradients", "weights", "weight_gradients", "updates")
STATISTICS_KEPT = 16
_SKIPS_KEPT, _EVALUATIONS_KEPT = 100, 8
# The multiplier of a linear congruential generator of 2^64 (Knuth, The Art of Computer Programming 2, section 3.3.4).
_ODD = 6364136223846793005
ELSEWHERE = "(elsewhere)"


def fingerprint(data) -> str:
    """Returns what tells a batch from others: the same as in a skipped step's record, in 16 hexadecimal digits.

    Args:
        data: a batch as `fit` gets it: arrays or tensors of numbers, in the same structure and of the same dtypes.
    """
    return f"{int(_fingerprint(keras.tree.map_structure(tf.convert_to_tensor, data))) % 2**64:016x}"


def _fingerprint(data) -> tf.Tensor:
    """int64 scalar: every number's bits times an odd number of its place, summed, which wraps around in the same way
    everywhere."""
    total = tf.zeros([], tf.int64)
    for tensor in keras.tree.flatten(data):
        if not isinstance(tensor, tf.Tensor) or tensor.dtype == tf.string:
            continue
        bits = exponents.bits_of(tensor) if tensor.dtype.is_floating else tensor
        bits = tf.reshape(tf.cast(bits, tf.int64), [-1])
        places = 2 * tf.range(tf.size(bits, out_type=tf.int64)) + 1
        total = total * 31 + tf.reduce_sum((bits + 1) * (places * _ODD))
    return total


class _Ring:
    """The last few records, in variables; every replica has its own."""

    def __init__(self, capacity: int, **entries: tuple[list[int], tf.DType]):
        self._capacity = capacity
        self._num_read: list[int] = []
        self._count = _variable([], tf.int64)
        self._entries = {name: _variable([capacity, *shape], dtype) for name, (shape, dtype) in entries.items()}

    def put(self, **values) -> None:
        """Writes entries of the record under way."""
        slot = tf.reshape(tf.convert_to_tensor(self._count) % self._capacity, [1, 1])
        for name, value in values.items():
            entry = self._entries[name]
            entry.assign(tf.tensor_scatter_nd_update(tf.convert_to_tensor(entry), slot, value[tf.newaxis]))

    def close(self) -> None:
        """Ends the record under way."""
        self._count.assign_add(1)

    def read(self, strategy: tf.distribute.Strategy) -> tuple[list[list[dict[str, np.ndarray]]], int]:
        """Returns each replica's new records, and how many of one were overwritten unread."""
        counts = [int(count) for count in strategy.experimental_local_results(self._count)]
        before, self._num_read = self._num_read or [0] * len(counts), counts
        new = [range(first, last) for first, last in zip(before, counts, strict=True)]
        lost = max(max(0, len(some) - self._capacity) for some in new)
        if not any(new):
            return [[] for _ in new], 0
        entries = {
            name: [np.array(value) for value in strategy.experimental_local_results(entry)]
            for name, entry in self._entries.items()
        }
        records = [
            [
                {name: values[replica][index % self._capacity] for name, values in entries.items()}
                for index in some[-self._capacity :]
            ]
            for replica, some in enumerate(new)
        ]
        return records, lost


class Recorder:
    """What is put on a model: the rings, and the steps around Keras' own."""

    def __init__(self, model: keras.Model, every: int):
        _refuse(model)
        self._model, self._every, self._strategy = model, every, model.distribute_strategy
        self._optimizer = model.optimizer
        layers = {"": model} | precision.layers_by_path(model)
        self.workers = distribution.Workers(self._strategy)
        self._dtypes = {path: layer.compute_dtype for path, layer in layers.items()}
        self._places: dict[str, list[taps.Place]] = {}
        self._num_places = taps.MOST_PLACES * (len(layers) + 1)
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        self._scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        rows, places, about = [len(layers), exponents.WIDTH], [self._num_places, 3], ([3], tf.float64)
        with self._strategy.scope():
            self._step = _variable([], tf.int64, _batches_seen(model.optimizer))
            self._batch, self._finite = _variable([], tf.int64), _variable([], tf.bool, True)
            self._statistics = _Ring(
                STATISTICS_KEPT, passes=([4, *rows], tf.float32), updates=(rows, tf.float32), about=about
            )
            self._skips = _Ring(_SKIPS_KEPT, places=(places, tf.float32), about=about, batch=([], tf.int64))
            self._evaluations = _Ring(_EVALUATIONS_KEPT, places=(places, tf.float32), about=about)
            self._before = {
                path: [_variable(variable.shape, tf.float32) for variable in some]
                for path, some in taps.own_weights(model).items()
            }
        self._own = {name: model.__dict__.get(name) for name in ("train_step", "test_step")}
        model.train_step = self._train_step = self._around_train_step()
        if type(model).test_step is keras.Model.test_step:  # another one may not say what the loss is
            model.test_step = self._around_test_step()
        model.train_function = model.test_function = None

    def is_on(self, model: keras.Model) -> bool:
        """Whether this is what is on a model, as it is compiled now."""
        same = model is self._model and model.optimizer is self._optimizer
        return same and model.__dict__.get("train_step") is self._train_step

    def take_off(self) -> None:
        """Puts back the steps that the model had."""
        if self._model.__dict__.get("train_step") is not self._train_step:  # tfhalf.compile_model did
            return
        for name, own in self._own.items():
            self._model.__dict__.pop(name, None)
            if own is not None:
                self._model.__dict__[name] = own
        self._model.train_function = self._model.test_function = None

    def step(self) -> int:
        """Number of batches trained on."""
        return int(self._strategy.experimental_local_results(self._step)[0])

    def begin_evaluation(self) -> None:
        """Lets the next batch be the first one of an evaluation."""
        for variable, value in ((self._batch, 0), (self._finite, True)):
            for local in self._strategy.experimental_local_results(variable):
                local.assign(value)

    def read(self) -> tuple[list[dict], list[dict], int]:
        """Returns the new records of statistics and of skipped steps, and how many were overwritten unread."""
        statistics, lost = self._statistics.read(self._strategy)
        skips, more = self._skips.read(self._strategy)
        # What is due, and what is skipped, is so in all replicas.
        found = [record for replicas in zip(*skips, strict=True) for record in self._skipped(replicas)]
        return [self._measured(replicas) for replicas in zip(*statistics, strict=True)], found, lost + more

    def read_evaluations(self) -> list[dict]:
        """Returns the records of batches of an evaluation whose forward pass wasn't finite."""
        found = []
        for index, records in enumerate(self._evaluations.read(self._strategy)[0]):
            for record in records:
                step, batch, _ = (int(value) for value in record["about"])
                about = {"step": step, "batch": batch, "replica": self.workers.first_replica + index}
                found.append({"kind": "evaluation"} | about | _first_culprit(record["places"], self._places["test"]))
        return sorted(found, key=lambda record: record["batch"])

    def _around_train_step(self):
        own, optimizer = self._model.train_step, self._model.optimizer

        @functools.wraps(own)
        def train_step(data):
            scale = tf.identity(optimizer.dynamic_scale.value) if self._scaled else tf.ones([])
            states = [(state, tf.identity(state.value)) for state in random_states(self._model)]
            skipped = _skips_so_far(optimizer)
            due = tf.equal(tf.convert_to_tensor(self._step) % self._every, 0)
            self._step.assign_add(1)
            tf.cond(due, lambda: self._measure(data, scale), lambda: None)
            logs = own(data)
            tf.cond(due, self._measure_updates, lambda: None)
            if self._scaled:
                was_skipped = tf.greater(_skips_so_far(optimizer), skipped)
                tf.cond(was_skipped, lambda: self._find_culprit(data, scale, states), lambda: None)
            return logs

        return train_step

    def _measure(self, data, scale) -> None:
        """Records a pass of the step that is to come, and keeps the weights for `_measure_updates`."""
        made = taps.replay(self._model, data, scale=scale)
        activations, gradients = collections.defaultdict(list), collections.defaultdict(list)
        for event, some in zip(made.events, made.gradients, strict=True):
            if event.kind == "leave":
                activations[event.layer] += event.tensors
                gradients[event.layer] += some
        weights = {path: [tf.identity(variable.value) for variable in some] for path, some in made.weights.items()}
        groups = (activations, gradients, weights, made.weight_gradients)
        self._statistics.put(passes=tf.stack([self._rows(group) for group in groups]))
        self._statistics.put(about=_stack(self._step, scale, made.loss))
        for path, kept in self._before.items():
            for variable, value in zip(kept, weights[path], strict=True):
                variable.assign(tf.cast(value, tf.float32))

    def _measure_updates(self) -> None:
        updates = {}
        for path, some in taps.own_weights(self._model).items():
            pairs = zip(some, self._before[path], strict=True)
            updates[path] = [tf.cast(new.value, tf.float32) - tf.convert_to_tensor(old) for new, old in pairs]
        self._statistics.put(updates=self._rows(updates))
        self._statistics.close()

    def _rows(self, groups: dict[str, list[tf.Tensor]]) -> tf.Tensor:
        return tf.stack([exponents.measure(groups.get(path, [])) for path in self._dtypes])

    def _find_culprit(self, data, scale, states) -> None:
        """Records a pass of the step that was skipped."""
        made = taps.replay(self._model, data, scale=scale, states=states)
        places = self._extremes("train", taps.places(data, made))
        self._skips.put(places=places, about=_stack(self._step, scale, made.loss), batch=_fingerprint(data))
        self._skips.close()

    def _around_test_step(self):
        own = self._model.test_step

        @functools.wraps(own)
        def test_step(data):
            batch = tf.identity(tf.convert_to_tensor(self._batch))
            logs = own(data)
            finite = tf.reduce_all(tf.math.is_finite(tf.cast(logs["loss"], tf.float32)))
            first_bad = tf.logical_and(tf.convert_to_tensor(self._finite), tf.logical_not(finite))
            due = tf.logical_or(tf.equal(batch % self._every, 0), first_bad)
            self._batch.assign_add(1)
            self._finite.assign(finite)
            tf.cond(due, lambda: self._watch_forward(data, batch), lambda: None)
            return logs

        return test_step

    def _watch_forward(self, data, batch) -> None:
        places = self._extremes("test", taps.places(data, taps.forward(self._model, data)))

        def record():
            self._evaluations.put(places=places, about=_stack(self._step, batch, 0.0))
            self._evaluations.close()

        tf.cond(tf.reduce_any(places[:, 0] > 0.0), record, lambda: None)

    def _extremes(self, kind: str, places: list[taps.Place]) -> tf.Tensor:
        """Measures places in short, padded to float32 `[num_places, 3]`; notes which they are, for the reading."""
        self._places[kind] = [taps.Place(place.layer, place.phase, place.what, []) for place in places]
        rows = tf.stack([exponents.extremes(place.tensors) for place in places])
        return tf.pad(rows, [[0, self._num_places - len(places)], [0, 0]])

    def _measured(self, replicas: Sequence[dict[str, np.ndarray]]) -> dict:
        rows = [np.concatenate([replica["passes"], replica["updates"][np.newaxis]]) for replica in replicas]
        whole = exponents.merged(np.stack(rows))
        for kind in ("weights", "updates"):  # the same in every replica; of the others each has a part
            whole[KINDS.index(kind)] = rows[0][KINDS.index(kind)]
        step, scale, _ = (float(value) for value in replicas[0]["about"])
        loss = self._strategy.num_replicas_in_sync * float(np.mean([replica["about"][2] for replica in replicas]))
        layers = {
            path or taps.MODEL: {
                kind: exponents.Statistics.of(whole[place, index], dtype)
                for place, kind in enumerate(KINDS)
                if whole[place, index, 0]
            }
            for index, (path, dtype) in enumerate(self._dtypes.items())
        }
        layers = {path: kinds for path, kinds in layers.items() if kinds}
        return {"kind": "statistics", "step": int(step), "scale": scale, "loss": loss, "layers": layers}

    def _skipped(self, replicas: Sequence[dict[str, np.ndarray]]) -> list[dict]:
        """The records of one skipped step: of each replica whose pass isn't finite, or one that says there is none."""
        found = []
        for index, replica in enumerate(replicas):
            step, scale, loss = (float(value) for value in replica["about"])
            loss *= self._strategy.num_replicas_in_sync  # Keras divides each replica's by it
            about = {"kind": "skipped", "step": int(step), "replica": self.workers.first_replica + index}
            about |= {"scale": scale, "loss": loss, "loss_is_finite": bool(np.isfinite(loss))}
            about |= {"batch": f"{int(replica['batch']) % 2**64:016x}"}
            culprit = _first_culprit(replica["places"], self._places["train"])
            if culprit:
                found.append(about | culprit)
        if found:
            return found
        several = self._strategy.num_replicas_in_sync > 1
        words = "not in a part of the batch that this process has: in the sum, or with another worker"
        unknown = {"layer": ELSEWHERE, "phase": "backward", "what": words if several else "finite when made again"}
        return [about | {"replica": None} | unknown | {"range_before": None}]


def _first_culprit(rows: np.ndarray, places: list[taps.Place]) -> dict | None:
    bad = np.flatnonzero(rows[: len(places), 0])
    if not bad.size:
        return None
    place, before = places[bad[0]], None
    if bad[0] and places[bad[0] - 1].phase == place.phase:
        _, largest, smallest = (float(value) for value in rows[bad[0] - 1])
        before = [smallest, largest] if largest else [0.0, 0.0]
    return {"layer": place.layer or taps.MODEL, "phase": place.phase, "what": place.what, "range_before": before}


def _refuse(model: keras.Model) -> None:
    if type(model).train_step is not keras.Model.train_step:
        raise ValueError(
            f"Monitor: model {model.name!r} has a train_step of its own, whose pass can't be made a second time; write "
            "it as a loss, or compute_loss, of a Keras model"
        )
    layers = precision.layers_by_path(model).items()
    synchronized = [path for path, layer in layers if getattr(layer, "synchronized", False)]
    if synchronized and model.distribute_strategy.num_replicas_in_sync > 1:
        raise ValueError(
            f"Monitor: {synchronized[0]} synchronizes its statistics over the replicas, so that its pass can't be made "
            "a second time beside the step; build it with synchronized=False"
        )


def _variable(shape, dtype: tf.DType, value=0) -> tf.Variable:
    """One that every replica has for itself."""
    synchronization, aggregation = tf.VariableSynchronization.ON_READ, tf.VariableAggregation.NONE
    initial = tf.fill(shape, tf.cast(value, dtype))
    return tf.Variable(initial, trainable=False, synchronization=synchronization, aggregation=aggregation)


def _batches_seen(optimizer: keras.optimizers.Optimizer) -> int:
    if isinstance(optimizer, LossScaleOptimizer):
        return optimizer.batches_seen
    return int(keras.ops.convert_to_numpy(parts(optimizer)[0].iterations))


def _skips_so_far(optimizer: keras.optimizers.Optimizer) -> tf.Tensor:
    """A number that grows when a step is skipped."""
    if isinstance(optimizer, LossScaleOptimizer):
        return tf.identity(optimizer.steps_skipped)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return -tf.identity(optimizer.dynamic_scale.value)  # Keras' counts nothing, but halves its scale
    return tf.zeros([])


def _stack(*values) -> tf.Tensor:
    return tf.stack([tf.cast(tf.convert_to_tensor(value), tf.float64) for value in values])
