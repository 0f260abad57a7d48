"""The program that proves that the artefact stands alone."""

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from apps import predict
from tests.conftest import ROOT, run_module

VERMILION, BLUE = (213, 94, 0), (86, 180, 233)  # the first two of the palette, for classes 0 and 1


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
    ("damage", "message"),
    [
        ("metadata", r"manifest\.json was changed"),
        ("link", r"more\.txt is a link or a device"),
        ("no checksum", "is no bundle"),
        ("signature", ""),  # not this program's to judge
    ],
)
def test_what_the_manifest_does_not_hash_is_checked_too(detector, tmp_path, damage, message):
    copy = Path(shutil.copytree(detector, tmp_path / "1"))
    extra = copy / "assets.extra"
    if damage == "metadata":
        text = (extra / "manifest.json").read_text()
        (extra / "manifest.json").write_text(text.replace("tree", "free"))
    elif damage == "link":
        (copy / "assets" / "more.txt").symlink_to("/etc/hostname")
    elif damage == "no checksum":
        (extra / "manifest.sha256").unlink()
    else:
        (extra / "model.sig").write_text("{}")
        assert predict.check_bundle(copy)["metadata"]["task"] == "object_detection"
        return
    with pytest.raises(predict.PredictError, match=message):
        predict.check_bundle(copy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--saved_model=/nowhere", "x.png"], "error: --saved_model=/nowhere is no bundle"),
        (["--saved_model={bundle}"], "error: name what to predict"),
        (["--saved_model={bundle}", "{bundle}"], "holds no picture"),
        (
            ["--saved_model={bundle}", "--signature=serving_int8", "{bundle}/1/saved_model.pb"],
            "--signature=serving_int8",
        ),
        (["--saved_model={bundle}", "--output=drawn", "{bundle}/1/saved_model.pb"], "--output=drawn does nothing"),
        (["--saved_model={bundle}", "--min_score=0.3", "{bundle}/1/saved_model.pb"], "--min_score=0.3 does nothing"),
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
    assert not {name for name in imported if name.split(".")[0] in ("keras", "tfhalf")}
    code = (
        "import sys; sys.modules['keras'] = sys.modules['tfhalf'] = None\n"
        f"sys.argv = ['predict', '--saved_model={bundle}', {str(trained[1] / 'run' / 'examples' / '0.png')!r}]\n"
        "from apps import predict; predict.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "0.png: " in result.stdout


# Detection and segmentation: stand-in models with known answers, in real SavedModels


def publish(module, folder: Path, task: str, class_names: list, **about) -> Path:
    """Saves a module as an app would, with the manifest that predict checks."""
    import tensorflow as tf

    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serve})
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    hashes = {name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for name, path in files.items()}
    metadata = {"task": task, "about": {"class_names": class_names, **about}}
    (folder / "assets.extra").mkdir()
    write_manifest(folder, {"files": hashes, "metadata": metadata})
    return folder


def write_manifest(folder: Path, manifest: dict) -> None:
    """Writes a manifest and its checksum, as `sha256sum` does."""
    text = json.dumps(manifest)
    (folder / "assets.extra" / "manifest.json").write_text(text)
    checksum = f"{hashlib.sha256(text.encode()).hexdigest()}  manifest.json\n"
    (folder / "assets.extra" / "manifest.sha256").write_text(checksum)


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    """Three boxes by the picture's size, and one that only fills up; fails on 13 and says NaN on 11 pixels of width."""
    import tensorflow as tf

    class Detector(tf.Module):
        def __init__(self):
            self.score = tf.Variable([0.9, 0.7, 0.2, 0.0])

        @tf.function(input_signature=[tf.TensorSpec([None] * 4, tf.float32, name="image")], autograph=False)
        def serve(self, image):
            height, width = tf.unstack(tf.cast(tf.shape(image)[1:3], tf.float32))
            tf.debugging.assert_none_equal(width, 13.0, message="no picture of 13 pixels")
            parts = tf.constant([[0.5, 0.25, 0.75, 0.75], [0.25, 0.75, 0.5, 1], [0, 0, 1, 1], [np.nan] * 4])
            boxes = parts * tf.stack([height, width, height, width])
            scores = self.score * tf.where(width == 11, np.nan, 1.0)
            answer = {"boxes": boxes, "scores": scores, "class_ids": tf.constant([0, 1, 0, 7]), "count": tf.constant(3)}
            return {name: value[tf.newaxis] for name, value in answer.items()}

    return publish(Detector(), tmp_path_factory.mktemp("detector") / "1", "object_detection", ["tree", "car"])


