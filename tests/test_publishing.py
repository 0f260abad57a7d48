"""Folders that appear whole or not at all; kills, full disks and races of whole exports are in test_export.py."""

import os

import pytest

from tfhalf import manifest, publishing


def test_appears_whole_and_leaves_nothing_on_failure(tmp_path):
    target = tmp_path / "model" / "1"
    with publishing.staging(target) as stage:
        (stage / "file").write_text("x")
        assert not target.exists()
        publishing.publish(stage, target)
    assert os.listdir(tmp_path / "model") == ["1"]
    with pytest.raises(FileNotFoundError), publishing.staging(tmp_path / "model" / "2") as stage:
        (stage / "missing").read_text()
    assert os.listdir(tmp_path / "model") == ["1"]


def test_what_exists_stays(tmp_path):
    (tmp_path / "1").mkdir()
    with (
        publishing.staging(tmp_path / "1") as stage,
        pytest.raises(manifest.ExportError, match="exists; choose another version"),
    ):
        publishing.publish(stage, tmp_path / "1")
    assert os.listdir(tmp_path) == ["1"]


def test_leftovers_are_swept_but_not_what_is_in_use(tmp_path):
    (tmp_path / ".staging-1-killed").mkdir()
    with publishing.staging(tmp_path / "1") as first, publishing.staging(tmp_path / "2") as second:
        assert sorted(os.listdir(tmp_path)) == sorted([first.name, second.name])
