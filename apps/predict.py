"""Predicts with an exported bundle: TensorFlow, Pillow to draw, soundfile for sounds, and no Keras and no tfhalf.

    python -m apps.predict --saved_model=saved_models/image_classification_mnist_5k/1 picture.png folder/
    python -m apps.predict --saved_model=saved_models/image_classification_mnist_5k --json picture.png
    python -m apps.predict --saved_model=saved_models/object_detection_deepforest --output=drawn/ folder/
    python -m apps.predict --saved_model=saved_models/semantic_segmentation_blue_marble --output=land.png earth.jpg
    python -m apps.predict --saved_model=saved_models/text_classification_reuters_r8 "profits rose" text.txt folder/
    python -m apps.predict --saved_model=saved_models/machine_translation_bible_en_es "In the beginning"
    python -m apps.predict --saved_model=saved_models/speech_recognition_fillets_cs speech.ogg folder/
    python -m apps.predict --saved_model=saved_models/speech_enhancement_fillets_noisy --output=clean/ noisy.wav
    python -m apps.predict --saved_model=saved_models/speech_synthesis_fillets_cs --output=hello.wav "Dobrý den"

The manifest says which task a bundle is for: classification prints the likeliest classes, object_detection the boxes,
semantic_segmentation each class' share of the pixels, sentiment what the text is or its rating, machine_translation the
translation, speech_recognition what is said, keyword_spotting which word. `--output` draws boxes or masks over the
pictures; speech_enhancement and speech_synthesis write their sound there. A text is an argument that is no file or
folder, or what a file holds, as a whole; of a folder all .txt files. A sound is a file of any rate, in mono or not.

It imports neither Keras nor tfhalf, so what it prints is what any server would answer. Every file's sha256 is checked
against the manifest before anything is loaded. What can't be read or predicted gets an error line and exit status 1;
the others are predicted all the same.
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
from PIL import Image

from apps import drawing
from apps.audio import waveforms

_TEXT_SUFFIX = ".txt"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
_SOUND_SUFFIXES = (".wav", ".ogg", ".flac")
_MANIFEST = "assets.extra/manifest.json"
_CHECKSUM = "assets.extra/manifest.sha256"
# The manifest doesn't know them; a signature is checked by `tfhalf.verify(folder, require_signature=KEY)`.
_NOT_HASHED = {_MANIFEST, _CHECKSUM, "assets.extra/model.sig"}
_TOP_K, _MIN_SCORE = 3, 0.5
_NUM_TOLD = 3  # boxes or classes in a line of text; --json has all
_NAME_CHARACTERS = 60  # of a text that stands for itself in a line


class PredictError(Exception):
    """Something that the user can mend."""


class Options(NamedTuple):
    """What to print and draw; None is a flag that wasn't given."""

    as_json: bool = False
    top_k: int | None = None
    min_score: float | None = None
    output: str | None = None


class Item(NamedTuple):
    """Something to predict: a file, or a text that stands for itself."""

    file: Path | None = None
    text: str = ""

    @property
    def name(self) -> str:
        """What it is called in a line."""
        if self.file is not None:
            return str(self.file)
        words = " ".join(self.text.split())
        return json.dumps(
            words if len(words) <= _NAME_CHARACTERS else words[: _NAME_CHARACTERS - 1] + "…", ensure_ascii=False
        )


class Task(NamedTuple):
    """A kind of bundle.

    input: "image", "text" or "waveform".
    outputs: what its signatures must give.
    flags: which of `top_k`, `min_score` and `output` have an effect.
    answer: outputs for one input, `about` of the manifest, options -> a JSON object.
    line: that object -> a line.
    save: what was given, outputs, that object, `about` -> a file: the picture with what was found, or a sound; None
        where there is none.
    suffix: of that file; a sound's is where the answer is, so `--output` must say where.
    """

    input: str
    outputs: tuple[str, ...]
    flags: tuple[str, ...]
    answer: Callable[[dict, dict, Options], dict]
    line: Callable[[dict], str]
    save: Callable[[np.ndarray | str, dict, dict, dict], bytes] | None = None
    suffix: str = ".png"


