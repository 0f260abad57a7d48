"""Choices of precision that are kept in a folder: one file for each, under a digest of what the choice rests on.

That is the machine (CPU, instructions, cores, GPUs, threads, what oneDNN computes), the versions of TensorFlow, Keras
and tfhalf, the model (layers, settings, shapes, which layers have a policy of their own, optimizer, loss, XLA), and
the shapes and dtypes of a batch. A file that is damaged or can't be written is said once, and changes nothing else.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from tfhalf import checkpoint, fastest, hardware

_FORMAT = 1


class Store:
    """The place of one choice.

    Args:
        folder: made if missing.
        key: what the choice rests on, as `key` gives it.
        report: is called with each line that a person should read.
    """

    def __init__(self, folder: Path, key: str, report: Callable[[str], None]):
        self._path, self._report = folder / f"precision-{key}.json", report

    def read(self) -> dict[str, Any] | None:
        """Returns what was written, or None."""
        try:
            value = json.loads(self._path.read_text(encoding="utf-8"))
            if value["sha256"] != _digest(value["choice"]):
                raise ValueError("it has another checksum")
            return value["choice"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            self._report(f"{self._path} is damaged ({type(error).__name__}: {error}); it is measured again")
            return None

    def write(self, choice: dict[str, Any]) -> None:
        """Writes a choice, JSON values, whole or not at all."""
        value = {"sha256": _digest(choice), "choice": choice}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.replace(self._path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))
        except OSError as error:
            self._report(f"the choice can't be kept in {self._path.parent}: {error.strerror}")


def key(build: Callable[[str], keras.Model], batch: tuple, settings: list) -> str:
    """Returns a digest of everything that a choice rests on.

    Args:
        build: policy to the model, compiled where it is trained.
        batch: (x, y, sample weight) of tensors.
        settings: JSON values that count too.
    """
    try:
        model = build(fastest.BFLOAT16)  # a half policy, so that layers with one of their own are seen
    except (TypeError, ValueError):
        model = build(fastest.FLOAT32)
    compiled = []
    if model.compiled:
        compiled = [_told(model.loss), bool(model.jit_compile)]
    about = checkpoint.describe(model)
    # Without the layers' and weights' names, which carry counters.
    about = {name: [row[1:] for row in rows] if isinstance(rows, list) else rows for name, rows in about.items()}
    return _digest(
        {
            "format": _FORMAT,
            "machine": hardware.inspect_hardware(0).to_json(),
            "versions": [tf.__version__, keras.__version__, sys.modules[__package__].__version__],
            "model": about,
            "compiled": compiled,
            "batch": keras.tree.map_structure(lambda value: f"{value.dtype}{value.shape}", batch, none_is_leaf=False),
            "settings": settings,
        }
    )[:16]


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _told(value) -> Any:
    """A loss, or several, as JSON values."""
    if isinstance(value, dict):
        return {name: _told(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_told(one) for one in value]
    if value is None or isinstance(value, str):
        return value
    kind = value if hasattr(value, "__qualname__") else type(value)
    return [kind.__module__, kind.__qualname__, _settings(value)]


def _settings(value) -> dict[str, Any]:
    if not hasattr(value, "get_config"):
        return {}
    try:
        return {name: setting for name, setting in value.get_config().items() if isinstance(setting, str | int | float)}
    except NotImplementedError:
        return {}
