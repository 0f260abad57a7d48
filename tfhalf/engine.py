"""One loaded version of a model: checked, its weights cast once, the fastest sound dtype chosen by measurement, warm.

Loading is in this order, and whatever fails refuses the version: hashes and operations (`tfhalf.bundle`), weights to
float32 (`tfhalf.cast_once`), TensorFlow's loader, the choice of the dtype, the bundle's warm-up requests.

The choice. A bundle has the same function in several dtypes: `serving_default` as the model was trained,
`serving_float32`, `serving_bfloat16`. Each runs on the bundle's samples, in turn, so that what else the machine does
falls on all of them, one row and all rows at a time; a share of each one's time in float32's is its score, and the
lowest score wins among those whose outputs agree with float32's within the manifest's tolerance. A client that names
`serving_float32` or `serving_bfloat16` gets it; whoever names none, or `serving_default`, gets the chosen one."""

import dataclasses
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from tfhalf import bundle, cast_once, rest

AUTO = "auto"
COMPUTE_DTYPES = (AUTO, "float32", "bfloat16", "float16")
_DEFAULT, _FLOAT32 = "serving_default", "serving_float32"
_BASES = {"float32": _FLOAT32, "bfloat16": "serving_bfloat16"}
_WARMUP = f"{bundle.EXTRA}/tf_serving_warmup_requests"
_MOST_WARMUPS = 1000  # as in TensorFlow Serving
# A few rounds are enough to tell dtypes apart that differ by more than noise; those that don't may as well be either.
_ROUNDS, _SECONDS = 5, 1.5
_GAIN = 0.1  # less than a tenth is noise: workers beside each other would choose differently
_SHORT = 8  # values that are written out in an example


@dataclasses.dataclass(frozen=True)
class Timing:
    """What was measured of one dtype.

    Attributes:
        signature: its name.
        dtypes: what it computes in.
        one, many: milliseconds for one row, and for all samples.
        rows: how many samples there are.
        error: largest difference to float32's outputs, as `tfhalf.verify` measures it.
        tolerance: what it may be.
    """

    signature: str
    dtypes: str
    one: float
    many: float
    rows: int
    error: float
    tolerance: float

    @property
    def is_sound(self) -> bool:
        """Whether it may be chosen."""
        return self.error <= self.tolerance