def define_flags(values: flags.FlagValues) -> None:
    """Defines this program's flags."""
    flags.DEFINE_string("saved_model", None, "Bundle: a version folder, or the folder above it (then its newest "
                        "version is taken).", flag_values=values, required=True)  # fmt: skip
    flags.DEFINE_string("signature", "serving_default", "serving_default, serving_float32 or serving_bfloat16; of "
                        "translation and speech recognition each also with _greedy.", flag_values=values)  # fmt: skip
    # These three have no default here: given with a task that they do nothing for, they are an error.
    flags.DEFINE_integer("top_k", None, f"Classification: classes to print for each one, 1 or more; {_TOP_K} if "
                         "not given.", lower_bound=1, flag_values=values)  # fmt: skip
    flags.DEFINE_float("min_score", None, "Detection: boxes with a lower score, 0 to 1, are neither printed nor drawn; "
                       f"{_MIN_SCORE} if not given.", lower_bound=0, upper_bound=1, flag_values=values)  # fmt: skip
    flags.DEFINE_string("output", None, "Where to draw boxes or masks over the pictures (detection, segmentation), or "
                        "to write sounds (enhancement, synthesis): a folder, made if missing; for one alone "
                        "also a file that ends in .png or .wav.",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_bool("json", False, "Print one JSON object a line instead of text.", flag_values=values)


def main() -> None:
    """Runs the program."""
    define_flags(flags.FLAGS)
    app.run(lambda argv: sys.exit(_exit_code(flags.FLAGS, argv[1:])))


def _exit_code(values: flags.FlagValues, arguments: list[str]) -> int:
    options = Options(values.json, values.top_k, values.min_score, values.output)
    try:
        return predict(values.saved_model, values.signature, arguments, options)
    except PredictError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def predict(saved_model: str, signature: str, arguments: list[str], options: Options) -> int:
    """Prints a prediction for each input, and writes files where `output` says; returns the exit status."""
    if not arguments:
        raise PredictError('name what to predict: python -m apps.predict --saved_model=FOLDER picture.png, or "a text"')
    folder = find_bundle(Path(saved_model))
    task, about = _task(folder, check_bundle(folder)["metadata"], options)
    items = _texts(arguments) if task.input == "text" else _files(arguments, *_FILES[task.input])
    targets = _targets(options.output, items, task)
    # Kept until the end: a signature holds its weights by weak references only.
    loaded = tf.saved_model.load(str(folder))
    function = _signature(folder, loaded.signatures, signature, task)
    failures = 0
    for item, target in zip(items, targets, strict=True):
        try:
            given = _READERS[task.input](item, about)
            outputs = _run(function, task.input, item.name, given, about)
        except PredictError as error:
            failures += 1
            print(f"error: {error}", file=sys.stderr)
            continue
        answer = task.answer(outputs, about, options)
        if target is not None:
            _save(task.save(given, outputs, answer, about), target, options.output)
            if task.suffix == ".wav":
                answer["output"] = str(target)
        what = {"text": item.text} if item.file is None else {"file": item.name}
        as_json = json.dumps(what | answer, ensure_ascii=False)
        print(as_json if options.as_json else f"{item.name}: {task.line(answer)}")
    return 1 if failures else 0


def _task(folder: Path, metadata: dict, options: Options) -> tuple[Task, dict]:
    """The bundle's task and what its manifest says about it; refuses flags that would do nothing."""
    name, about = metadata.get("task"), metadata.get("about", {})
    if name == "sentiment" and about.get("graded"):
        name = "graded sentiment"
    if name not in _TASKS:
        raise PredictError(f"{folder} is a bundle for {name!r}; this program knows {', '.join(_TASKS)}")
    task = _TASKS[name]
    for flag in ("top_k", "min_score", "output"):
        value = getattr(options, flag)
        if value is not None and flag not in task.flags:
            raise PredictError(f"--{flag}={value} does nothing for {folder}, a bundle for {name}: leave it out")
    if task.suffix == ".wav" and options.output is None:
        raise PredictError(f"--output is missing: {folder}, a bundle for {name}, answers with sound; name a folder")
    # What is answered by numbers of classes needs their names.
    if not about.get("class_names") and {"probabilities", "class_ids", "class_map"} & {*task.outputs}:
        raise PredictError(f"{folder}: its manifest doesn't name the classes; export the model again")
    if "waveform" in (task.input, *task.outputs) and not about.get("sampling_rate"):
        raise PredictError(f"{folder}: its manifest doesn't name the sampling rate; export the model again")
    return task, about


def _signature(folder: Path, signatures, name: str, task: Task):
    if name not in signatures:
        served = sorted(other for other in signatures if not other.endswith("_raw"))
        raise PredictError(f"--signature={name}: {folder} has {', '.join(served)}")
    missing = set(task.outputs) - signatures[name].structured_outputs.keys()
    if missing:
        raise PredictError(f"{folder}: {name} doesn't give {', '.join(sorted(missing))}; leave --signature out")
    return signatures[name]


def _run(function, input_name: str, what: str, given: np.ndarray | str, about: dict) -> dict[str, np.ndarray]:
    """The outputs for one input, without what only fills up `boxes`, `scores` and `class_ids`, or `waveform`."""
    inputs = {input_name: tf.constant(given)[tf.newaxis]}
    if input_name == "waveform":
        inputs["length"] = tf.constant([len(given)])
    try:
        outputs = {name: value.numpy()[0] for name, value in function(**inputs).items()}
    except tf.errors.OpError as error:
        raise PredictError(f"{what}: the model failed: {_reason(error)}") from error
    if "count" in outputs:
        count = outputs.pop("count")
        outputs = {name: value[:count] for name, value in outputs.items()}
    if "length" in outputs:
        outputs["waveform"] = outputs["waveform"][: outputs.pop("length")]
    names = about.get("class_names", [])
    for name, value in outputs.items():
        if not isinstance(value, bytes) and not np.isfinite(value).all():
            raise PredictError(f"{what}: the model failed: {name} holds NaN or infinity")
        if name in ("class_ids", "class_map") and value.size and not 0 <= value.min() <= value.max() < len(names):
            raise PredictError(f"{what}: the model failed: {name} is beyond the {len(names)} classes of the manifest")
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
    """Returns the manifest after comparing every file with it, and it with its checksum."""
    try:
        content = (folder / _MANIFEST).read_bytes()
        checksum = (folder / _CHECKSUM).read_bytes()
        manifest = json.loads(content.decode())
        expected = {name: about["sha256"] for name, about in manifest["files"].items()}
        manifest["metadata"].get("task")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PredictError(f"{folder} is no bundle: can't read {_MANIFEST} ({error})") from error
    if checksum != f"{hashlib.sha256(content).hexdigest()}  manifest.json\n".encode():
        raise PredictError(f"{folder}: {_MANIFEST} was changed (it differs from {_CHECKSUM}); nothing was loaded")
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    for path in paths:
        if path.is_symlink() or not path.is_file():
            raise PredictError(f"{path} is a link or a device, not a bundle's file; nothing was loaded")
    present = {str(path.relative_to(folder)) for path in paths} - _NOT_HASHED
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


def _read_text(item: Item) -> str:
    if item.file is None:
        return item.text
    try:
        return item.file.read_bytes().decode()
    except OSError as error:
        raise PredictError(f"{item.file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PredictError(f"{item.file} isn't a text in UTF-8: byte {error.start} is {error.reason}") from error


def _read_sound(path: Path, sampling_rate: int) -> np.ndarray:
    try:
        return waveforms.read(path, sampling_rate)
    except waveforms.WaveformError as error:
        raise PredictError(str(error)) from error


def _files(arguments: list[str], suffixes: tuple[str, ...], what: str) -> list[Item]:
    """The files named, and those of folders, in order."""
    return [
        Item(file)
        for path in map(Path, arguments)
        for file in (_inside(path, suffixes, what) if path.is_dir() else [path])
    ]


def _texts(arguments: list[str]) -> list[Item]:
    """Files, what folders hold, and texts themselves, in order."""
    items = []
    for argument in arguments:
        if os.path.isdir(argument):
            items += map(Item, _inside(Path(argument), (_TEXT_SUFFIX,), "text"))
        elif os.path.exists(argument) or argument.endswith(_TEXT_SUFFIX):  # a file that isn't there is told so
            items.append(Item(Path(argument)))
        else:
            items.append(Item(text=argument))
    return items


def _inside(folder: Path, suffixes: tuple[str, ...], what: str) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    if not found:
        raise PredictError(f"{folder} holds no {what} ({', '.join(suffixes)})")
    return found


def _targets(output: str | None, items: list[Item], task: Task) -> list[Path | None]:
    """The file for each input's picture or sound; makes the folder, and refuses what would overwrite an input."""
    if output is None:
        return [None] * len(items)
    folder, kind = Path(output), "pictures" if task.suffix == ".png" else "sounds"
    stems = (item.file.stem if item.file else f"text{number}" for number, item in enumerate(items, 1))
    targets: list[Path | None] = [folder / f"{stem}{task.suffix}" for stem in stems]
    if folder.suffix.lower() in (*_SUFFIXES, *_SOUND_SUFFIXES) and not folder.is_dir():
        if folder.suffix.lower() != task.suffix:
            how = "drawn as PNG" if kind == "pictures" else "written as WAV"
            raise PredictError(f"--output={output}: {kind} are {how}; name a folder or a file {task.suffix}")
        if len(items) > 1:
            raise PredictError(f"--output={output} is one file for {len(items)} {kind}; name a folder")
        targets, folder = [folder], folder.parent
    drawn, given = {}, {item.file.resolve() for item in items if item.file}
    for item, target in zip(items, targets, strict=True):
        if target in drawn:
            made = "drawn" if kind == "pictures" else "written"
            raise PredictError(f"--output={output}: {drawn[target]} and {item.name} would both be {made} as {target}")
        if target.resolve() in given:
            raise PredictError(f"--output={output}: {target} is a {kind[:-1]} to predict; take another folder")
        drawn[target] = item.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PredictError(f"--output={output}: can't make the folder {folder}: {error.strerror}") from error
    return targets


def _save(data: bytes, target: Path, output: str) -> None:
    """Writes a file, whole or not at all."""
    part = target.with_name(f".predict-{os.getpid()}.part")
    try:
        part.write_bytes(data)
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


# What each task answers and writes


def _classify(outputs: dict, about: dict, options: Options) -> dict:
    probabilities = outputs["probabilities"]
    best = np.argsort(-probabilities)[: options.top_k or _TOP_K]
    rows = [
        {"label": about["class_names"][index], "probability": round(float(probabilities[index]), 6)} for index in best
    ]
    return {"predictions": rows}


def _classes_as_text(answer: dict) -> str:
    return ", ".join(f"{row['label']} {row['probability']:.1%}" for row in answer["predictions"])


def _translate(outputs: dict, about: dict, options: Options) -> dict:
    return {"translation": outputs["translation"].decode(errors="replace"), "score": round(float(outputs["score"]), 6)}


def _rate(outputs: dict, about: dict, options: Options) -> dict:
    return {"rating": round(float(outputs["rating"]), 4)}


def _detect(outputs: dict, about: dict, options: Options) -> dict:
    kept = outputs["scores"] >= (_MIN_SCORE if options.min_score is None else options.min_score)
    rows = []
    for box, score, index in zip(*(outputs[name][kept] for name in ("boxes", "scores", "class_ids")), strict=True):
        edges = (round(float(edge), 2) for edge in box)
        row = {"label": about["class_names"][index], "score": round(float(score), 6)}
        rows.append(row | dict(zip(("ymin", "xmin", "ymax", "xmax"), edges, strict=True)))
    return {"boxes": rows}


def _boxes_as_text(answer: dict) -> str:
    told = []
    for row in answer["boxes"]:
        edges = ", ".join(f"{edge} {row[edge]:.0f}" for edge in ("ymin", "xmin", "ymax", "xmax"))
        told.append(f"{row['label']} {row['score']:.2f} at ({edges})")
    return f"{len(told)} {'box' if len(told) == 1 else 'boxes'}{': ' if told else ''}{_first(told)}"


def _segment(outputs: dict, about: dict, options: Options) -> dict:
    class_map, names = outputs["class_map"], about["class_names"]
    shares = np.bincount(class_map.ravel(), minlength=len(names)) / class_map.size
    height, width = class_map.shape
    rounded = (round(float(share), 6) for share in shares)
    return {"shares": dict(zip(names, rounded, strict=True)), "height": height, "width": width}


def _shares_as_text(answer: dict) -> str:
    shares = sorted(answer["shares"].items(), key=lambda item: -item[1])
    return _first([f"{name} {share:.1%}" for name, share in shares if share > 0])


def _first(told: list[str]) -> str:
    """The first few of a list, and how many more."""
    more = len(told) - _NUM_TOLD
    return ", ".join(told[:_NUM_TOLD] + ([f"and {more} more"] if more > 0 else []))


def _transcribe(outputs: dict, about: dict, options: Options) -> dict:
    return {"transcript": outputs["text"].decode(errors="replace"), "score": round(float(outputs["score"]), 6)}


def _sound(outputs: dict, about: dict, options: Options) -> dict:
    return {"seconds": round(len(outputs["waveform"]) / about["sampling_rate"], 3)}


def _sound_as_text(answer: dict) -> str:
    return f"{answer['seconds']:.2f} s in {answer['output']}"


def _drawn(draw: Callable[[Image.Image, dict, dict, list], Image.Image]):
    def save(picture: np.ndarray, outputs: dict, answer: dict, about: dict) -> bytes:
        data = io.BytesIO()
        draw(drawing.as_rgb(picture), outputs, answer, about["class_names"]).save(data, "PNG")
        return data.getvalue()

    return save


def _as_wav(given: np.ndarray | str, outputs: dict, answer: dict, about: dict) -> bytes:
    return waveforms.to_wav(outputs["waveform"], about["sampling_rate"])


_FILES = {"image": (_SUFFIXES, "picture"), "waveform": (_SOUND_SUFFIXES, "sound")}
_READERS = {
    "image": lambda item, about: read_picture(item.file),
    "text": lambda item, about: _read_text(item),
    "waveform": lambda item, about: _read_sound(item.file, about["sampling_rate"]),
}
_CLASSIFIED = (("probabilities",), ("top_k",), _classify, _classes_as_text)
_DETECTED = (("boxes", "scores", "class_ids", "count"), ("min_score", "output"), _detect, _boxes_as_text)
_SEGMENTED = (("class_map", "probabilities"), ("output",), _segment, _shares_as_text)
_SOUND = (("output",), _sound, _sound_as_text, _as_wav, ".wav")
_TASKS = {
    "image_classification": Task("image", *_CLASSIFIED),
    "object_detection": Task("image", *_DETECTED, _drawn(drawing.draw_boxes)),
    "semantic_segmentation": Task("image", *_SEGMENTED, _drawn(drawing.draw_masks)),
    "text_classification": Task("text", *_CLASSIFIED),
    "sentiment": Task("text", *_CLASSIFIED),
    "graded sentiment": Task("text", ("rating",), (), _rate, lambda answer: f"{answer['rating']:+.2f}"),
    "machine_translation": Task("text", ("translation", "score"), (), _translate, lambda answer: answer["translation"]),
    "speech_recognition": Task("waveform", ("text", "score"), (), _transcribe, lambda answer: answer["transcript"]),
    "keyword_spotting": Task("waveform", *_CLASSIFIED),
    "speech_synthesis": Task("text", ("waveform", "length"), *_SOUND),
    "speech_enhancement": Task("waveform", ("waveform",), *_SOUND),
}


if __name__ == "__main__":
    main()
