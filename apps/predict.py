"""Predicts with an exported bundle: TensorFlow, Pillow to draw, and nothing of ours.

    python -m apps.predict --saved_model=saved_models/image_classification_mnist_5k/1 picture.png folder/
    python -m apps.predict --saved_model=saved_models/image_classification_mnist_5k --json picture.png
    python -m apps.predict --saved_model=saved_models/object_detection_deepforest --output=drawn/ folder/
    python -m apps.predict --saved_model=saved_models/semantic_segmentation_blue_marble --output=land.png earth.jpg

The manifest says which task a bundle is for: image_classification prints the likeliest classes, object_detection the
boxes, semantic_segmentation each class' share of the pixels. `--output` draws boxes or masks over the pictures.

It imports neither Keras nor tfhalf, so what it prints is what any server would answer. Every file's sha256 is checked
against the manifest before anything is loaded. A picture that can't be read or predicted gets an error line and exit
status 1; the others are predicted all the same.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import app, flags
from PIL import Image, ImageDraw, ImageFont

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
_MANIFEST = "assets.extra/manifest.json"
_TOP_K, _MIN_SCORE = 3, 0.5
_NUM_TOLD = 3  # boxes or classes in a line of text; --json has all

# Okabe and Ito, "Color universal design", 2008 (https://jfly.uni-koeln.de/color/): told apart by colour-blind people.
# Black is left out, which is no colour on a dark picture. After seven classes come darker shades of the same.
_COLOURS = ((213, 94, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (204, 121, 167), (230, 159, 0))
_SHADES = (1, 0.6, 0.35)
_MASK_OPACITY = 0.5
_BACKGROUND = "background"  # a class of this name is what isn't any other: it stays as it is


class PredictError(Exception):
    """Something that the user can mend."""


class Options(NamedTuple):
    """What to print and draw; None is a flag that wasn't given."""

    as_json: bool = False
    top_k: int | None = None
    min_score: float | None = None
    output: str | None = None


class Task(NamedTuple):
    """A kind of bundle.

    outputs: what its signatures must give.
    flags: which of `top_k`, `min_score` and `output` have an effect.
    answer: outputs for one picture, class names, options -> a JSON object.
    text: that object -> a line of text.
    draw: picture, outputs, that object, class names -> the picture with what was found; None where nothing is drawn.
    """

    outputs: tuple[str, ...]
    flags: tuple[str, ...]
    answer: Callable[[dict, list, Options], dict]
    text: Callable[[dict], str]
    draw: Callable[[Image.Image, dict, dict, list], Image.Image] | None = None


