"""`gcin_tones`: Mandarin syllables by two speakers, and their tones, out of Debian's package gcin-voice.

A folder's name is a syllable in bopomofo and a digit for its tone: none for the first (high), 2 (rising), 3 (dipping),
4 (falling), 1 for the neutral tone, of which there are few. A file's name is the speaker: `3` said all 1,200
syllables, `5` 1,158 of them. Speech is mono, 16 kHz, int16 (it was 44.1 kHz); a clip is 0.13 to 0.63 seconds long.

Splits: `test` is speaker `5`, `train` and `validation` are speaker `3`. A syllable is with all its tones in `train` or
in `validation`: 41 of the 415 syllables validate; which is decided by the syllable's sha256. `test` has the syllables
of both, in a voice that isn't heard before.

             clips  minutes     first  second  third  fourth  neutral
train        1,075      7.0       289     219    260     294       13
validation     125      0.8        33      24     34      34        0
test         1,158      5.9       303     236    288     320       11

Source: gcin's voice data, http://hyperrate.com/thread.php?tid=30325
"""

import hashlib
import re
from pathlib import Path

import tensorflow_datasets as tfds

from tfhalf.datasets import packages, sounds

_PACKAGE, _PACKAGE_PATH = "gcin-voice", "usr/share/gcin-voice/ogg"
_FOLDER = "syllables"
_FOLDER_SHA256 = "bd081584bc03ddba9c65df9e2c448d115a0744aa747f747cde2849a475247cc9"
_TONES = {"": "first", "2": "second", "3": "third", "4": "fourth", "1": "neutral"}
_TRAINED, _TESTED = _SPEAKERS = ("3", "5")
_SYLLABLE = re.compile(r"([\u3105-\u3129]+)([1-4]?)")  # bopomofo, tone
_ONE_IN = 10  # of the syllables validates


class GcinTones(tfds.core.GeneratorBasedBuilder):
    """TFDS builder: 1,075 clips to train, 125 to validate, 1,158 by another speaker to test; five tones."""

    name = "gcin_tones"
    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Run: python -m apps.data --dataset=gcin_tones (takes sounds from Debian's package {_PACKAGE}; needs apt-get)."
    )
    sampling_rate = 16000

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "Mandarin syllables, each in its tones, by one speaker to train and another one to test. Licences: "
                "speaker 3 GPL-3 or LGPL-3 (Edward Der-Hua Liu), speaker 5 CC-BY-3.0 (ChionMeilin, voice of Chu Lo)."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "speech": sounds.feature(self.sampling_rate),
                    "label": tfds.features.ClassLabel(names=list(_TONES.values()), doc="The tone."),
                    "syllable": tfds.features.Text(doc="In bopomofo, without its tone: ㄅㄧㄠ."),
                    "speaker": tfds.features.ClassLabel(names=list(_SPEAKERS)),
                }
            ),
            supervised_keys=("speech", "label"),
            homepage="http://hyperrate.com/thread.php?tid=30325",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        folder = Path(dl_manager.manual_dir) / _FOLDER
        validating = _validating({_parse(path.parent)[0] for path in folder.glob("*/*.ogg")})
        parts = {"train": [], "validation": [], "test": []}
        for path in sorted(folder.glob("*/*.ogg")):
            if path.stem == _TESTED:
                parts["test"].append(path)
            elif path.stem == _TRAINED:
                parts["validation" if _parse(path.parent)[0] in validating else "train"].append(path)
        for split, part in parts.items():
            if not part:
                raise packages.DatasetError(f"{folder}: no sound for {split}; remove the folder and fetch again")
        return {split: self._generate_examples(part) for split, part in parts.items()}

    def _generate_examples(self, paths: list[Path]):
        for path in paths:
            syllable, tone = _parse(path.parent)
            yield (
                f"{path.parent.name}/{path.stem}",
                {
                    "speech": sounds.encoded(sounds.read(path, self.sampling_rate)),
                    "label": tone,
                    "syllable": syllable,
                    "speaker": path.stem,
                },
            )


def fetch(manual_dir: Path, scratch: Path) -> None:
    """Puts the sounds into `manual_dir`, unless they are there already and are the right ones."""
    target = manual_dir / _FOLDER
    if packages.sha256_of_folder(target) == _FOLDER_SHA256:
        return
    source = packages.fetch_deb(_PACKAGE, scratch) / _PACKAGE_PATH
    names = sorted(path.relative_to(source).as_posix() for path in source.glob("*/*.ogg"))
    packages.keep(names, source, target, _FOLDER_SHA256)


def _parse(folder: Path) -> tuple[str, str]:
    """Returns the syllable and the tone that a folder's name says."""
    found = _SYLLABLE.fullmatch(folder.name)
    if found is None:
        raise packages.DatasetError(f"{folder}: isn't a syllable and its tone; remove the folder and fetch again")
    return found[1], _TONES[found[2]]


def _validating(syllables: set[str]) -> set[str]:
    in_order = sorted(syllables, key=lambda syllable: hashlib.sha256(syllable.encode()).digest())
    return set(in_order[: len(syllables) // _ONE_IN])
