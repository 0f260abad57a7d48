"""Predicts with an exported bundle: TensorFlow and the bundle, nothing else.

    python -m apps.predict --saved_model=saved_models/image_classification_mnist_5k/1 picture.png folder/
    python -m apps.predict --saved_model=saved_models/image_classification_mnist_5k --json picture.png

It imports neither Keras nor tfhalf, so what it prints is what any server would answer. Every file's sha256 is checked
against the manifest before anything is loaded. A picture that can't be read gets an error line and exit status 1; the
others are predicted all the same.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
from absl import app, flags

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
_MANIFEST = "assets.extra/manifest.json"


class PredictError(Exception):
    """Something that the user can mend."""


def define_flags(values: flags.FlagValues) -> None:
    """Defines this program's flags."""
    flags.DEFINE_string("saved_model", None, "Bundle: a version folder, or the folder above it (then its newest "
                        "version is taken).", flag_values=values, required=True)  # fmt: skip
    flags.DEFINE_string(
        "signature", "serving_default", "serving_default, serving_float32 or serving_bfloat16.", flag_values=values
    )
    flags.DEFINE_integer("top_k", 3, "Classes to print for each picture, 1 or more.", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("json", False, "Print one JSON object a line instead of text.", flag_values=values)


def main() -> None:
    """Runs the program."""
    define_flags(flags.FLAGS)
    app.run(lambda argv: sys.exit(_exit_code(flags.FLAGS, argv[1:])))


def _exit_code(values: flags.FlagValues, paths: list[str]) -> int:
    try:
        return predict(values.saved_model, values.signature, _files(paths), values.top_k, values.json)
    except PredictError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def predict(saved_model: str, signature: str, files: list[Path], top_k: int, as_json: bool) -> int:
    """Prints a prediction for each picture; returns the exit status."""
    folder = find_bundle(Path(saved_model))
    manifest = check_bundle(folder)
    task = manifest["metadata"].get("task")
    if task != "image_classification":
        raise PredictError(f"{folder} is a bundle for {task!r}; this program knows image_classification")
    names = manifest["metadata"].get("about", {}).get("class_names")
    if not names:
        raise PredictError(f"{folder}: its manifest doesn't name the classes; export the model again")
    loaded = tf.saved_model.load(str(folder))
    if signature not in loaded.signatures:
        raise PredictError(f"--signature={signature}: {folder} has {', '.join(sorted(loaded.signatures))}")
    function = loaded.signatures[signature]
    failures = 0
    for file in files:
        try:
            picture = read_picture(file)
        except PredictError as error:
            failures += 1
            print(f"error: {error}", file=sys.stderr)
            continue
        probabilities = function(image=tf.constant(picture[np.newaxis]))["probabilities"].numpy()[0]
        best = np.argsort(-probabilities)[:top_k]
        answer = [{"label": names[index], "probability": round(float(probabilities[index]), 6)} for index in best]
        if as_json:
            print(json.dumps({"file": str(file), "predictions": answer}))
        else:
            print(f"{file}: " + ", ".join(f"{row['label']} {row['probability']:.1%}" for row in answer))
    return 1 if failures else 0


def find_bundle(folder: Path) -> Path:
    """Returns the folder itself if it is a version folder, else its newest version."""
    if (folder / "saved_model.pb").exists() or (folder / _MANIFEST).exists():
        return folder
    versions = [entry for entry in folder.glob("*") if entry.name.isdigit() and entry.is_dir()]
    if not versions:
        raise PredictError(f"--saved_model={folder} is no bundle and has no version in it")
    return max(versions, key=lambda entry: int(entry.name))


def check_bundle(folder: Path) -> dict:
    """Returns the manifest after comparing every file with it."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        expected = {name: about["sha256"] for name, about in manifest["files"].items()}
        manifest["metadata"].get("task")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PredictError(f"{folder} is no bundle: can't read {_MANIFEST} ({error})") from error
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()} - {_MANIFEST}
    for name in sorted(present ^ expected.keys()):
        raise PredictError(
            f"{folder}: {name} is {'missing' if name in expected else 'not in the manifest'}; nothing was loaded"
        )
    for name, digest in expected.items():
        with open(folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise PredictError(
                    f"{folder}: {name} was changed (sha256 differs from the manifest); nothing was loaded"
                )
    return manifest


def read_picture(path: Path) -> np.ndarray:
    """Returns a picture as float32 `[height, width, 1 to 4]`, 0 to 255; of a GIF the first frame."""
    try:
        picture = tf.io.decode_image(path.read_bytes(), expand_animations=False).numpy()
    except OSError as error:
        raise PredictError(f"{path}: {error.strerror}") from error
    except tf.errors.InvalidArgumentError as error:
        raise PredictError(
            f"{path} can't be read as a picture (PNG, JPEG, GIF, BMP, WebP): is it empty or damaged?"
        ) from error
    return picture.astype(np.float32)


def _files(paths: list[str]) -> list[Path]:
    """The pictures among files and folders, in order."""
    if not paths:
        raise PredictError("name the pictures: python -m apps.predict --saved_model=FOLDER picture.png folder/ ...")
    files = []
    for path in map(Path, paths):
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES) if path.is_dir() else [path]
        if not found:
            raise PredictError(f"{path} holds no picture ({', '.join(_SUFFIXES)})")
        files += found
    return files


if __name__ == "__main__":
    main()
