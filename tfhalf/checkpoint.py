"""States of a run on disk: written whole or not at all, several of them, and never taken for another run's.

A state is one numpy file with everything that a step reads and writes, and a JSON text about it. It is written beside,
synced and renamed; its zip format holds a CRC-32 of each array, so that damage is seen when it is read, and then the
one before is used. What made the run - settings, layers with their dtypes, weights, optimizer - is written along, and
a state that doesn't fit is refused by the name of the difference.

It doesn't know how a run goes on from a state (`tfhalf.training`).
"""

import contextlib
import fcntl
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfhalf import precision

_NAME = re.compile(r"epoch-(\d{6})-step-(\d{9})\.npz")
# Settings that don't tell one layer or optimizer from another: names, and what Keras writes to find a class again.
_UNTELLING = ("name", "module", "registered_name", "build_config", "dtype")


class CheckpointError(Exception):
    """A state can't be written, read or used; the message says why and what to do."""


class Checkpoints:
    """The newest states in a folder.

    Args:
        folder: where they lie; made by the first `save`.
        keep: how many stay, at least 1.
        report: is called with each line that a person should read.
        is_writer: whether this process may change the folder.
    """

    def __init__(self, folder: str | os.PathLike, keep: int, report: Callable[[str], None], is_writer: bool = True):
        if keep < 1:
            raise ValueError(f"Checkpoints: keep must be at least 1, got {keep}")
        self._folder, self._keep, self._report, self._is_writer = Path(folder), keep, report, is_writer

    def paths(self) -> list[Path]:
        """Returns the states' files, oldest first."""
        return sorted(path for path in self._folder.glob("epoch-*.npz") if _NAME.fullmatch(path.name))

    def save(self, epoch: int, step: int, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
        """Writes the state after `epoch` whole epochs and `step` batches of the next; then drops the oldest ones.

        Raises:
            CheckpointError: it can't be written; the ones before are untouched.
        """
        with guard_disk(self._folder):
            self._folder.mkdir(exist_ok=True)
            path = self._folder / f"epoch-{epoch:06d}-step-{step:09d}.npz"
            text = json.dumps({"about": about, "arrays": list(arrays)})
            replace(path, lambda file: np.savez(file, text=np.array(text), **arrays))
            killed = self._folder.glob(".epoch-*.npz")  # what a kill left while it was written
            for old in [*self.paths()[: -self._keep], *killed]:
                old.unlink()

    def newest(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Returns arrays and JSON of the newest state that is whole, or None where there is none at all.

        A damaged one gets ".damaged" behind its name, and the one before is taken, with a warning.

        Raises:
            CheckpointError: there are states, and all are damaged.
        """
        damaged = ""
        for path in reversed(self.paths()):
            try:
                arrays, about = read(path)
            except CheckpointError as error:
                damaged = str(error)
                self._report(f"warning: {damaged}; the checkpoint before it is used")
                if self._is_writer:
                    with contextlib.suppress(OSError):
                        path.rename(path.with_name(f"{path.name}.damaged"))
                continue
            return arrays, about
        if damaged:
            raise CheckpointError(f"{damaged}, and no older one is left; delete the folder or choose another one")
        return None


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns one state's arrays and JSON.

    Raises:
        CheckpointError: it isn't there, or is damaged.
    """
    try:
        with open(path, "rb") as opened:
            damaged = zipfile.ZipFile(opened).testzip()  # numpy doesn't read to an array's end, where its checksum is
            if damaged:
                raise ValueError(f"{damaged} has another checksum")
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as file:
                arrays = dict(file)
        text = json.loads(str(arrays.pop("text")))
        if list(arrays) != text["arrays"]:  # a zip file's list of contents has no checksum
            raise ValueError("it doesn't hold what it should")
        return arrays, text["about"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} doesn't exist") from error
    except Exception as error:  # a changed byte lets numpy and zipfile raise nearly anything
        raise CheckpointError(f"{path} is damaged ({error})") from error


def describe(model: keras.Model) -> dict[str, Any]:
    """Returns what a state of this model must agree with, as JSON values; it is compiled, or has no optimizer.

    Names carry Keras' counters, which differ between processes: they are for the reader. Order, classes, settings,
    dtypes and shapes count.
    """
    layers = precision.layers_by_path(model)
    names = {id(weight): f"{path}/{weight.name}" for path, layer in layers.items() for weight in layer.weights}
    return {
        "classes": [[path, type(layer).__name__] for path, layer in layers.items()],
        "settings": [[path, _settings(path, layers)] for path in layers],
        "layers": [[path, layer.compute_dtype] for path, layer in layers.items()],
        "weights": [
            [names.get(id(weight), weight.name), weight.dtype, [int(size) for size in weight.shape]]
            for weight in model.weights
        ],
        "optimizer": dict(sorted(_flat(keras.optimizers.serialize(model.optimizer)))) if model.compiled else {},
    }


def require_same(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuses a state of another run.

    Args:
        folder: the run's folder, for the message.
        there: the state's {"config": ..., "model": ...}.
        here: the same of the run that wants to go on.

    Raises:
        CheckpointError: they differ; the message names up to five differences.
    """
    settings = _differences(there["config"], json.loads(json.dumps(here["config"])))
    if settings:
        raise CheckpointError(
            f"workdir {folder} holds a run with other settings ({settings}); use the same settings or another folder"
        )
    there, here = there["model"], here["model"]
    parts = {
        "another model": _list_differences(there["classes"], here["classes"], "layers")
        or _list_differences(there["weights"], here["weights"], "weights")
        or _list_differences(there["settings"], here["settings"], "layers"),
        "another precision plan": _list_differences(there["layers"], here["layers"], "layers"),
        "another optimizer": _differences(there["optimizer"], here["optimizer"]),
    }
    for what, difference in parts.items():
        if difference:
            raise CheckpointError(f"workdir {folder} holds {what} ({difference}); choose another folder")


def _differences(there: dict, here: dict) -> str:
    keys = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    return ", ".join(f"{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in keys[:5])


def _list_differences(there: list, here: list, what: str) -> str:
    """Compares lists of [name, facts...] in order."""
    differing = []
    if len(there) != len(here):
        differing.append(f"{len(there)} {what} there, {len(here)} here")
    for (_, *old), (name, *new) in zip(there, here, strict=False):
        if old != new and isinstance(new[0], dict):
            differing.append(_differences(*({f"{name} {k}": v for k, v in each[0].items()} for each in (old, new))))
        elif old != new:
            old_facts, new_facts = (" ".join(map(str, facts)) for facts in (old, new))
            differing.append(f"{name}: {old_facts} there, {new_facts} here")
    return ", ".join(differing[:5])


def _settings(path: str, layers: dict[str, keras.Layer]) -> dict[str, Any]:
    """A layer's own settings; those of layers inside it stand in their own rows."""
    layer = layers[path]
    if any(other.startswith(f"{path}/") for other in layers):
        return {"trainable": layer.trainable}
    try:
        return dict(sorted(_flat(layer.get_config(), "")))
    except NotImplementedError:  # a layer that can't be saved
        return {"trainable": layer.trainable}


def _flat(value, path: str = "optimizer") -> Iterator[tuple[str, Any]]:
    """A serialised object's settings by dotted path, without the names that Keras counts up."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in _UNTELLING:
                yield from _flat(inner, path if key == "config" else f"{path}.{key}".strip("."))
    else:
        yield path, json.loads(json.dumps(value, default=lambda other: type(other).__name__))


def replace(path: Path, write: Callable[[io.BufferedWriter], Any]) -> None:
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
def guard_disk(folder: Path) -> Iterator[None]:
    """Turns a failed write into an error that says what is left."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"can't write the checkpoint in {folder}: {error}; an earlier one is intact: free space and run again"
        ) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a run's folder, and holds a lock on it that ends with the process, however it ends.

    Raises:
        CheckpointError: the folder can't be written, or another process uses it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".writable", "wb"):
            pass
        (folder / ".writable").unlink()
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"workdir {folder} can't be written: {error.strerror}; choose another one") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"workdir {folder} is in use by another run; choose another one") from error
        yield
    finally:
        os.close(descriptor)