def define_flags(values: flags.FlagValues) -> None:
    """Defines this program's flags."""
    flags.DEFINE_string("saved_model", None, "Bundle: a version folder, or the folder above it (then its newest "
                        "version is taken).", flag_values=values, required=True)  # fmt: skip
    flags.DEFINE_string(
        "signature", "serving_default", "serving_default, serving_float32 or serving_bfloat16.", flag_values=values
    )
    # These three have no default here: given with a task that they do nothing for, they are an error.
    flags.DEFINE_integer("top_k", None, f"Classification: classes to print for each picture, 1 or more; {_TOP_K} if "
                         "not given.", lower_bound=1, flag_values=values)  # fmt: skip
    flags.DEFINE_float("min_score", None, "Detection: boxes with a lower score, 0 to 1, are neither printed nor drawn; "
                       f"{_MIN_SCORE} if not given.", lower_bound=0, upper_bound=1, flag_values=values)  # fmt: skip
    flags.DEFINE_string("output", None, "Detection and segmentation: where to draw boxes or masks over the pictures: "
                        "a folder, made if missing; for one picture also a file that ends in .png.",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_bool("json", False, "Print one JSON object a line instead of text.", flag_values=values)


def main() -> None:
    """Runs the program."""
    define_flags(flags.FLAGS)
    app.run(lambda argv: sys.exit(_exit_code(flags.FLAGS, argv[1:])))


def _exit_code(values: flags.FlagValues, paths: list[str]) -> int:
    options = Options(values.json, values.top_k, values.min_score, values.output)
    try:
        return predict(values.saved_model, values.signature, _files(paths), options)
    except PredictError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def predict(saved_model: str, signature: str, files: list[Path], options: Options) -> int:
    """Prints, and draws where `output` says, a prediction for each picture; returns the exit status."""
    folder = find_bundle(Path(saved_model))
    task, names = _task(folder, check_bundle(folder)["metadata"], options)
    targets = _targets(options.output, files)
    # Kept until the end: a signature holds its weights by weak references only.
    loaded = tf.saved_model.load(str(folder))
    function = _signature(folder, loaded.signatures, signature, task)
    failures = 0
    for file, target in zip(files, targets, strict=True):
        try:
            picture = read_picture(file)
            outputs = _run(function, file, picture, names)
        except PredictError as error:
            failures += 1
            print(f"error: {error}", file=sys.stderr)
            continue
        answer = task.answer(outputs, names, options)
        if target is not None:
            _save(task.draw(_as_rgb(picture), outputs, answer, names), target, options.output)
        print(json.dumps({"file": str(file), **answer}) if options.as_json else f"{file}: {task.text(answer)}")
    return 1 if failures else 0


def _task(folder: Path, metadata: dict, options: Options) -> tuple[Task, list]:
    """The bundle's task and class names; refuses flags that would do nothing."""
    name = metadata.get("task")
    if name not in _TASKS:
        raise PredictError(f"{folder} is a bundle for {name!r}; this program knows {', '.join(_TASKS)}")
    for flag in ("top_k", "min_score", "output"):
        value = getattr(options, flag)
        if value is not None and flag not in _TASKS[name].flags:
            raise PredictError(f"--{flag}={value} does nothing for {folder}, a bundle for {name}: leave it out")
    names = metadata.get("about", {}).get("class_names")
    if not names:
        raise PredictError(f"{folder}: its manifest doesn't name the classes; export the model again")
    return _TASKS[name], names


def _signature(folder: Path, signatures, name: str, task: Task):
    if name not in signatures:
        served = sorted(other for other in signatures if not other.endswith("_raw"))
        raise PredictError(f"--signature={name}: {folder} has {', '.join(served)}")
    missing = set(task.outputs) - signatures[name].structured_outputs.keys()
    if missing:
        raise PredictError(f"{folder}: {name} doesn't give {', '.join(sorted(missing))}; leave --signature out")
    return signatures[name]


def _run(function, file: Path, picture: np.ndarray, names: list) -> dict[str, np.ndarray]:
    """The outputs for one picture, without the rows that only fill up `boxes`, `scores` and `class_ids`."""
    try:
        outputs = function(image=tf.constant(picture[np.newaxis]))
        outputs = {name: value.numpy()[0] for name, value in outputs.items()}
    except tf.errors.OpError as error:
        raise PredictError(f"{file}: the model failed: {_reason(error)}") from error
    if "count" in outputs:
        count = outputs.pop("count")
        outputs = {name: value[:count] for name, value in outputs.items()}
    for name, value in outputs.items():
        if not np.isfinite(value).all():
            raise PredictError(f"{file}: the model failed: {name} holds NaN or infinity")
        if name in ("class_ids", "class_map") and value.size and not 0 <= value.min() <= value.max() < len(names):
            raise PredictError(f"{file}: the model failed: {name} is beyond the {len(names)} classes of the manifest")
    return outputs


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


def _targets(output: str | None, files: list[Path]) -> list[Path | None]:
    """Where each picture is drawn; makes the folder, and refuses what would overwrite a picture."""
    if output is None:
        return [None] * len(files)
    folder = Path(output)
    targets: list[Path | None] = [folder / f"{file.stem}.png" for file in files]
    if folder.suffix.lower() in _SUFFIXES and not folder.is_dir():
        if folder.suffix.lower() != ".png":
            raise PredictError(f"--output={output}: pictures are drawn as PNG; name a folder or a file .png")
        if len(files) > 1:
            raise PredictError(f"--output={output} is one file for {len(files)} pictures; name a folder")
        targets, folder = [folder], folder.parent
    drawn, given = {}, {file.resolve() for file in files}
    for file, target in zip(files, targets, strict=True):
        if target in drawn:
            raise PredictError(f"--output={output}: {drawn[target]} and {file} would both be drawn as {target}")
        if target.resolve() in given:
            raise PredictError(f"--output={output}: {target} is a picture to predict; draw into another folder")
        drawn[target] = file
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PredictError(f"--output={output}: can't make the folder {folder}: {error.strerror}") from error
    return targets


def _save(image: Image.Image, target: Path, output: str) -> None:
    """Writes a PNG, whole or not at all."""
    data = io.BytesIO()
    image.save(data, "PNG")
    part = target.with_name(f".predict-{os.getpid()}.part")
    try:
        part.write_bytes(data.getvalue())
        part.replace(target)
    except OSError as error:
        raise PredictError(f"--output={output}: can't write {target}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):  # it isn't there when all went well
            part.unlink()


def _reason(error: tf.errors.OpError) -> str:
    """TensorFlow's message in one line, without where in the graph it was."""
    lines = [line.strip() for line in error.message.splitlines()]
    places = ("Graph execution error:", "Detected at node", "<stack traces", "[[{{node")
    return " ".join(line for line in lines if line and not line.startswith(places))


# What each task answers and draws


def _classify(outputs: dict, names: list, options: Options) -> dict:
    probabilities = outputs["probabilities"]
    best = np.argsort(-probabilities)[: options.top_k or _TOP_K]
    rows = [{"label": names[index], "probability": round(float(probabilities[index]), 6)} for index in best]
    return {"predictions": rows}


def _classes_as_text(answer: dict) -> str:
    return ", ".join(f"{row['label']} {row['probability']:.1%}" for row in answer["predictions"])


def _detect(outputs: dict, names: list, options: Options) -> dict:
    kept = outputs["scores"] >= (_MIN_SCORE if options.min_score is None else options.min_score)
    rows = []
    for box, score, index in zip(*(outputs[name][kept] for name in ("boxes", "scores", "class_ids")), strict=True):
        edges = (round(float(edge), 2) for edge in box)
        row = {"label": names[index], "score": round(float(score), 6)}
        rows.append(row | dict(zip(("ymin", "xmin", "ymax", "xmax"), edges, strict=True)))
    return {"boxes": rows}


def _boxes_as_text(answer: dict) -> str:
    told = []
    for row in answer["boxes"]:
        edges = ", ".join(f"{edge} {row[edge]:.0f}" for edge in ("ymin", "xmin", "ymax", "xmax"))
        told.append(f"{row['label']} {row['score']:.2f} at ({edges})")
    return f"{len(told)} {'box' if len(told) == 1 else 'boxes'}{': ' if told else ''}{_first(told)}"


def _draw_boxes(image: Image.Image, outputs: dict, answer: dict, names: list) -> Image.Image:
    """Outlines on the outermost pixels of each box, and label and score above it; the likeliest are on top."""
    draw, font = ImageDraw.Draw(image), _font(image)
    last_x, last_y = image.width - 1, image.height - 1
    for row in reversed(answer["boxes"]):
        colour = _colour(names.index(row["label"]))
        left, top = min(max(round(row["xmin"]), 0), last_x), min(max(round(row["ymin"]), 0), last_y)
        right, bottom = min(max(round(row["xmax"]) - 1, left), last_x), min(max(round(row["ymax"]) - 1, top), last_y)
        draw.rectangle([left, top, right, bottom], outline=colour, width=max(2, max(image.size) // 400))
        text = f"{row['label']} {row['score']:.2f}"
        width, height = (round(length) + 2 for length in font.getbbox(text)[2:])
        x, y = max(0, min(left, image.width - width)), top - height if top >= height else top
        draw.rectangle([x, y, x + width - 1, y + height - 1], fill=colour)
        draw.text([x + 1, y], text, fill="black" if _is_light(colour) else "white", font=font)
    return image


def _segment(outputs: dict, names: list, options: Options) -> dict:
    class_map = outputs["class_map"]
    shares = np.bincount(class_map.ravel(), minlength=len(names)) / class_map.size
    height, width = class_map.shape
    rounded = (round(float(share), 6) for share in shares)
    return {"shares": dict(zip(names, rounded, strict=True)), "height": height, "width": width}


def _shares_as_text(answer: dict) -> str:
    shares = sorted(answer["shares"].items(), key=lambda item: -item[1])
    return _first([f"{name} {share:.1%}" for name, share in shares if share > 0])


def _draw_masks(image: Image.Image, outputs: dict, answer: dict, names: list) -> Image.Image:
    """The picture under each class' colour, and below it a strip that says which class has which."""
    class_map = outputs["class_map"]
    colours = np.array([_colour(index) for index in range(len(names))], np.uint8)
    is_masked = np.array([name != _BACKGROUND for name in names])[class_map]
    blended = Image.blend(image, Image.fromarray(colours[class_map]), _MASK_OPACITY)
    masked = Image.composite(blended, image, Image.fromarray(is_masked.astype(np.uint8) * 255))
    strip = _legend(image, [(_colour(i), names[i]) for i in np.unique(class_map) if names[i] != _BACKGROUND])
    drawn = Image.new("RGB", [image.width, image.height + strip.height])
    drawn.paste(masked, [0, 0])
    drawn.paste(strip, [0, image.height])
    return drawn


def _legend(image: Image.Image, entries: list[tuple]) -> Image.Image:
    """A white strip as wide as the picture, which cuts what is wider, with a square and a name for each class."""
    font = _font(image)
    line = round(font.size * 1.5)
    places, x, y = [], 0, 0
    for _, name in entries:
        width = round(line * 1.5 + font.getlength(name))
        if x and x + width > image.width:
            x, y = 0, y + line
        places.append((x, y))
        x += width
    strip = Image.new("RGB", [image.width, y + line if entries else 0], "white")
    draw = ImageDraw.Draw(strip)
    for (colour, name), (x, y) in zip(entries, places, strict=True):
        draw.rectangle([x + 3, y + 3, x + line - 4, y + line - 4], fill=colour)
        draw.text([x + line, y + line / 2], name, fill="black", font=font, anchor="lm")
    return strip


def _as_rgb(picture: np.ndarray) -> Image.Image:
    """What the model sees: grey as colour, alpha over black."""
    num_channels = picture.shape[-1]
    if num_channels in (2, 4):
        picture = picture[..., :-1] * (picture[..., -1:] / 255)
    picture = np.broadcast_to(np.rint(picture).astype(np.uint8), [*picture.shape[:2], 3])
    return Image.fromarray(np.ascontiguousarray(picture))


def _colour(index: int) -> tuple[int, int, int]:
    shade = _SHADES[index // len(_COLOURS) % len(_SHADES)]
    return tuple(round(part * shade) for part in _COLOURS[index % len(_COLOURS)])


def _is_light(colour: tuple[int, int, int]) -> bool:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 128  # ITU-R BT.601 luma


def _font(image: Image.Image) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(max(12, max(image.size) // 60))


def _first(told: list[str]) -> str:
    """The first few of a list, and how many more."""
    more = len(told) - _NUM_TOLD
    return ", ".join(told[:_NUM_TOLD] + ([f"and {more} more"] if more > 0 else []))


_TASKS = {
    "image_classification": Task(("probabilities",), ("top_k",), _classify, _classes_as_text),
    "object_detection": Task(
        ("boxes", "scores", "class_ids", "count"), ("min_score", "output"), _detect, _boxes_as_text, _draw_boxes
    ),
    "semantic_segmentation": Task(("class_map", "probabilities"), ("output",), _segment, _shares_as_text, _draw_masks),
}


if __name__ == "__main__":
    main()