class Function:
    """A signature that can be called with arrays, in any thread."""

    def __init__(self, concrete, name: str) -> None:
        self._concrete = concrete
        self.name = name
        self.specs: dict[str, tf.TensorSpec] = dict(concrete.structured_input_signature[1])
        self.outputs: dict[str, tf.TensorSpec] = dict(concrete.structured_outputs)
        self.is_joinable = _may_be_joined(self.specs, self.outputs)

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs it on its inputs; others, as the samples of other signatures, are left alone.

        Raises:
            RequestError: TensorFlow refused the values, or had no room for them.
        """
        try:
            outputs = self._concrete(**{name: tf.constant(arrays[name]) for name in self.specs})
            return {name: np.asarray(tensor.numpy()) for name, tensor in outputs.items()}
        except (tf.errors.ResourceExhaustedError, MemoryError) as error:
            raise rest.RequestError("RESOURCE_EXHAUSTED", "there is no memory for this request") from error
        except (
            tf.errors.InvalidArgumentError,
            tf.errors.OutOfRangeError,
            tf.errors.UnimplementedError,
            ValueError,
        ) as error:
            raise rest.invalid(f"the model can't take these values: {_reason(error)}") from error


def _may_be_joined(specs: Mapping[str, tf.TensorSpec], outputs: Mapping[str, tf.TensorSpec]) -> bool:
    """Whether rows of several requests may run together: each output has their axis first, and no length but theirs."""

    def inner(ones: Mapping[str, tf.TensorSpec]) -> list:
        return [size for one in ones.values() for size in one.shape[1:]]

    every = [*specs.values(), *outputs.values()]
    if any(one.shape.rank is None or one.shape.rank < 1 or one.shape[0] is not None for one in every):
        return False
    # A length that no input has is found from what is in them, as the longest text's: then a row depends on the others.
    return None not in inner(outputs) or None in inner(specs)


class Loaded:
    """A version that can be asked.

    Args:
        directory: the version folder.
        compute_dtype: one of `COMPUTE_DTYPES`.
        require_signature: a public key (PEM) that must have signed it, or None.

    Raises:
        ExportError: it isn't sound.
    """

    def __init__(self, directory: Path, compute_dtype: str = AUTO, require_signature: str | None = None) -> None:
        self.number = int(directory.name)
        self.notes: list[str] = []
        self.manifest = bundle.check(directory, require_signature)
        self.signature_defs = {
            name: one
            for name, one in bundle.read_graph(directory).meta_graphs[0].signature_def.items()
            if not name.startswith("__saved_model")
        }
        # `_model` must live as long as the functions: it owns the variables.
        self._model = self._load(directory)
        self._functions = {name: Function(one, name) for name, one in self._model.signatures.items()}
        with np.load(directory / bundle.INPUTS, allow_pickle=False) as file:
            self._samples = {
                name.removeprefix("inputs/"): array.astype(object) if array.dtype.kind == "S" else array
                for name, array in file.items()
            }
        self.table: list[Timing] = []
        self.base = self._choose(compute_dtype)
        self._check_answers(directory)
        self._check_joining()
        self._warm_up(directory)

    @property
    def compute_dtypes(self) -> str:
        """What the default signature computes in."""
        return "+".join(self.manifest.signatures[self.base]["compute_dtypes"])

    def function(self, signature: str = "") -> Function:
        """Returns the function behind a signature's name; none or `serving_default` is the chosen dtype's.

        Raises:
            RequestError: there is no such signature.
        """
        name = signature or _DEFAULT
        if name.startswith(_DEFAULT):
            name = self.base + name.removeprefix(_DEFAULT)
        if name not in self._functions:
            names = ", ".join(sorted(self._functions))
            raise rest.invalid(f"there is no signature {signature!r}; there are {names}")
        return self._functions[name]

    def example(self) -> dict[str, tuple[Any, list[int]]]:
        """Returns a row to try the model with: input -> its value and [], or a zero and the shape to fill with it."""
        row = {name: self._samples[name][0] for name in self.function().specs}
        found: dict[str, tuple[Any, list[int]]] = {}
        for name, value in row.items():
            array = np.asarray(value)
            if self.function().specs[name].dtype == tf.string:
                texts = np.vectorize(lambda one: one.decode(errors="replace"), otypes="O")(array)
                found[name] = texts.tolist(), []
            elif array.size > _SHORT:
                found[name] = array.dtype.type(0).item(), list(array.shape)
            else:
                found[name] = array.tolist(), []
        return found

    def _load(self, directory: Path):
        with tempfile.TemporaryDirectory(prefix="tfhalf-") as scratch:
            source = Path(scratch) / "float32"
            try:
                cast, halves = cast_once.write(directory, source)
                loaded = tf.saved_model.load(str(source))
            except (ValueError, TypeError, KeyError, IndexError, OSError, tf.errors.OpError) as error:
                self.notes.append(f"weights are cast on each call: {bundle.first_line(error)}")
                return tf.saved_model.load(str(directory))
        if cast < halves:
            self.notes.append(f"{halves - cast} of {halves} half weights are cast on each call")
        return loaded

    def _choose(self, compute_dtype: str) -> str:
        bases = [name for name in (_FLOAT32, "serving_bfloat16", _DEFAULT) if name in self._functions]
        if compute_dtype != AUTO:
            base = _BASES.get(compute_dtype, _DEFAULT)
            if base in bases and compute_dtype in self.manifest.signatures[base]["compute_dtypes"]:
                return base
            self.notes.append(f"has no signature that computes in {compute_dtype}: {bases[0]} is served")
            return bases[0]
        if len(bases) == 1:
            return bases[0]
        self.table = self._measure(bases)
        return fastest(self.table)

    def _measure(self, bases: list[str]) -> list[Timing]:
        rows = min(len(array) for array in self._samples.values())
        batches = [{name: array[:count] for name, array in self._samples.items()} for count in (1, rows)]
        compared = {base: self._functions.get(base + bundle.RAW, self._functions[base]) for base in bases}
        expected = compared[bases[0]](self._samples)
        seconds = {base: [np.inf, np.inf] for base in bases}
        errors = {}
        for base in bases:
            errors[base] = max(
                bundle.difference(array, expected[name]) for name, array in compared[base](self._samples).items()
            )
            for batch in batches:
                self._functions[base](batch)  # the first call is slow
        end = time.monotonic() + _SECONDS
        for number in range(_ROUNDS):
            for base in bases:
                for place, batch in enumerate(batches):
                    begin = time.perf_counter()
                    self._functions[base](batch)
                    seconds[base][place] = min(seconds[base][place], time.perf_counter() - begin)
            if number and time.monotonic() > end:
                break
        return [
            Timing(
                base,
                "+".join(self.manifest.signatures[base]["compute_dtypes"]),
                seconds[base][0] * 1e3,
                seconds[base][1] * 1e3,
                rows,
                errors[base],
                self._tolerance(compared[base].name),
            )
            for base in bases
        ]

    def _tolerance(self, signature: str) -> float:
        tolerance = self.manifest.signatures[signature]["tolerance"]
        return np.inf if tolerance is None else tolerance

    def _check_answers(self, directory: Path) -> None:
        """Holds what is served to what the training model made of the samples."""
        name = self.base + bundle.RAW if self.base + bundle.RAW in self._functions else self.base
        outputs = self._functions[name](self._samples)
        with np.load(directory / bundle.OUTPUTS, allow_pickle=False) as file:
            errors = {
                key: bundle.difference(bundle.bytes_not_objects(array), file[f"{name}/{key}"])
                for key, array in outputs.items()
            }
        bundle.check_errors(name, errors, outputs.keys(), self.manifest.signatures[name]["tolerance"])

    def _check_joining(self) -> None:
        """Joins rows only where the samples show that a row's answer doesn't depend on its neighbours."""
        rows = min(2, *(len(array) for array in self._samples.values()))
        together = {name: array[:rows] for name, array in self._samples.items()}
        for name, function in self._functions.items():
            if not function.is_joinable:
                continue
            if rows < 2 or not name.startswith(self.base) or name.endswith(bundle.RAW):
                function.is_joinable = False  # it isn't looked at, being asked for by its name at most
                continue
            allowed = self.manifest.signatures[name]["tolerance"]
            if allowed is None:  # a decision: its numbers as near as what it is made from, all else equal
                allowed = self.manifest.signatures[self.base + bundle.RAW]["tolerance"]
            joined = function(together)
            for row in range(rows):
                alone = function({key: array[row : row + 1] for key, array in together.items()})
                if any(bundle.difference(array, joined[key][row : row + 1]) > allowed for key, array in alone.items()):
                    function.is_joinable = False
                    self.notes.append(f"{name}: a row's answer depends on the other rows, so requests aren't joined")
                    break

    def _warm_up(self, directory: Path) -> None:
        """Replays the bundle's own requests."""
        if not (directory / _WARMUP).exists():
            return
        for number, record in enumerate(tf.data.TFRecordDataset(str(directory / _WARMUP)).as_numpy_iterator()):
            if number == _MOST_WARMUPS:
                break
            request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
            arrays = {name: tf.make_ndarray(tensor) for name, tensor in request.inputs.items()}
            self.function(request.model_spec.signature_name)(arrays)


