"""Which versions of which models are served: a base folder, looked at again and again.

The layout is TensorFlow Serving's, `<base>/<model>/<integer version>/`. Of each model the newest versions that are
sound are kept. A version that can't be loaded is refused with the reason, told once, and tried again only when its
files change or what failed may pass, so that the older one goes on serving and a folder that is still being copied is
taken when it is whole. A version that is no longer wanted is forgotten here; requests that hold it finish on it.

Source: https://www.tensorflow.org/tfx/serving/serving_config
"""

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from tfhalf import bundle

# As in TensorFlow Serving's get_model_status.proto.
LOADING, AVAILABLE, END = "LOADING", "AVAILABLE", "END"
_LARGEST = 2**63 - 1
_LONGEST_PAUSE = 600  # seconds


@dataclasses.dataclass(frozen=True)
class Version:
    """One version as it is known now.

    Attributes:
        number: the folder's.
        state: LOADING, AVAILABLE, or END where it was refused.
        error: why it was refused.
        loaded: what `load` returned, while it is AVAILABLE.
        stamp: what the files were like.
        tries, again: how often it was refused, and when (`time.monotonic`) it is tried again though its files are the
            same: what failed may pass, as a full disk does.
    """

    number: int
    state: str
    error: str = ""
    loaded: Any = None
    stamp: Hashable = None
    tries: int = 0
    again: float = math.inf


def scan(base: Path) -> dict[str, dict[int, Path] | None]:
    """Returns the version folders under a base folder: model -> number -> folder, or None where it can't be read.

    Raises:
        OSError: the base folder can't be read.
    """
    found: dict[str, dict[int, Path] | None] = {}
    for model in sorted(base.iterdir()):
        if not model.name.startswith(".") and model.is_dir():
            try:
                found[model.name] = {
                    int(entry.name): entry for entry in sorted(model.iterdir()) if _is_number(entry.name)
                }
            except FileNotFoundError:  # removed while we look
                continue
            except OSError:
                found[model.name] = None
    return found


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) < 20 and 1 <= int(name) <= _LARGEST


class Keeper:
    """Loads what is new and sound in a base folder, and forgets what is old or gone.

    Args:
        base: the base folder.
        load: loads a version folder, given model, number and folder; whatever it raises refuses that version.
        keep: how many versions of each model are kept, 1 or more.
        report: is told what happened, once for each thing: a line.
    """

    def __init__(
        self, base: Path, load: Callable[[str, int, Path], Any], keep: int, report: Callable[[str], None]
    ) -> None:
        self._base, self._load, self._keep, self._report = base, load, keep, report
        self._lock = threading.Lock()
        self._unreadable: set[str] = set()
        # Replaced as a whole at each change, so that who reads it needs no lock.
        self._models: dict[str, dict[int, Version]] = {}

    @property
    def models(self) -> dict[str, dict[int, Version]]:
        """What is known now: model -> number -> version."""
        return self._models

    def find(self, model: str, number: int = 0) -> Any:
        """Returns what was loaded for a version, 0 being the newest; None where there is no such."""
        versions = {n: one for n, one in self._models.get(model, {}).items() if one.state == AVAILABLE}
        chosen = versions.get(number or max(versions, default=0))
        return chosen.loaded if chosen else None

    def may_come(self, model: str, number: int = 0) -> bool:
        """Whether another look at the base folder could find that version: it is newer than all that are known."""
        known = self._models.get(model, {})
        if not model or "/" in model or "\0" in model or model.startswith("."):
            return False
        newest = max((n for n, one in known.items() if one.state != LOADING), default=0)
        try:
            numbers = scan_model(self._base / model)
        except OSError:
            return False
        return number in numbers and number > newest if number else bool(numbers) and not known

    def poll(self) -> None:
        """Brings what is loaded up to date with the base folder; one thread at a time does it, others wait."""
        with self._lock:
            try:
                on_disk = scan(self._base)
            except OSError as error:
                # A file system that is away for a moment is no reason to stop serving.
                self._tell_unreadable({f"can't read {self._base} ({error.strerror}); what is loaded is served on"})
                return
            lost = [model for model, folders in on_disk.items() if folders is None]
            self._tell_unreadable({f"can't read {self._base / name}; what is loaded is served on" for name in lost})
            for model in [*on_disk, *(self._models.keys() - on_disk.keys())]:
                folders = on_disk.get(model, {})
                if folders is not None:
                    self._update(model, folders)

    def _tell_unreadable(self, lines: set[str]) -> None:
        for line in sorted(lines - self._unreadable):
            self._report(line)
        self._unreadable = lines

    def _update(self, model: str, folders: dict[int, Path]) -> None:
        kept: list[int] = []
        for number in sorted(folders, reverse=True):
            if len(kept) == self._keep:
                break
            known = self._models.get(model, {}).get(number)
            if known is None or known.state != AVAILABLE:
                known = self._try(model, number, folders[number], known)
            if known.state == AVAILABLE:
                kept.append(number)
        for number, version in self._models.get(model, {}).items():
            if version.state == AVAILABLE and number not in kept:
                self._report(f"{model} version {number}: unloaded")
            if number not in (kept if version.state == AVAILABLE else folders):
                self._publish(model, number, None)

    def _try(self, model: str, number: int, folder: Path, known: Version | None) -> Version:
        stamp = _stamp(folder)
        is_same = known is not None and known.stamp == stamp
        if is_same and time.monotonic() < known.again:
            return known
        self._publish(model, number, Version(number, LOADING))
        try:
            version = Version(number, AVAILABLE, loaded=self._load(model, number, folder), stamp=stamp)
        except Exception as error:  # whatever is wrong with a version, the older one must go on serving
            kind = "" if isinstance(error, bundle.ExportError) else f"{type(error).__name__}: "
            reason = kind + " ".join(str(error).split())
            tries = known.tries + 1 if is_same else 1
            may_pass = not isinstance(error, bundle.ExportError) or isinstance(error.__cause__, OSError)
            again = time.monotonic() + min(2**tries, _LONGEST_PAUSE) if may_pass else math.inf
            version = Version(number, END, reason, stamp=stamp, tries=tries, again=again)
            if not is_same or known.error != reason:
                self._report(f"{model} version {number}: refused: {reason}")
        self._publish(model, number, version)
        return version

    def _publish(self, model: str, number: int, version: Version | None) -> None:
        versions = {n: one for n, one in self._models.get(model, {}).items() if n != number}
        if version is not None:
            versions[number] = version
        others = {name: ones for name, ones in self._models.items() if name != model}
        self._models = others | ({model: versions} if versions else {})


def scan_model(folder: Path) -> set[int]:
    """Returns the numbers of a model's version folders.

    Raises:
        OSError: the folder can't be read.
    """
    return {int(entry.name) for entry in folder.iterdir() if _is_number(entry.name)}


def _stamp(folder: Path) -> Hashable:
    """Changes when a file in the folder does; None where it can't be read."""
    try:
        files = [(str(path), path.stat()) for path in sorted(folder.rglob("*"))]
    except OSError:
        return None
    return tuple((name, about.st_size, about.st_mtime_ns, about.st_ino) for name, about in files)
