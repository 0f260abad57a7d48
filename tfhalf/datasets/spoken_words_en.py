"""`spoken_words_en`: 102 English words, said by programs to train and by people to test, out of Debian's packages.

Words: the numbers zero to twenty, the tens, hundred, thousand, million and billion; the letters' names; the days; the
months; the spelling alphabet (alpha, bravo, charlie). `november` is a month there too, so it is one label. The letter o
is said as `oh` where a number is read, z is `zee` or `zed`. Speech is mono, 8 kHz, int16.

To train and to validate, flite and espeak-ng say each word once in each of the voices below, which are a speaker at a
speed and a pitch. Speakers are in one split: flite's awb and the espeak-ng variants f5, m7, anika, david, Jacky and
paul validate. (Variants are settings of one synthesiser, so they are less apart than people are; the accents en-us and
en-gb are in both.) To test there are people only:

             clips  who
asterisk       105  Allison Smith, American: all words, with `oh`, `zed` and a second `november`
klettres/en     26  the letters: a voice of about 150 Hz
klettres/en_GB  26  the letters, British by the folder's name: a voice of about 250 Hz

Who speaks in klettres isn't said there, nor that it is a person: background noise and uneven timing say so.

So three voices say 157 clips, 80 of them letters, and a word that isn't a letter is tested once or twice: one clip is
0.6 % of the test, and accuracy by word can't be told from it. Asterisk's sounds are for telephones, 8 kHz; all others
are resampled to it, else what is above 4 kHz would tell programs from people.

             clips  minutes  voices
train        3,366     37.6      33  (9 by flite's kal16, rms and slt; 24 by 20 variants of espeak-ng)
validation     918      9.9       9  (3 by flite's awb; 6 by as many variants)
test           157      2.0       3

A program says all words one after another; the 101 longest pauses part them, where a pause is what stays below 4 % of
the peak. They are 1.46 times as long as the longest one inside a word, or longer; below 1.3 nothing is prepared. A
clip, synthesised or recorded, has at most 0.1 seconds of pause before the word and behind it.

The synthesised sounds are pinned as the recorded ones are: the programs say the same twice, and the same on x86-64
processors with and without FMA (tried with glibc 2.36). Where they say it differently (another release, another kind
of processor) nothing is prepared. The programs aren't installed: they run out of the scratch folder.

Source: flite 2.2, http://cmuflite.org; eSpeak NG 1.51, https://github.com/espeak-ng/espeak-ng; what Asterisk's sounds
say: https://downloads.asterisk.org/pub/telephony/sounds/; KLettres, https://invent.kde.org/education/klettres
"""

import concurrent.futures
import os
import string
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from tfhalf.datasets import packages, sounds

_NUMBERS, _DAYS, _MONTHS, _SPELLING = (
    words.split()
    for words in (
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million "
        "billion",
        "sunday monday tuesday wednesday thursday friday saturday",
        "january february march april may june july august september october november december",
        "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec "
        "romeo sierra tango uniform victor whiskey x-ray yankee zulu",
    )
)
_WORDS = list(dict.fromkeys([*_NUMBERS, *string.ascii_lowercase, *_DAYS, *_MONTHS, *_SPELLING]))
_RESPELT = {"lima": "leema"}  # flite reads it as if it rhymed with timer

_ASTERISK_PACKAGE, _ASTERISK_PATH = "asterisk-core-sounds-en-wav", "usr/share/asterisk/sounds/en_US_f_Allison"
_KLETTRES_PACKAGE, _KLETTRES_PATH = "klettres-data", "usr/share/klettres"
_NUMBER_FILES = [*range(21), *range(30, 100, 10), "hundred", "thousand", "million", "billion"]
# Folder to file to word.
_RECORDED = {
    "asterisk": {
        **{f"digits/{name}.wav": word for name, word in zip(_NUMBER_FILES, _NUMBERS, strict=True)},
        **{f"letters/{letter}.wav": letter for letter in string.ascii_lowercase},
        "digits/oh.wav": "o",
        "letters/zed.wav": "z",
        **{f"digits/day-{index}.wav": word for index, word in enumerate(_DAYS)},
        **{f"digits/mon-{index}.wav": word for index, word in enumerate(_MONTHS)},
        **{f"phonetic/{word[0]}_p.wav": word for word in _SPELLING},
    },
    "klettres": {
        **{f"en/alpha/{letter.upper()}.ogg": letter for letter in string.ascii_lowercase},
        **{f"en_GB/alpha/{letter}.ogg": letter for letter in string.ascii_lowercase},
    },
}
_RECORDED_SHA256 = {
    "asterisk": "0423f1b43fdb6be2c0565fc6965ec210b7ab37cc497f52adb6db8307334dc0cf",
    "klettres": "623b7d79d8341f19cf2241eaa0986679c6d09be82e3459d2d702b9304087c41a",
}
_SYNTHESISED = "synthesised"
_SYNTHESISED_SHA256 = "3ab3af646212e8ac627f7c673edb19f2a593df22db13a6721b1eb698972d00b8"