def fastest(table: list[Timing]) -> str:
    """Returns the signature with the lowest score that is sound; the first, float32, where none gains enough."""
    reference, best, signature = table[0], 1 - _GAIN, table[0].signature
    for timing in table[1:]:
        score = (timing.one / reference.one + timing.many / reference.many) / 2
        if timing.is_sound and score < best:
            best, signature = score, timing.signature
    return signature


def as_table(table: list[Timing], chosen: str) -> list[str]:
    """Returns what was measured in lines, the chosen one marked."""
    lines = [f"{'':2}{'signature':18}{'computes in':18}{'1 row':>10}{f'{table[0].rows} rows':>10}{'difference':>12}"]
    for one in table:
        mark = "* " if one.signature == chosen else "  "
        verdict = "" if one.is_sound else f" over the tolerance {one.tolerance:g}"
        lines.append(
            f"{mark}{one.signature:18}{one.dtypes:18}{one.one:7.2f} ms{one.many:7.2f} ms{one.error:12.2g}{verdict}"
        )
    return lines


def _reason(error: Exception) -> str:
    """TensorFlow's message in one line, without where in the graph it was."""
    text: Any = getattr(error, "message", None) or str(error)
    places = ("Graph execution error:", "Detected at node", "<stack traces", "[[{{node")
    lines = [line.strip() for line in str(text).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(places))[:500]
