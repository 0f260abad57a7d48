"""What a bundle says that it is, in `assets.extra/manifest.json`, and whether its files are those.

The manifest names every file of the bundle with its sha256, and `manifest.sha256` beside it has the manifest's own (as
`sha256sum` writes it), so that no byte of a bundle changes unseen. Nothing but plain files and folders may be there: a
link leads to what nobody hashed. The only file that neither of them knows is a signature, `model.sig`, which is made
later.

This guards against damage and mix-ups. Whoever can write the folder can write both files too: against that stands
a signature (`tfhalf.signing`).
"""

import dataclasses
import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

EXTRA = "assets.extra"
MANIFEST = f"{EXTRA}/manifest.json"
CHECKSUM = f"{EXTRA}/manifest.sha256"
SIGNATURE = f"{EXTRA}/model.sig"
GRAPH = "saved_model.pb"

_NOT_HASHED = {MANIFEST, CHECKSUM, SIGNATURE}
# TensorFlow's loaders read a graph from these too: then another one would be loaded than the one that was checked.
_OTHER_GRAPHS = {"saved_model.pbtxt", "saved_model.cpb"}

_SPECS = {str: {"dtype": str, "shape": list | None}}  # None: of any rank
_SIGNATURE_KINDS = {
    "inputs": _SPECS,
    "outputs": _SPECS,
    "compute_dtypes": [str],
    "tolerance": int | float | None,
    "max_error": {str: int | float},
}
_KINDS = {
    "created": str,
    "versions": {str: str},
    "storage_dtype": str,
    "kept": {str: str},
    "signatures": {str: _SIGNATURE_KINDS},
    "sizes": {str: int},
    "fingerprint": str,
    "files": {str: {"bytes": int, "sha256": str}},
    "metadata": dict,
}


class ExportError(Exception):
    """An artefact can't be made, or isn't what its manifest says; nothing was published."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a bundle is, as written in `assets.extra/manifest.json`.

    Attributes:
        created: time in UTC, ISO 8601.
        versions: package to version, of what wrote it.
        storage_dtype: dtype of the stored weights.
        kept: variable to the reason why it stayed in its own dtype.
        signatures: name to {"inputs", "outputs", "compute_dtypes", "tolerance", "max_error"}; inputs and outputs map
            names to {"dtype", "shape"}; max_error maps outputs to the largest difference seen; tolerance is None
            where a decision is served, whose numbers are compared in `<name>_raw`.
        sizes: bytes of "variables", "graph" and "total".
        fingerprint: hash of the signatures as TensorFlow computes it: equal for every storage dtype.
        files: path to {"bytes", "sha256"}, of every file but the manifest, its checksum and a signature.
        metadata: what the caller gave: task, flags, plan, metrics, class names.
    """

    created: str
    versions: dict[str, str]
    storage_dtype: str
    kept: dict[str, str]
    signatures: dict[str, dict[str, Any]]
    sizes: dict[str, int]
    fingerprint: str
    files: dict[str, dict[str, Any]]
    metadata: dict[str, Any]

    def write(self, directory: Path) -> None:
        """Writes the manifest and its checksum into its bundle."""
        content = (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode()
        (directory / MANIFEST).write_bytes(content)
        (directory / CHECKSUM).write_bytes(checksum_of(content))

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Reads a bundle's manifest, after comparing it with its checksum; it checks nothing else.

        Raises:
            ExportError: there is none, it was changed, or it isn't one of ours.
        """
        try:
            content = (directory / MANIFEST).read_bytes()
            checksum = (directory / CHECKSUM).read_bytes()
            values = json.loads(content.decode())
        except (OSError, ValueError, RecursionError) as error:
            raise ExportError(f"{directory} is no tfhalf bundle: can't read {MANIFEST} ({error})") from error
        if checksum != checksum_of(content):
            raise ExportError(f"{directory}: {MANIFEST} isn't the one that was written; export the model again")
        if wrong := _misfit(values, _KINDS):
            raise ExportError(f"{directory} is no tfhalf bundle: in {MANIFEST}, {wrong}")
        return cls(**values)


def checksum_of(manifest: bytes) -> bytes:
    """What `sha256sum manifest.json` prints."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {PurePosixPath(MANIFEST).name}\n".encode()


def _misfit(value: Any, kind: Any, where: str = "") -> str:
    """Says which value isn't of its kind; "" where all are. A kind is a type, [kind], {str: kind} or {name: kind}."""
    if isinstance(kind, list):
        parts = (
            [(f"{where}[{index}]", one, kind[0]) for index, one in enumerate(value)] if type(value) is list else None
        )
    elif isinstance(kind, dict):
        parts = None
        if type(value) is dict and (str in kind or value.keys() == kind.keys()):
            parts = [(f"{where}/{name}".lstrip("/"), one, kind.get(str) or kind[name]) for name, one in value.items()]
    else:
        parts = [] if isinstance(value, kind) and not isinstance(value, bool) else None
    if parts is None:
        wanted = f"an object of {', '.join(kind)}" if isinstance(kind, dict) and str not in kind else "another type"
        return f"{where or 'all of it'} should be {wanted}"
    return next(filter(None, (_misfit(one, inner, place) for place, one, inner in parts)), "")


def check_files(directory: Path) -> Manifest:
    """Compares every file of a bundle with its manifest.

    Args:
        directory: the version folder.

    Returns:
        Its manifest.

    Raises:
        ExportError: a file was changed, is missing or is new; there is something else than plain files and folders.
    """
    present = _files(directory)
    manifest = Manifest.read(directory)
    if outside := sorted(name for name in manifest.files if _leads_outside(name)):
        raise ExportError(f"{directory}: its manifest names {', '.join(outside)}, which is outside of the bundle")
    if missing := sorted((manifest.files.keys() | {GRAPH}) - present):
        raise ExportError(f"{directory}: {', '.join(missing)} is missing; export the model again")
    if strange := sorted(present - manifest.files.keys() - _NOT_HASHED):
        raise ExportError(f"{directory}: {', '.join(strange)} isn't in its manifest; export the model again")
    if graphs := sorted(present & _OTHER_GRAPHS):
        raise ExportError(f"{directory}: {', '.join(graphs)} could be loaded instead of {GRAPH}; remove it")
    for name, expected in manifest.files.items():
        if _sha256(directory / name) != expected["sha256"]:
            raise ExportError(
                f"{directory}: {name} isn't the file that was exported (sha256 differs); export the model again"
            )
    return manifest


def hashes(directory: Path) -> dict[str, dict[str, Any]]:
    """Returns bytes and sha256 of every file but the manifest and a signature, by its path in the bundle.

    Raises:
        ExportError: there is something else than plain files and folders.
    """
    return {
        name: {"bytes": (directory / name).stat().st_size, "sha256": _sha256(directory / name)}
        for name in sorted(_files(directory) - _NOT_HASHED)
    }


def _files(directory: Path) -> set[str]:
    """The paths of all files in a folder."""
    found = set()
    for path in directory.rglob("*"):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise ExportError(f"{directory}: {name} is a link or a device; a bundle has plain files and folders only")
        if path.is_file():
            found.add(name)
    return found


def _leads_outside(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error) -> str:
    """The line of an error or of a process' output that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if isinstance(error, str) else lines[0]