class _Voice(NamedTuple):
    """How a program speaks."""

    speaker: str  # program and its name for the voice
    speed: float  # flite: times as long; espeak-ng: words a minute
    pitch: int  # flite: Hz, which rms doesn't follow; espeak-ng: 0 to 99

    @property
    def name(self) -> str:
        return f"{self.speaker}/{self.speed}-{self.pitch}"


_VOICES = {
    "train": [
        _Voice("flite/kal16", 0.85, 120),
        _Voice("flite/kal16", 1.0, 95),
        _Voice("flite/kal16", 1.2, 110),
        _Voice("flite/rms", 0.9, 0),
        _Voice("flite/rms", 1.0, 0),
        _Voice("flite/rms", 1.15, 0),
        _Voice("flite/slt", 0.85, 190),
        _Voice("flite/slt", 1.0, 170),
        _Voice("flite/slt", 1.2, 215),
        _Voice("espeak-ng/en-us+m1", 150, 45),
        _Voice("espeak-ng/en-gb+m2", 130, 50),
        _Voice("espeak-ng/en-us+m3", 170, 60),
        _Voice("espeak-ng/en-gb-x-rp+m4", 140, 40),
        _Voice("espeak-ng/en-us+m5", 160, 55),
        _Voice("espeak-ng/en-gb-scotland+m6", 150, 50),
        _Voice("espeak-ng/en-us+f1", 150, 50),
        _Voice("espeak-ng/en-gb+f1", 130, 65),
        _Voice("espeak-ng/en-us+f2", 140, 40),
        _Voice("espeak-ng/en-gb-x-rp+f2", 170, 55),
        _Voice("espeak-ng/en-us+f3", 130, 50),
        _Voice("espeak-ng/en-gb+f3", 150, 70),
        _Voice("espeak-ng/en-us+f4", 160, 45),
        _Voice("espeak-ng/en-us-nyc+f4", 140, 60),
        _Voice("espeak-ng/en-us+linda", 150, 50),
        _Voice("espeak-ng/en-gb+steph", 140, 50),
        _Voice("espeak-ng/en-us+Annie", 160, 40),
        _Voice("espeak-ng/en-us+Andrea", 150, 50),
        _Voice("espeak-ng/en-gb+belinda", 150, 50),
        _Voice("espeak-ng/en-us+Alicia", 130, 45),
        _Voice("espeak-ng/en-us+travis", 150, 60),
        _Voice("espeak-ng/en-gb-x-gbclan+edward", 140, 50),
        _Voice("espeak-ng/en-029+rob", 150, 50),
        _Voice("espeak-ng/en-gb-x-gbcwmd+john", 130, 55),
    ],
    "validation": [
        _Voice("flite/awb", 0.9, 140),
        _Voice("flite/awb", 1.05, 120),
        _Voice("flite/awb", 1.2, 155),
        _Voice("espeak-ng/en-us+f5", 145, 50),
        _Voice("espeak-ng/en-gb+m7", 150, 45),
        _Voice("espeak-ng/en-us+anika", 140, 55),
        _Voice("espeak-ng/en-us+david", 135, 50),
        _Voice("espeak-ng/en-gb+Jacky", 155, 50),
        _Voice("espeak-ng/en-us+paul", 145, 40),
    ],
}
_FRAME_SECONDS = 0.01
_QUIET = 0.04  # of the peak
_LONGER = 1.3  # than the longest pause in a word is the shortest between words
_MARGIN_SECONDS = 0.1


class _Sound(NamedTuple):
    """A file, who speaks in it, and what: ids to words, in their order."""

    path: Path
    speaker: str
    words: dict[str, str]


