"""The program that proves that the artefact stands alone."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, run_module


@pytest.fixture
def bundle(trained) -> Path:
    return trained[1] / "saved_models" / "image_classification_mnist_5k"


def test_predicts_every_kind_of_picture(bundle, trained, tmp_path):
    digit = Image.open(trained[1] / "run" / "examples" / "7.png").convert("L")
    digit.save(tmp_path / "grey.png")
    digit.convert("RGB").resize([200, 200]).save(tmp_path / "colour.jpg", quality=95)
    transparent = Image.new("RGBA", digit.size, "white")
    transparent.putalpha(digit)
    transparent.save(tmp_path / "alpha.png")
    digit.convert("P").save(tmp_path / "palette.png")
    Image.fromarray(np.asarray(digit).astype("uint16") * 257).save(tmp_path / "sixteen.png")
    Image.new("RGB", [1, 1]).save(tmp_path / "dot.bmp")
    (tmp_path / "notes.txt").write_text("no picture")
    result = run_module("apps.predict", f"--saved_model={bundle}", "--json", "--top_k=2", str(tmp_path))
    assert result.returncode == 0, result.stderr
    answers = {Path(row["file"]).name: row["predictions"] for row in map(json.loads, result.stdout.splitlines())}
    assert answers.keys() == {"grey.png", "colour.jpg", "alpha.png", "palette.png", "sixteen.png", "dot.bmp"}
    labels = {name: rows[0]["label"] for name, rows in answers.items() if name != "dot.bmp"}
    assert len(set(labels.values())) == 1, labels
    for rows in answers.values():
        assert len(rows) == 2
        assert 1 >= rows[0]["probability"] >= rows[1]["probability"] >= 0


def test_bad_pictures_are_named_and_the_others_predicted(bundle, trained, tmp_path):
    good = trained[1] / "run" / "examples" / "3.png"
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "text.jpg").write_text("no picture")
    paths = [str(tmp_path / name) for name in ("empty.png", "cut.png", "text.jpg", "missing.png")]
    result = run_module("apps.predict", f"--saved_model={bundle}/1", *paths, str(good))
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4
    assert all(path in error for path, error in zip(paths, errors, strict=True))
    assert "No such file" in errors[3]
    assert result.stdout.startswith(f"{good}: ")
    assert "Traceback" not in result.stderr


def test_changed_bundle_is_not_loaded(bundle, trained, tmp_path):
    copy = Path(shutil.copytree(bundle / "1", tmp_path / "1"))
    with open(copy / "variables" / "variables.data-00000-of-00001", "r+b") as file:
        file.seek(5000)
        file.write(b"\x00\x01")
    result = run_module("apps.predict", f"--saved_model={copy}", str(trained[1] / "run" / "examples"))
    assert result.returncode == 1
    assert result.stdout == ""
    assert "variables.data-00000-of-00001 was changed (sha256 differs" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--saved_model=/nowhere", "x.png"], "error: --saved_model=/nowhere is no bundle"),
        (["--saved_model={bundle}"], "error: name the pictures"),
        (["--saved_model={bundle}", "{bundle}"], "holds no picture"),
        (
            ["--saved_model={bundle}", "--signature=serving_int8", "{bundle}/1/saved_model.pb"],
            "--signature=serving_int8",
        ),
    ],
)
def test_bad_input_is_one_clear_line(bundle, arguments, message):
    result = run_module("apps.predict", *[argument.format(bundle=bundle) for argument in arguments])
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_needs_neither_keras_nor_tfhalf(bundle, trained):
    tree = ast.parse((ROOT / "apps" / "predict.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in imported if name.split(".")[0] in ("keras", "tfhalf", "apps")}
    code = (
        "import sys; sys.modules['keras'] = sys.modules['tfhalf'] = None\n"
        f"sys.argv = ['predict', '--saved_model={bundle}', {str(trained[1] / 'run' / 'examples' / '0.png')!r}]\n"
        "from apps import predict; predict.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "0.png: " in result.stdout
