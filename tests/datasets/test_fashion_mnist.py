"""Debian's package rebuilt into the files that TFDS knows."""

import gzip
import shutil

import pytest
import tensorflow_datasets as tfds

from tfhalf.datasets import DatasetError, fashion_mnist, packages


def checksums() -> dict[str, str]:
    return {info.filename: info.checksum for info in tfds.builder_cls("fashion_mnist").url_infos.values()}


def test_header_is_restored():
    original = gzip.compress(b"pixels", mtime=0)  # ten bytes of header without a name, as in Debian's package
    restored = fashion_mnist.restore_gzip_header(original, "t10k-images-idx3-ubyte.gz")
    assert gzip.decompress(restored) == b"pixels"
    assert restored[10:].startswith(b"t10k-images-idx3-ubyte\x00")
    assert int.from_bytes(restored[4:8], "little") == 1504176627


@pytest.mark.slow
def test_real_package_gives_the_files_that_tfds_knows(tmp_path):
    if shutil.which("apt-get") is None:
        pytest.skip("this machine has no apt-get")
    (tmp_path / "scratch").mkdir()
    (tmp_path / "manual").mkdir()
    fashion_mnist.fetch(tmp_path / "manual", tmp_path / "scratch", checksums())
    assert {p.name: packages.sha256(p) for p in (tmp_path / "manual").iterdir()} == checksums()
    assert len(checksums()) == 4
    # All there: nothing is fetched, so that the scratch folder isn't even looked at.
    fashion_mnist.fetch(tmp_path / "manual", tmp_path / "nowhere", checksums())
    # Another file than TFDS's is refused.
    (tmp_path / "scratch2").mkdir()
    wrong = checksums() | {"t10k-labels-idx1-ubyte.gz": "0" * 64}
    with pytest.raises(DatasetError, match=r"t10k-labels-idx1-ubyte\.gz isn't the file that TFDS expects"):
        fashion_mnist.fetch(tmp_path / "manual", tmp_path / "scratch2", wrong)
