"""The contract of audio tasks."""

from tests.apps import contract
from tests.apps.contract import *  # noqa: F403


def test_every_task_is_found():
    for name in ["enhancement", "keywords", "recognition"]:
        assert f"apps.audio.{name}" in contract.MODULES
