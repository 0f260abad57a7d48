"""The contract of image tasks."""

from tests.apps import contract
from tests.apps.contract import *  # noqa: F403


def test_every_task_is_found():
    for name in ["classification", "detection", "segmentation"]:
        assert f"apps.image.{name}" in contract.MODULES