@pytest.fixture(scope="module")
def segmenters(tmp_path_factory) -> dict[str, Path]:
    """Class 1 is where the first channel is at least 128; once with two kinds of surface, once with a background."""
    import tensorflow as tf

    class Segmenter(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None] * 4, tf.float32, name="image")], autograph=False)
        def serve(self, image):
            class_map = tf.cast(image[..., 0] >= 128, tf.int32)
            return {"class_map": class_map, "probabilities": tf.one_hot(class_map, 2)}

    folder = tmp_path_factory.mktemp("segmenters")
    kinds = {"surface": ["ocean", "land"], "thing": ["background", "moon"]}
    task = "semantic_segmentation"
    return {kind: publish(Segmenter(), folder / kind / "1", task, names) for kind, names in kinds.items()}


def answer(capsys, folder: Path, *files: Path | str, status: int = 0, **options) -> tuple[list, list]:
    """Predicts in this process: (what was printed, errors), in lines."""
    assert (
        predict.predict(str(folder), "serving_default", [str(file) for file in files], predict.Options(**options))
        == status
    )
    printed = capsys.readouterr()
    return printed.out.splitlines(), [line for line in printed.err.splitlines() if line.startswith("error: ")]


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, [height, width, channels], dtype=np.uint8)


def halves(height: int = 60, width: int = 200) -> np.ndarray:
    """Dark on the left, bright on the right half, and noise in both."""
    return np.where(np.arange(width)[:, np.newaxis] < width // 2, 0, 128).astype(np.uint8) + noise(height, width) // 2


def test_boxes_printed_and_drawn(detector, tmp_path):
    """The real command: exact numbers, outlines where the boxes are, the picture elsewhere."""
    pixels = noise(200, 400)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    output = tmp_path / "new" / "drawn.png"
    arguments = ["apps.predict", f"--saved_model={detector.parent}", f"--output={output}", str(tmp_path / "a.png")]
    result = run_module(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {
        "file": str(tmp_path / "a.png"),
        "boxes": [
            {"label": "tree", "score": 0.9, "ymin": 100.0, "xmin": 100.0, "ymax": 150.0, "xmax": 300.0},
            {"label": "car", "score": 0.7, "ymin": 50.0, "xmin": 300.0, "ymax": 100.0, "xmax": 400.0},
        ],
    }
    assert os.listdir(output.parent) == ["drawn.png"]
    drawn = np.asarray(Image.open(output))
    assert drawn.shape == pixels.shape
    # ymax and xmax are edges: the last row inside is ymax - 1.
    assert (drawn[149, 100:300] == VERMILION).all()
    assert (drawn[100:150, 299] == VERMILION).all()
    assert (drawn[100:150, 100] == VERMILION).all()
    assert (drawn[100, 100:300] == VERMILION).all()
    assert (drawn[99, 350:400] == BLUE).all()
    assert (drawn[50:100, 399] == BLUE).all()
    # Two pixels wide; inside, around, and where the third box (0.2) would be, nothing is touched.
    for rows, columns in (
        (slice(102, 148), slice(102, 298)),
        (slice(150, 200), slice(0, 400)),
        (slice(0, 35), slice(0, 400)),
        (slice(100, 200), slice(0, 100)),
        (slice(100, 200), slice(300, 400)),
    ):
        assert (drawn[rows, columns] == pixels[rows, columns]).all()
    label = drawn[90:100, 100:130].reshape(-1, 3)  # right above the box
    assert (label == VERMILION).all(axis=1).mean() > 0.5
    assert (label == (255, 255, 255)).all(axis=1).any()


def test_min_score_and_text(detector, tmp_path, capsys):
    file = tmp_path / "a.png"
    Image.fromarray(noise(40, 80)).save(file)
    tree, car = "tree 0.90 at (ymin 20, xmin 20, ymax 30, xmax 60)", "car 0.70 at (ymin 10, xmin 60, ymax 20, xmax 80)"
    assert answer(capsys, detector, file) == ([f"{file}: 2 boxes: {tree}, {car}"], [])
    # 0.7 is below 0.7 in float32, but who reads 0.7 and asks for 0.7 gets it.
    assert answer(capsys, detector, file, min_score=0.7) == ([f"{file}: 2 boxes: {tree}, {car}"], [])
    assert answer(capsys, detector, file, min_score=0.8) == ([f"{file}: 1 box: {tree}"], [])
    lines, _ = answer(capsys, detector, file, min_score=0.0)
    assert lines == [f"{file}: 3 boxes: {tree}, {car}, tree 0.20 at (ymin 0, xmin 0, ymax 40, xmax 80)"]
    assert answer(capsys, detector, file, min_score=1.0, output=f"{tmp_path}/none.png") == ([f"{file}: 0 boxes"], [])
    assert (np.asarray(Image.open(tmp_path / "none.png")) == noise(40, 80)).all()


def test_long_lines_are_cut():
    row = {"label": "tree", "score": 0.5, "ymin": 0.0, "xmin": 1.0, "ymax": 2.0, "xmax": 3.0}
    text = predict._boxes_as_text({"boxes": [row] * 12})
    assert text.startswith("12 boxes: tree 0.50 at ")
    assert text.endswith(", and 9 more")
    assert text.count("tree") == 3


def test_shares_printed_and_masks_drawn(segmenters, tmp_path):
    """The real command: both halves are blended with their colours, and a strip names them."""
    Image.fromarray(halves()).save(tmp_path / "a.png")
    arguments = ["apps.predict", f"--saved_model={segmenters['surface']}", f"--output={tmp_path}/drawn"]
    result = run_module(*arguments, str(tmp_path / "a.png"), "--json")
    assert result.returncode == 0, result.stderr
    expected = {"file": f"{tmp_path}/a.png", "shares": {"ocean": 0.5, "land": 0.5}, "height": 60, "width": 200}
    assert json.loads(result.stdout) == expected
    drawn = np.asarray(Image.open(tmp_path / "drawn" / "a.png"))
    assert drawn.shape == (78, 200, 3)  # one line of the strip: 1.5 times 12 pixels
    for columns, colour in ((slice(0, 100), VERMILION), (slice(100, 200), BLUE)):
        blended = (halves()[:, columns].astype(float) + colour) / 2
        np.testing.assert_allclose(drawn[:60, columns], blended, atol=1)
    strip = drawn[60:].reshape(-1, 3)
    for colour in (VERMILION, BLUE):
        assert (strip == colour).all(axis=1).sum() > 50
    assert (strip == (255, 255, 255)).all(axis=1).mean() > 0.5


def test_background_is_not_masked(segmenters, tmp_path, capsys):
    file, dark = tmp_path / "a.png", tmp_path / "dark.png"
    Image.fromarray(halves()).save(file)
    Image.fromarray(halves()[:, :100]).save(dark)
    lines, _ = answer(capsys, segmenters["thing"], file, dark, output=f"{tmp_path}/drawn")
    assert lines == [f"{file}: background 50.0%, moon 50.0%", f"{dark}: background 100.0%"]
    drawn = np.asarray(Image.open(tmp_path / "drawn" / "a.png"))[:60]
    assert (drawn[:, :100] == halves()[:, :100]).all()
    np.testing.assert_allclose(drawn[:, 100:], (halves()[:, 100:].astype(float) + BLUE) / 2, atol=1)
    assert (np.asarray(Image.open(tmp_path / "drawn" / "dark.png")) == halves()[:, :100]).all()


def test_every_kind_of_picture_is_drawn_as_the_model_sees_it(detector, segmenters, tmp_path, capsys):
    grey, colour, alpha = noise(40, 80, 1)[..., 0], noise(40, 80), noise(40, 80, 4)
    palette = Image.fromarray(colour).quantize(16)
    pictures = {"grey": Image.fromarray(grey), "colour": Image.fromarray(colour), "palette": palette}
    pictures["sixteen"] = Image.fromarray(grey.astype(np.uint16) * 257)
    pictures["alpha"] = Image.fromarray(alpha)
    pictures["grey_alpha"] = Image.fromarray(alpha[..., 2:])
    over_black = {name: alpha[..., part] * (alpha[..., 3:] / 255) for name, part in (("c", slice(3)), ("g", [2] * 3))}
    seen = {"grey": grey[..., np.newaxis], "colour": colour, "palette": np.asarray(palette.convert("RGB"))}
    seen |= {"sixteen": seen["grey"], "alpha": over_black["c"], "grey_alpha": over_black["g"]}
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
    files = [tmp_path / f"{name}.png" for name in pictures]
    lines, errors = answer(capsys, detector, *files, output=f"{tmp_path}/drawn")
    assert (len(lines), errors) == (len(files), [])
    for name, expected in seen.items():
        drawn = Image.open(tmp_path / "drawn" / f"{name}.png")
        assert (drawn.mode, drawn.size) == ("RGB", (80, 40)), name
        far = np.asarray(drawn)[31:].astype(float)  # below all boxes
        np.testing.assert_allclose(far, np.broadcast_to(expected, [40, 80, 3])[31:], atol=0.51, err_msg=name)
        assert (np.asarray(drawn)[29, 20:60] == VERMILION).all()
    lines, errors = answer(capsys, segmenters["surface"], *files, output=f"{tmp_path}/masked")
    assert (len(lines), errors) == (len(files), [])
    assert {Image.open(path).width for path in (tmp_path / "masked").iterdir()} == {80}


def test_smallest_picture_is_drawn(detector, segmenters, tmp_path, capsys):
    Image.new("RGB", [1, 1]).save(tmp_path / "dot.bmp")
    for folder in (detector, segmenters["surface"]):
        answer(capsys, folder, tmp_path / "dot.bmp", output=f"{tmp_path}/drawn")
        assert Image.open(tmp_path / "drawn" / "dot.png").width == 1


def test_pictures_that_fail_leave_the_others_drawn(detector, tmp_path, capsys):
    """A damaged file, one that the model fails on, one that it answers NaN for."""
    Image.fromarray(noise(20, 40)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    Image.fromarray(noise(20, 13)).save(tmp_path / "c.png")
    Image.fromarray(noise(20, 11)).save(tmp_path / "d.png")
    Image.fromarray(noise(20, 40)).save(tmp_path / "e.png")
    files = sorted(tmp_path.glob("*.png"))
    lines, errors = answer(capsys, detector, *files, status=1, output=f"{tmp_path}/drawn")
    assert [line.split(":")[0] for line in lines] == [str(files[0]), str(files[4])]
    assert len(errors) == 3
    assert f"{files[1]} can't be read" in errors[0]
    assert f"{files[2]}: the model failed: " in errors[1]
    assert "no picture of 13 pixels" in errors[1]
    assert "stack traces" not in errors[1]
    assert errors[2] == f"error: {files[3]}: the model failed: scores holds NaN or infinity"
    assert sorted(os.listdir(tmp_path / "drawn")) == ["a.png", "e.png"]


@pytest.mark.parametrize(
    ("output", "names", "message"),
    [
        ("drawn", ["a.png", "sub/a.jpg"], "{0} and {1} would both be drawn as"),
        ("drawn.png", ["a.png", "b.png"], "is one file for 2 pictures"),
        ("drawn.jpg", ["a.png"], "drawn as PNG"),
        ("a.png", ["a.png"], "is a picture to predict"),
        ("", ["sub/a.jpg", "a.png"], "is a picture to predict"),
        ("", ["a.png"], "is a picture to predict"),
        ("file/drawn", ["a.png"], "can't make the folder"),
        ("file/drawn.png", ["a.png"], "can't make the folder"),
        ("file", ["a.png"], "can't make the folder"),
    ],
)
def test_output_that_would_lose_a_picture_is_refused(detector, tmp_path, capsys, output, names, message):
    (tmp_path / "sub").mkdir()
    (tmp_path / "file").write_text("no folder")
    files = [tmp_path / name for name in names]
    for file in files:
        Image.fromarray(noise(20, 40)).save(file)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    output = str(tmp_path / output)
    with pytest.raises(predict.PredictError) as error:
        answer(capsys, detector, *files, output=output)
    assert str(error.value).startswith(f"--output={output}")
    assert message.format(*files) in str(error.value)
    assert capsys.readouterr().out == ""
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_picture_that_cannot_be_written_is_one_line(detector, tmp_path):
    Image.fromarray(noise(20, 40)).save(tmp_path / "a.png")
    (tmp_path / "drawn" / "a.png").mkdir(parents=True)
    arguments = [f"--saved_model={detector}", f"--output={tmp_path}/drawn", str(tmp_path / "a.png")]
    result = run_module("apps.predict", *arguments)
    assert result.returncode == 1
    assert f"error: --output={tmp_path}/drawn: can't write {tmp_path}/drawn/a.png: Is a directory" in result.stderr
    assert "Traceback" not in result.stderr
    assert os.listdir(tmp_path / "drawn") == ["a.png"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("detector", {"top_k": 3}),
        ("segmenter", {"top_k": 3}),
        ("segmenter", {"min_score": 0.5}),
    ],
)
def test_flags_without_effect_are_refused(detector, segmenters, kind, options, capsys):
    """Though they have their default's value."""
    folder = detector if kind == "detector" else segmenters["surface"]
    flag, value = next(iter(options.items()))
    with pytest.raises(predict.PredictError, match=f"--{flag}={value} does nothing for .* leave it out"):
        answer(capsys, folder, Path("missing.png"), **options)


def test_bundles_that_keep_no_contract(detector, segmenters, tmp_path, capsys):
    Image.fromarray(halves()).save(tmp_path / "a.png")

    def change(folder: Path, **metadata) -> Path:
        copy = Path(shutil.copytree(folder, tmp_path / f"{len(list(tmp_path.iterdir()))}"))
        manifest = json.loads((copy / "assets.extra" / "manifest.json").read_text())
        manifest["metadata"] |= metadata
        write_manifest(copy, manifest)
        return copy

    for folder, message in (
        (change(detector, task="poetry"), "a bundle for 'poetry'; this program knows image_classification, object_det"),
        (change(detector, about={}), "doesn't name the classes"),
        (change(detector, task="semantic_segmentation"), "doesn't give class_map, probabilities"),
    ):
        with pytest.raises(predict.PredictError, match=message):
            answer(capsys, folder, tmp_path / "a.png")
    few = change(segmenters["surface"], about={"class_names": ["ocean"]})
    _, errors = answer(capsys, few, tmp_path / "a.png", status=1)
    assert "class_map is beyond the 1 classes" in errors[0]


# Texts


@pytest.fixture(scope="module")
def readers(tmp_path_factory) -> dict[str, Path]:
    """Stand-ins that answer by a text's number of bytes; the text NaN makes them say NaN."""
    import tensorflow as tf

    def number(text):
        length = tf.cast(tf.strings.length(text), tf.float32)
        return tf.where(text == "NaN", np.nan, length)

    class Classifier(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")], autograph=False)
        def serve(self, text):
            share = number(text) / 100
            return {"probabilities": tf.stack([1 - share, share], axis=1)}

    class Rater(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")], autograph=False)
        def serve(self, text):
            return {"rating": number(text) / 10 - 1}

    class Translator(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")], autograph=False)
        def serve(self, text):
            return {"translation": tf.strings.upper(text, encoding="utf-8"), "score": -number(text)}

    folder, names = tmp_path_factory.mktemp("readers"), ["short", "long"]
    return {
        "topic": publish(Classifier(), folder / "topic" / "1", "text_classification", names),
        "sentiment": publish(Classifier(), folder / "sentiment" / "1", "sentiment", names),
        "graded": publish(Rater(), folder / "graded" / "1", "sentiment", names, graded=True),
        "translation": publish(Translator(), folder / "translation" / "1", "machine_translation", []),
    }


def test_texts_files_and_folders_are_read(readers, tmp_path, capsys):
    (tmp_path / "b.txt").write_text("é" * 20, encoding="utf-8")
    (tmp_path / "a.TXT").write_text("x" * 10 + "\n")
    (tmp_path / "not a text.png").write_bytes(b"")
    lines, errors = answer(capsys, readers["topic"], "y" * 30, tmp_path, tmp_path / "b.txt", "", "a\nb", top_k=1)
    long, inside = "y" * 30, f"{tmp_path}/"
    assert lines == [
        f'"{long}": short 70.0%',
        f"{inside}a.TXT: short 89.0%",
        f"{inside}b.txt: short 60.0%",
        f"{inside}b.txt: short 60.0%",
        '"": short 100.0%',
        '"a b": short 97.0%',
    ]
    assert errors == []
    assert answer(capsys, readers["sentiment"], "y" * 80)[0][0].endswith('y…": long 80.0%, short 20.0%')


def test_ratings_and_translations(readers, capsys):
    assert answer(capsys, readers["graded"], "x" * 25, "") == (['"' + "x" * 25 + '": +1.50', '"": -1.00'], [])
    lines, errors = answer(capsys, readers["translation"], "Günther 🤗")
    assert (lines, errors) == (['"Günther 🤗": GÜNTHER 🤗'], [])
    (line,), _ = answer(capsys, readers["translation"], "é\n", as_json=True)
    assert json.loads(line) == {"text": "é\n", "translation": "É\n", "score": -3.0}


def test_bad_texts_are_named_and_the_others_predicted(readers, tmp_path, capsys):
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    arguments = [tmp_path / "latin1.txt", "NaN", tmp_path / "missing.txt", "good"]
    lines, errors = answer(capsys, readers["topic"], *arguments, status=1, top_k=1)
    assert lines == ['"good": short 96.0%']
    assert errors == [
        f"error: {tmp_path}/latin1.txt isn't a text in UTF-8: byte 0 is unexpected end of data",
        'error: "NaN": the model failed: probabilities holds NaN or infinity',
        f"error: {tmp_path}/missing.txt: No such file or directory",
    ]
    with pytest.raises(predict.PredictError, match=r"empty holds no text \(.txt\)"):
        answer(capsys, readers["topic"], tmp_path / "empty")
    with pytest.raises(predict.PredictError, match=r"--top_k=2 does nothing for .*, a bundle for graded sentiment"):
        answer(capsys, readers["graded"], "x", top_k=2)
    with pytest.raises(predict.PredictError, match=r"--output=x does nothing for .*, a bundle for machine_translation"):
        answer(capsys, readers["translation"], "x", output="x")


# Sounds


@pytest.fixture(scope="module")
def listeners(tmp_path_factory) -> dict[str, Path]:
    """Stand-ins that answer by a sound's number of samples, or with sound."""
    import tensorflow as tf

    heard = [tf.TensorSpec([None, None], tf.float32, name="waveform"), tf.TensorSpec([None], tf.int32, name="length")]

    class Recogniser(tf.Module):
        @tf.function(input_signature=heard, autograph=False)
        def serve(self, waveform, length):
            peak = tf.reduce_max(tf.abs(waveform), axis=1)
            said = tf.strings.join([tf.strings.as_string(length), tf.strings.as_string(peak, precision=2)], " é ")
            return {"text": said, "score": -peak}

    class Spotter(tf.Module):
        @tf.function(input_signature=heard, autograph=False)
        def serve(self, waveform, length):
            share = tf.reduce_max(waveform, axis=1)
            return {"probabilities": tf.stack([1 - share, share], axis=1)}

    class Enhancer(tf.Module):
        @tf.function(input_signature=heard, autograph=False)
        def serve(self, waveform, length):
            return {"waveform": 4 * waveform[:, ::-1]}

    class Speaker(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")], autograph=False)
        def serve(self, text):
            length = 100 * tf.strings.length(text)
            return {"waveform": 0.5 * tf.ones([tf.size(text), 16_000]), "length": length}

    folder = tmp_path_factory.mktemp("listeners")

    def put(module, task, names=(), rate=8_000):
        return publish(module, folder / task / "1", task, list(names), sampling_rate=rate)

    return {
        "recognition": put(Recogniser(), "speech_recognition"),
        "keywords": put(Spotter(), "keyword_spotting", ["quiet", "loud"]),
        "enhancement": put(Enhancer(), "speech_enhancement"),
        "synthesis": put(Speaker(), "speech_synthesis"),
        "no rate": publish(Enhancer(), folder / "no rate" / "1", "speech_enhancement", []),
    }


def write_sound(path: Path, samples, rate: int = 8_000) -> Path:
    soundfile.write(path, samples, rate)
    return path


def test_sounds_of_every_kind_are_heard_at_the_model_s_rate(listeners, tmp_path, capsys):
    tone = 0.5 * np.sin(np.arange(8_000) / 3)
    write_sound(tmp_path / "a.wav", tone)
    write_sound(tmp_path / "b.FLAC", np.stack([tone, tone], axis=1))
    write_sound(tmp_path / "c.ogg", np.zeros(16_000), rate=16_000)
    (tmp_path / "notes.txt").write_text("no sound")
    lines, errors = answer(capsys, listeners["recognition"], tmp_path, as_json=True)
    answers = {Path(row.pop("file")).name: row for row in map(json.loads, lines)}
    assert errors == []
    transcripts = {name: row["transcript"] for name, row in answers.items()}
    assert transcripts == {"a.wav": "8000 é 0.50", "b.FLAC": "8000 é 0.50", "c.ogg": "8000 é 0.00"}
    assert answers["a.wav"]["score"] == pytest.approx(-0.5, abs=1e-4)
    (line,), _ = answer(capsys, listeners["keywords"], write_sound(tmp_path / "a.wav", tone + 0.25), top_k=1)
    assert line.endswith("a.wav: loud 75.0%")


def test_bad_sounds_are_named_and_the_others_heard(listeners, tmp_path, capsys):
    good = write_sound(tmp_path / "good.wav", np.full(10, 0.25))
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "cut.wav").write_bytes(good.read_bytes()[:50])
    (tmp_path / "text.ogg").write_text("no sound")
    paths = [tmp_path / name for name in ("empty.wav", "cut.wav", "text.ogg", "missing.flac")]
    lines, errors = answer(capsys, listeners["recognition"], *paths, good, status=1)
    assert lines == [f"{good}: 10 é 0.25"]
    assert len(errors) == 4
    assert all(str(path) in error for path, error in zip(paths, errors, strict=True))


def test_answers_that_are_sound_are_written(listeners, tmp_path, capsys):
    ramp = write_sound(tmp_path / "ramp.wav", np.linspace(0, 0.75, 4_000))
    out = tmp_path / "out"
    lines, _ = answer(capsys, listeners["enhancement"], ramp, output=out)
    assert lines == [f"{ramp}: 0.50 s in {out}/ramp.wav"]
    samples, rate = soundfile.read(out / "ramp.wav")
    assert rate == 8_000
    np.testing.assert_allclose(samples, np.clip(4 * np.linspace(0.75, 0, 4_000), -1, 1), atol=2**-12)
    (line,), _ = answer(capsys, listeners["enhancement"], ramp, output=tmp_path / "one.WAV", as_json=True)
    assert json.loads(line) == {"file": str(ramp), "seconds": 0.5, "output": f"{tmp_path}/one.WAV"}
    assert not list(tmp_path.rglob("*.part"))


def test_texts_are_spoken_into_files(listeners, tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("eight...")
    out = tmp_path / "out"
    lines, _ = answer(capsys, listeners["synthesis"], "one two", tmp_path / "letter.txt", "", output=out)
    assert lines == [
        f'"one two": 0.09 s in {out}/text1.wav',
        f"{tmp_path}/letter.txt: 0.10 s in {out}/letter.wav",
        f'"": 0.00 s in {out}/text3.wav',
    ]
    for name, length in (("text1", 700), ("letter", 800), ("text3", 0)):
        samples, rate = soundfile.read(out / f"{name}.wav")
        assert (len(samples), rate) == (length, 8_000)
    (line,), _ = answer(capsys, listeners["synthesis"], "ab", output=tmp_path / "one.wav", as_json=True)
    assert json.loads(line) == {"text": "ab", "seconds": 0.025, "output": f"{tmp_path}/one.wav"}
    for arguments, output, message in [
        (["a", "b"], tmp_path / "x.wav", "is one file for 2 sounds; name a folder"),
        (["a"], None, "--output is missing: .* answers with sound; name a folder"),
    ]:
        with pytest.raises(predict.PredictError, match=message):
            answer(capsys, listeners["synthesis"], *arguments, output=output)


def test_where_sound_is_not_written(listeners, tmp_path, capsys):
    ramp = write_sound(tmp_path / "ramp.wav", np.linspace(0, 0.75, 4_000))
    before = ramp.read_bytes()
    for kind, arguments, output, message in [
        ("enhancement", [ramp], None, "--output is missing: .* answers with sound; name a folder"),
        ("enhancement", [ramp], tmp_path, r"ramp.wav is a sound to predict; take another folder"),
        ("enhancement", [ramp], tmp_path / "x.flac", r"sounds are written as WAV; name a folder or a file .wav"),
        ("enhancement", [ramp, ramp], tmp_path / "x.wav", r"is one file for 2 sounds; name a folder"),
        ("recognition", [ramp], tmp_path, r"--output=.* does nothing for .* speech_recognition"),
    ]:
        with pytest.raises(predict.PredictError, match=message):
            answer(capsys, listeners[kind], *arguments, output=output)
    assert ramp.read_bytes() == before
    with pytest.raises(predict.PredictError, match="doesn't name the sampling rate; export the model again"):
        answer(capsys, listeners["no rate"], ramp, output=tmp_path / "out")
