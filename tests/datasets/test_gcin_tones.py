"""gcin_tones, from stand-ins and from the real package."""

import hashlib
import shutil
from collections import Counter

import numpy as np
import pytest
import scipy.signal
import soundfile
import tensorflow_datasets as tfds

from tests import fakes
from tfhalf import datasets
from tfhalf.datasets import DatasetError, gcin_tones

# Ten syllables without tone: one validates.
FOLDERS = "ㄅ ㄅㄚ ㄅㄚ1 ㄅㄚ2 ㄅㄚ3 ㄅㄚ4 ㄅㄛ4 ㄅㄧㄠ2 ㄅㄧㄠ3 ㄆ4 ㄆㄚ2 ㄇㄚ3 ㄇㄛ1 ㄋㄧ3 ㄩㄢ2".split()  # noqa: SIM905
ONLY_BY_3 = "ㄩㄢ2"
TONES = {"1": "neutral", "2": "second", "3": "third", "4": "fourth"}


def write_stand_in(folder) -> None:
    """Writes a tone for each syllable and speaker, a tenth of a second at 44.1 kHz."""
    for index, name in enumerate(FOLDERS):
        for speaker in "3" if name == ONLY_BY_3 else "35":
            hertz = 300 + 100 * index + 40 * (speaker == "5")
            samples = 0.5 * np.sin(2 * np.pi * hertz * np.arange(4410) / 44100)
            fakes.write_sound(folder / "syllables" / name / f"{speaker}.ogg", samples, 44100)


def prepare(manual_dir, data_dir) -> dict[str, list]:
    builder = gcin_tones.GcinTones(data_dir=data_dir)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    return read(builder)


def read(builder) -> dict[str, list]:
    """Split to (syllable, tone, speaker, speech) of each clip."""
    names = {key: builder.info.features[key].names for key in ("label", "speaker")}
    return {
        split: [
            (
                e["syllable"].decode(),
                names["label"][e["label"]],
                names["speaker"][e["speaker"]],
                e["speech"],
            )
            for e in builder.as_dataset(split=split).as_numpy_iterator()
        ]
        for split in builder.info.splits
    }


def test_stand_in_tones_and_splits(tmp_path):
    write_stand_in(tmp_path)
    parts = prepare(tmp_path, tmp_path / "data")
    expected = {"train": [], "validation": [], "test": []}
    syllables = {name.strip("1234") for name in FOLDERS}
    assert len(syllables) == 10
    first = min(syllables, key=lambda syllable: hashlib.sha256(syllable.encode()).hexdigest())
    for name in FOLDERS:
        syllable, tone = name.strip("1234"), TONES.get(name[-1], "first")
        expected["validation" if syllable == first else "train"].append((syllable, tone, "3"))
        if name != ONLY_BY_3:
            expected["test"].append((syllable, tone, "5"))
    assert {split: sorted(row[:3] for row in part) for split, part in parts.items()} == {
        split: sorted(part) for split, part in expected.items()
    }


def test_speech_is_the_sound(tmp_path):
    write_stand_in(tmp_path)
    digits = {tone: digit for digit, tone in TONES.items()}
    for part in prepare(tmp_path, tmp_path / "data").values():
        for syllable, tone, speaker, speech in part:
            path = tmp_path / "syllables" / f"{syllable}{digits.get(tone, '')}" / f"{speaker}.ogg"
            expected = scipy.signal.resample_poly(soundfile.read(path)[0], 160, 441) * 32768
            assert speech.dtype == np.int16
            assert len(speech) == 1600
            np.testing.assert_allclose(speech[300:-300], expected[300:-300], atol=100)


@pytest.mark.parametrize("name", ["ㄅㄚ5", "ba1", "4", "ㄅㄚ12", "ㄅ ㄚ"])
def test_other_folders_are_named(tmp_path, name):
    write_stand_in(tmp_path)
    (tmp_path / "syllables/ㄅㄚ1").rename(tmp_path / "syllables" / name)
    with pytest.raises(DatasetError, match=f"syllables/{name}: isn't a syllable and its tone; remove the folder and"):
        prepare(tmp_path, tmp_path / "data")


def test_damaged_sounds_are_named(tmp_path):
    write_stand_in(tmp_path)
    (tmp_path / "syllables/ㄅㄚ1/5.ogg").write_bytes(b"OggS")
    with pytest.raises(DatasetError, match=r"ㄅㄚ1/5\.ogg: .*; remove the folder and fetch again"):
        prepare(tmp_path, tmp_path / "data")


def test_a_lost_speaker_is_told(tmp_path):
    write_stand_in(tmp_path)
    for path in (tmp_path / "syllables").glob("*/5.ogg"):
        path.unlink()
    with pytest.raises(DatasetError, match="no sound for test; remove the folder and fetch again"):
        prepare(tmp_path, tmp_path / "data")


@pytest.mark.slow
def test_real_package(tmp_path):
    if shutil.which("apt-get") is None:
        pytest.skip("this machine has no apt-get")
    lines = []
    parts = read(datasets.prepare("gcin_tones", str(tmp_path), lines.append))
    assert "fetching gcin_tones from packages, 7.7 MB" in lines
    tones = {split: Counter(tone for _, tone, _, _ in part) for split, part in parts.items()}
    assert tones == {
        "train": {"first": 289, "second": 219, "third": 260, "fourth": 294, "neutral": 13},
        "validation": {"first": 33, "second": 24, "third": 34, "fourth": 34},
        "test": {"first": 303, "second": 236, "third": 288, "fourth": 320, "neutral": 11},
    }
    assert {split: {row[2] for row in part} for split, part in parts.items()} == {
        "train": {"3"},
        "validation": {"3"},
        "test": {"5"},
    }
    syllables = {split: {row[0] for row in part} for split, part in parts.items()}
    assert (len(syllables["train"]), len(syllables["validation"])) == (374, 41)
    assert not syllables["train"] & syllables["validation"]
    assert syllables["test"] <= syllables["train"] | syllables["validation"]
    # Neutral syllables are short: half as long as others by the same speaker.
    lengths = {tone: [len(row[3]) for row in parts["train"] if row[1] == tone] for tone in ("neutral", "first")}
    assert np.median(lengths["neutral"]) < 0.6 * np.median(lengths["first"])
    gcin_tones.fetch(tmp_path / "downloads/manual/gcin_tones", tmp_path / "nowhere")
