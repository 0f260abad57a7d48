"""A version folder appears in one rename, whole, or not at all; what killed exports left is swept up.

Source: TensorFlow Serving polls the base folder, https://www.tensorflow.org/tfx/serving/serving_config
"""

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

from tfhalf.manifest import ExportError, first_line


@contextlib.contextmanager
def whole(directory: Path) -> Iterator[Path]:
    """Gives a staging folder, and publishes it when the block ends well.

    Args:
        directory: the target.

    Yields:
        The staging folder.

    Raises:
        ExportError: the target exists, or can't be written; nothing was published.
    """
    try:
        with staging(directory) as stage:
            yield stage
            publish(stage, directory)
    except (OSError, tf.errors.OpError) as error:
        raise ExportError(f"can't write {directory}: {first_line(error)}; nothing was published") from error


@contextlib.contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """Gives a folder beside the target, removes it on failure, and sweeps up those of exports that were killed.

    Args:
        directory: where `publish` will move it.

    Yields:
        The staging folder.
    """
    parent = directory.parent
    parent.mkdir(parents=True, exist_ok=True)
    with _locked(parent):
        for leftover in parent.glob(".staging-*"):
            with contextlib.suppress(OSError), _locked(leftover, wait=False):  # in use, just published, or not ours
                shutil.rmtree(leftover)
        stage = parent / f".staging-{directory.name}-{uuid.uuid4().hex[:8]}"
        stage.mkdir()
        lock = contextlib.ExitStack()
        lock.enter_context(_locked(stage))
    with lock:
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Holds a lock on a folder that ends with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def publish(stage: Path, directory: Path) -> None:
    """Brings everything to disk, then renames; a version that appeared meanwhile isn't replaced.

    Raises:
        ExportError: the target exists.
    """
    for path in [*stage.rglob("*"), stage]:
        _sync(path)
    if os.path.lexists(directory):
        raise ExportError(f"{directory} exists; choose another version")
    stage.rename(directory)  # fails where the target is a folder with something in it
    _sync(directory.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
