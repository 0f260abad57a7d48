"""spoken_words_en, from stand-ins and from the real packages."""

import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests import fakes
from tfhalf import datasets
from tfhalf.datasets import DatasetError, packages, spoken_words_en

NUM_WORDS = 102
RATE = 16000


def tone(seconds: float) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 500 * np.arange(round(seconds * RATE)) / RATE)


def lasting(index: int) -> float:
    """Seconds of a stand-in's word, from which a clip tells which word it is."""
    return 0.05 + 0.01 * index


def say(seconds: list[float], pauses: list[float]) -> np.ndarray:
    """Tones and the pauses around them: one pause more than tones."""
    parts = [np.zeros(round(pauses[0] * RATE))]
    for tone_seconds, pause in zip(seconds, pauses[1:], strict=True):
        parts += [tone(tone_seconds), np.zeros(round(pause * RATE))]
    return np.concatenate(parts)


def write_synthesised(folder: Path, voices: dict[str, str]) -> None:
    """Writes a sound with all words for each voice: names of files to splits."""
    samples = say([lasting(index) for index in range(NUM_WORDS)], [0.3] * (NUM_WORDS + 1))
    for name in voices:
        fakes.write_sound(folder / "synthesised" / name, samples, RATE)


def write_recorded(folder: Path) -> dict[str, int]:
    """Writes what people say, each file of another length; returns ids and the index of the length."""
    numbers = [*range(21), *range(30, 100, 10), "hundred", "thousand", "million", "billion"]
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = [f"asterisk/digits/{name}.wav" for name in (*numbers, "oh")]
    names += [f"asterisk/digits/day-{index}.wav" for index in range(7)]
    names += [f"asterisk/digits/mon-{index}.wav" for index in range(12)]
    names += [f"asterisk/letters/{name}.wav" for name in (*letters, "zed")]
    names += [f"asterisk/phonetic/{letter}_p.wav" for letter in letters]
    names += [f"klettres/en/alpha/{letter.upper()}.ogg" for letter in letters]
    names += [f"klettres/en_GB/alpha/{letter}.ogg" for letter in letters]
    for index, name in enumerate(names):
        fakes.write_sound(folder / name, say([lasting(index)], [0.7, 0.4]), RATE)
    return {name.rpartition(".")[0]: index for index, name in enumerate(names)}


@pytest.fixture
def voices() -> dict[str, str]:
    return {
        f"{voice.speaker.replace('/', '_')}_{voice.speed}-{voice.pitch}.wav": split
        for split, voices in spoken_words_en._VOICES.items()
        for voice in voices
    }


def prepare(manual_dir: Path, data_dir: Path) -> dict[str, list]:
    builder = spoken_words_en.SpokenWordsEn(data_dir=data_dir)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    return read(builder)


def read(builder) -> dict[str, list]:
    """Split to (id, word, speaker, speech) of each clip."""
    names = builder.info.features["label"].names
    return {
        split: [
            (e["id"].decode(), names[e["label"]], e["speaker"].decode(), e["speech"])
            for e in builder.as_dataset(split=split).as_numpy_iterator()
        ]
        for split in builder.info.splits
    }


def seconds(speech: np.ndarray) -> float:
    assert speech.dtype == np.int16
    return len(speech) / 8000


def test_stand_in(tmp_path, voices):
    write_synthesised(tmp_path, voices)
    indices = write_recorded(tmp_path)
    parts = prepare(tmp_path, tmp_path / "data")
    words = spoken_words_en._WORDS
    assert len(words) == len(set(words)) == NUM_WORDS
    for split in ("train", "validation"):
        assert len(parts[split]) == NUM_WORDS * list(voices.values()).count(split)
        for identity, word, speaker, speech in parts[split]:
            assert re.fullmatch(rf"{re.escape(speaker)}/[\d.]+-\d+/{word}", identity)
            # A tenth of a second of pause on both sides, and frames of a hundredth, which a tone may begin in.
            assert seconds(speech) == pytest.approx(lasting(words.index(word)) + 0.2, abs=0.021)
    assert sorted(row[0] for row in parts["test"]) == sorted(indices)
    for identity, _, speaker, speech in parts["test"]:
        assert speaker == ("asterisk" if identity.startswith("asterisk") else identity.rpartition("/alpha")[0])
        # Vorbis smears a little beyond the tone.
        assert seconds(speech) == pytest.approx(lasting(indices[identity]) + 0.2, abs=0.05)
    said = {identity: word for identity, word, _, _ in parts["test"]}
    expected = {
        "asterisk/digits/0": "zero",
        "asterisk/digits/13": "thirteen",
        "asterisk/digits/90": "ninety",
        "asterisk/digits/billion": "billion",
        "asterisk/digits/oh": "o",
        "asterisk/letters/w": "w",
        "asterisk/letters/zed": "z",
        "asterisk/digits/day-0": "sunday",
        "asterisk/digits/mon-0": "january",
        "asterisk/digits/mon-10": "november",
        "asterisk/phonetic/n_p": "november",
        "asterisk/phonetic/x_p": "x-ray",
        "klettres/en/alpha/Q": "q",
        "klettres/en_GB/alpha/q": "q",
    }
    assert {identity: said[identity] for identity in expected} == expected
    assert set(said.values()) == set(words)


def test_speakers_are_in_one_split():
    speakers = {split: {voice.speaker for voice in part} for split, part in spoken_words_en._VOICES.items()}
    # A variant in another accent is the same speaker.
    variants = {split: {re.split(r"[+/]", name)[-1] for name in names} for split, names in speakers.items()}
    assert not variants["train"] & variants["validation"]
    assert all(len(set(part)) == len(part) for part in spoken_words_en._VOICES.values())


