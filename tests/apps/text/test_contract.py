"""The contract of text tasks."""

from tests.apps import contract
from tests.apps.contract import *  # noqa: F403


def test_every_task_is_found():
    for name in ["classification", "sentiment", "translation"]:
        assert f"apps.text.{name}" in contract.MODULES