class SpokenWordsEn(tfds.core.GeneratorBasedBuilder):
    """TFDS builder: synthesised clips of 102 words, 3,366 to train and 918 to validate; 157 by people to test."""

    name = "spoken_words_en"
    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Run: python -m apps.data --dataset=spoken_words_en (lets Debian's flite and espeak-ng speak, and takes sounds "
        f"from its packages {_ASTERISK_PACKAGE} and {_KLETTRES_PACKAGE}; needs apt-get)."
    )
    sampling_rate = 8000

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "English numbers, letters, days, months and the spelling alphabet: synthesised by flite and espeak-ng "
                "to train and, in other voices, to validate; said by three people to test. Licences: flite BSD-like, "
                "espeak-ng GPL-3 or later; asterisk's sounds CC-BY-SA-3.0 (Allison Smith), klettres GPL-2 or later."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "speech": sounds.feature(self.sampling_rate),
                    "label": tfds.features.ClassLabel(names=_WORDS, doc="The word."),
                    "speaker": tfds.features.Text(doc="Like flite/slt, espeak-ng/en-us+f1, asterisk, klettres/en."),
                    "id": tfds.features.Text(
                        doc="Like flite/slt/1.0-170/seven, asterisk/digits/7: a voice's or file's."
                    ),
                }
            ),
            supervised_keys=("speech", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        folder = Path(dl_manager.manual_dir)
        parts = {
            split: [
                _Sound(_path(folder / _SYNTHESISED, voice), voice.speaker, {f"{voice.name}/{it}": it for it in _WORDS})
                for voice in voices
            ]
            for split, voices in _VOICES.items()
        }
        parts["test"] = [
            _Sound(folder / source / name, _speaker(source, name), {f"{source}/{name.rpartition('.')[0]}": word})
            for source, files in _RECORDED.items()
            for name, word in files.items()
        ]
        return {split: self._generate_examples(part) for split, part in parts.items()}

    def _generate_examples(self, part: list[_Sound]):
        for path, speaker, words in part:
            speech = sounds.read(path, self.sampling_rate)
            places = _find_words(speech, self.sampling_rate, len(words))
            if not places:
                raise packages.DatasetError(
                    f"{path}: is silent, or its pauses don't part its words; remove the folder and fetch again"
                )
            for (identity, word), place in zip(words.items(), places, strict=True):
                yield (
                    identity,
                    {"speech": sounds.encoded(speech[place]), "label": word, "speaker": speaker, "id": identity},
                )


def fetch(manual_dir: Path, scratch: Path) -> None:
    """Puts recorded and synthesised words into `manual_dir`, unless they are there already and are the right ones."""
    for source, package, path in (
        ("asterisk", _ASTERISK_PACKAGE, _ASTERISK_PATH),
        ("klettres", _KLETTRES_PACKAGE, _KLETTRES_PATH),
    ):
        target = manual_dir / source
        if packages.sha256_of_folder(target) != _RECORDED_SHA256[source]:
            folders = {f"{path}/{name.rpartition('/')[0]}" for name in _RECORDED[source]}
            content = packages.fetch_deb(package, _room(scratch, source), only=sorted(folders))
            packages.keep(_RECORDED[source], content / path, target, _RECORDED_SHA256[source])
    target = manual_dir / _SYNTHESISED
    if packages.sha256_of_folder(target) != _SYNTHESISED_SHA256:
        room = _room(scratch, _SYNTHESISED)
        said = _synthesise(packages.fetch_programs(["flite", "espeak-ng"], room), room)
        packages.keep(sorted(path.name for path in said.iterdir()), said, target, _SYNTHESISED_SHA256)


def _room(scratch: Path, name: str) -> Path:
    room = scratch / name
    room.mkdir()
    return room


def _path(folder: Path, voice: _Voice) -> Path:
    return folder / f"{voice.name.replace('/', '_')}.wav"


def _speaker(source: str, name: str) -> str:
    return source if source == "asterisk" else f"{source}/{name.partition('/')[0]}"


def _synthesise(programs: packages.Programs, room: Path) -> Path:
    """Lets each voice say all words; returns the folder with a sound of each."""
    text, said = room / "words.txt", room / "said"
    text.write_text("".join(f"{_RESPELT.get(word, word)}\n\n" for word in _WORDS), encoding="ascii")
    said.mkdir()

    def say(voice: _Voice) -> None:
        program, _, name = voice.speaker.partition("/")
        path = str(_path(said, voice))
        if program == "flite":
            stretch, pitch = f"duration_stretch={voice.speed}", f"int_f0_target_mean={voice.pitch}"
            options = ["-voice", name, "--setf", stretch, "--setf", pitch, "-o", path]
        else:
            options = ["-v", name, "-s", str(voice.speed), "-p", str(voice.pitch), "-w", path]
            options += [f"--path={file.parents[1]}" for file in programs.folder.rglob("espeak-ng-data/phontab")]
        programs.run([program, *options, "-f", str(text)])

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(say, [voice for voices in _VOICES.values() for voice in voices]))
    return said


def _find_words(speech: np.ndarray, sampling_rate: int, num_words: int) -> list[slice]:
    """Returns where the words are, each with a margin: int16 [num_samples] to slices; none where pauses don't tell."""
    frame = round(_FRAME_SECONDS * sampling_rate)
    peaks = np.abs(speech[: len(speech) // frame * frame].reshape(-1, frame).astype(np.int32)).max(axis=1)
    loud = np.flatnonzero(peaks > _QUIET * peaks.max(initial=0))
    if len(loud) < num_words:
        return []
    steps = np.diff(loud)
    in_order = np.argsort(steps)
    pauses = np.sort(in_order[len(steps) - (num_words - 1) :])
    inside = steps[in_order[: len(steps) - (num_words - 1)]].max(initial=1)
    if steps[pauses].min(initial=np.iinfo(steps.dtype).max) < _LONGER * inside:
        return []
    starts, ends = loud[np.r_[0, pauses + 1]] * frame, (loud[np.r_[pauses, len(loud) - 1]] + 1) * frame
    margin = round(_MARGIN_SECONDS * sampling_rate)
    return [slice(max(start - margin, 0), end + margin) for start, end in zip(starts, ends, strict=True)]