def test_words_are_parted_by_the_longest_pauses():
    samples = (say([0.2, 0.1, 0.05, 0.3], [0.02, 0.12, 0.2, 0.2, 0.5]) * 32767).astype(np.int16)
    first, second, third = spoken_words_en._find_words(samples, RATE, 3)
    # The first pause is inside a word. Words are at 0.02-0.44, 0.64-0.69 and 0.89-1.19 seconds.
    for place, start, stop in ((first, 0, 0.54), (second, 0.54, 0.79), (third, 0.79, 1.29)):
        assert place.start / RATE == pytest.approx(start, abs=0.011)
        assert place.stop / RATE == pytest.approx(stop, abs=0.011)
    (whole,) = spoken_words_en._find_words(samples, RATE, 1)
    assert (whole.start, whole.stop) == (first.start, third.stop)


@pytest.mark.parametrize(
    ("lengths", "pauses", "num_words"),
    [
        ([0.2, 0.2, 0.2], [0.1, 0.2, 0.18, 0.1], 2),  # one pause is hardly longer than the other
        ([0.2], [0.1, 0.1], 2),  # a word with no pause in it
        ([], [0.3], 1),
        ([], [0.0], 1),
    ],
)
def test_what_pauses_do_not_part(lengths, pauses, num_words):
    samples = (say(lengths, pauses) * 32767).astype(np.int16)
    assert spoken_words_en._find_words(samples, RATE, num_words) == []


def test_a_quiet_word_is_heard_and_noise_is_not():
    samples = say([0.2, 0.2], [0.1, 0.3, 0.1])
    samples[: round(0.3 * RATE)] *= 0.05
    samples += 0.5 * 0.03 * np.where(np.arange(len(samples)) % 2, 1, -1)
    assert len(spoken_words_en._find_words((samples * 32767).astype(np.int16), RATE, 2)) == 2


def test_sounds_that_are_no_words_are_named(tmp_path, voices):
    write_synthesised(tmp_path, voices)
    name = min(name for name, split in voices.items() if split == "train")
    fakes.write_sound(tmp_path / "synthesised" / name, np.zeros(RATE), RATE)
    with pytest.raises(
        DatasetError, match=rf"{re.escape(name)}: is silent, or its pauses .*; remove the folder and fe"
    ):
        prepare(tmp_path, tmp_path / "data")


def test_lost_sounds_are_named(tmp_path, voices):
    write_synthesised(tmp_path, voices)
    first = next(iter(voices))
    (tmp_path / "synthesised" / first).unlink()
    with pytest.raises(DatasetError, match=rf"{re.escape(first)}: .*; remove the folder and fetch again"):
        prepare(tmp_path, tmp_path / "data")


def test_what_programs_are_asked(tmp_path, voices):
    # Stand-ins that write what they were asked, and the text that they read, where a sound is expected.
    for name, option in (("flite", "-o"), ("espeak-ng", "-w")):
        program = tmp_path / "programs/usr/bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(
            '#!/bin/sh\nasked="$*"\nwhile [ $# -gt 1 ]; do\n'
            f'  case "$1" in {option}) sound="$2";; -f) text="$2";; esac\n  shift\ndone\n'
            '{ echo "$asked"; cat "$text"; } > "$sound"\n'
        )
        program.chmod(0o755)
    data = tmp_path / "programs/usr/lib/some/espeak-ng-data"
    data.mkdir(parents=True)
    (data / "phontab").write_bytes(b"")
    said = spoken_words_en._synthesise(packages.Programs(tmp_path / "programs"), tmp_path)
    asked = {path.name: path.read_text().partition("\n") for path in said.iterdir()}
    assert set(asked) == set(voices)
    command, _, text = asked["flite_slt_1.2-215.wav"]
    assert command.startswith("-voice slt --setf duration_stretch=1.2 --setf int_f0_target_mean=215 -o ")
    assert text.split("\n\n")[:-1] == [word.replace("lima", "leema") for word in spoken_words_en._WORDS]
    command, _, same_text = asked["espeak-ng_en-us+f2_140-40.wav"]
    assert command.startswith("-v en-us+f2 -s 140 -p 40 -w ")
    assert f"--path={data.parent} " in command
    assert same_text == text


@pytest.mark.slow
@pytest.mark.soak  # the stand-in goes the same way
def test_real_packages(tmp_path):
    if shutil.which("apt-get") is None:
        pytest.skip("this machine has no apt-get")
    lines = []
    parts = read(datasets.prepare("spoken_words_en", str(tmp_path), lines.append))
    assert "fetching spoken_words_en from packages, 78 MB" in lines
    minutes = {split: sum(seconds(row[3]) for row in part) / 60 for split, part in parts.items()}
    assert {split: (len(part), round(minutes[split], 1)) for split, part in parts.items()} == {
        "train": (3366, 37.6),
        "validation": (918, 9.9),
        "test": (157, 2.0),
    }
    assert Counter(row[2] for row in parts["test"]) == {"asterisk": 105, "klettres/en": 26, "klettres/en_GB": 26}
    lengths = defaultdict(dict)  # of a voice's words
    for part in parts.values():
        for identity, word, speaker, speech in part:
            lengths[speaker if part is parts["test"] else identity.rpartition("/")[0]][word] = seconds(speech)
    human = lengths["asterisk"]
    words = sorted(human)
    # Words that are long when people say them are long when programs do, 0.72 and more; were the words one place
    # further in a sound, 0.57 and less.
    for voice in set(lengths) - {"asterisk", "klettres/en", "klettres/en_GB"}:
        together = np.corrcoef([lengths[voice][word] for word in words], [human[word] for word in words])
        assert together[0, 1] > 0.65, voice
    spoken_words_en.fetch(tmp_path / "downloads/manual/spoken_words_en", tmp_path / "nowhere")
