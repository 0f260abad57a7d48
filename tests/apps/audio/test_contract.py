"""The contract of audio tasks."""

import pytest

from tests.apps import contract
from tests.apps.contract import *  # noqa: F403
from tests.fakes import export_recogniser


@pytest.fixture(autouse=True, scope="module")
def _recogniser(tmp_path_factory):
    """Synthesis needs one; it knows some of Czech's letters."""
    folder = tmp_path_factory.mktemp("models") / "recogniser"
    export_recogniser(folder, list(" abcdehijklmnoprstuvyz"))
    contract.SMALLER["apps.audio.synthesis"].append(f"--recogniser={folder}")


def test_every_task_is_found():
    for name in ["enhancement", "keywords", "recognition", "synthesis"]:
        assert f"apps.audio.{name}" in contract.MODULES
