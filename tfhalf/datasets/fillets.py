"""`fillets_cs`, `fillets_nl`: the game Fish Fillets' dialogues, spoken in Czech and Dutch, out of Debian's packages.

Texts are Lua files of fillets-ng-data, sounds Ogg Vorbis of fillets-ng-data-cs and -nl, found by level and name. Speech
is mono, 16 kHz, int16 (Czech was 22.05 or 44.1 kHz, some of it stereo; Dutch 22.05 kHz, stereo). Texts are as
they are written: capitals, marks, accents, a few numbers in digits; whitespace is single spaces.

Speakers: `small` and `big` are the two fish (a high voice and a deep one), the only ones in Dutch. `other` are all
others, known by their subtitles' colour only, and in Czech the fish of seven levels (`_LANGUAGES`) that were added to
the game later: there they sound like other people at other microphones. (The big fish's spectrum has its mean, by
power, at 54 to 310 Hz in these levels, at 495 Hz and more in all others; median of up to five clips of a level.)

Left out are texts without a sound (most of the other figures in Dutch), and sounds whose words aren't known: in Czech
54 without a text (mostly numbers), 21 whose text has a place for a number (`A%1.`), one whose text is
half Russian, and three that no text names; in Dutch two without a sample and one with a misspelt name.

Splits: by level, the same levels in both languages. Levels whose names differ by a number (`cabin1`, `cabin2`: the
same parrot says the same) stay together. An eighth of the levels tests, an eighth validates; which is decided by the
name's sha256. What is said in `test` word for word isn't in `validation` and `train`, nor `validation`'s in `train`,
where two clips in Czech and four in Dutch were left out for it. A sentence may be nearly another one: 3 clips of
Czech's 388 in `validation` and `test`, 3 of Dutch's 320, have half of their four-word sequences in one clip of `train`.
Both fish speak in all splits: this is to recognise known voices, not new ones.

             Czech: clips, minutes, characters     Dutch: clips, minutes, characters
train        1,413  80.0  53,545                   1,289  75.6  59,034
validation     222  12.6   8,204                     177  10.9   8,615
test           166  11.0   7,315                     143   9.1   7,497

Of these speak, in minutes: in Czech `small` 28.6, 5.2, 4.2; `big` 28.6, 5.2, 4.2; `other` 22.8, 2.2, 2.5; in Dutch
`small` 36.3, 5.3, 4.3; `big` 39.4, 5.6, 4.8.

Source: Fish Fillets - Next Generation, https://fillets.sourceforge.net, after ALTAR interactive's game of 1998.
"""

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

import tensorflow_datasets as tfds

from tfhalf.datasets import packages, sounds

_PATH = "usr/share/games/fillets-ng"
_SCRIPTS_PACKAGE = "fillets-ng-data"


class _Language(NamedTuple):
    """One language: its name, the package with its sounds, sha256 of the scripts and of the sounds."""

    name: str
    package: str
    scripts_sha256: str
    sounds_sha256: str
    other_voices: frozenset[str]  # levels in which the fish are spoken by others


_LANGUAGES = {
    "cs": _Language(
        "Czech",
        "fillets-ng-data-cs",
        "d63dc716bb37d7c8874af5c6a3dc15aad46185c4b4a1d8f00a4940c454e2565a",
        "037aec8bef736b000835381f2013b91b00cc4c79d8b2712903ea8f7621a7b033",
        frozenset({"fdto", "hanoi", "hole", "keys", "linux", "nowall", "rush"}),
    ),
    "nl": _Language(
        "Dutch",
        "fillets-ng-data-nl",
        "f681b5811ac649bbc0c50259986770df281666f833a696ac5b71304dfaefb181",
        "76a7f6e152fe2945e468e3d42a55697bfad56fd0ba2e4761639d05cbabd25919",
        frozenset(),
    ),
}
# Sentences that many levels share: kind of script to folder of sounds, where these differ.
_SHARED = {"black": "blackjokes", "bore": "borejokes", "shout": "border"}
_SPEAKERS = {"font_small": "small", "font_big": "big"}
_OTHER = "other"
_ONE_IN = 8  # of the levels validates, and as many test
_STRING = r'"((?:[^"\\]|\\.)*)"'
_GAP = r"(?:\s|--[^\n]*)*"
# A dialogue's name, its subtitle's font and English text; then the text, which one of them lacks.
_DIALOGUE = re.compile(
    rf"dialogId\(\s*{_STRING}\s*,\s*{_STRING}\s*,\s*{_STRING}\s*\){_GAP}(?:dialogStr\(\s*{_STRING}\s*\){_GAP})?"
)


class Clip(NamedTuple):
    """One sentence and where it is said."""

    level: str
    id: str  # level and name
    speaker: str
    text: str
    path: Path


class _Fillets(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What the two have in common."""

    VERSION = tfds.core.Version("1.0.0")
    language: ClassVar[str]
    sampling_rate = 16000

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                f"What is said in the game Fish Fillets - Next Generation, in {_LANGUAGES[self.language].name}, by two "
                "voices most of all, with the text. Split by level; no sentence is in two splits. Licence: GPL-2."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "speech": sounds.feature(self.sampling_rate),
                    "text": tfds.features.Text(),
                    "speaker": tfds.features.ClassLabel(
                        names=[*_SPEAKERS.values(), _OTHER], doc="The small fish's voice, the big one's, or another."
                    ),
                    "id": tfds.features.Text(doc="Like airplane/let-m-divna: the level and a name in it."),
                    "level": tfds.features.Text(),
                }
            ),
            supervised_keys=("speech", "text"),
            homepage="https://fillets.sourceforge.net",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        parts = split_clips(Path(dl_manager.manual_dir), self.language)
        return {split: self._generate_examples(clips) for split, clips in parts.items()}

    def _generate_examples(self, clips: list[Clip]):
        for level, identity, speaker, text, path in clips:
            speech = sounds.read(path, self.sampling_rate)
            if len(speech):
                yield (
                    identity,
                    {
                        "speech": sounds.encoded(speech),
                        "text": text,
                        "speaker": speaker,
                        "id": identity,
                        "level": level,
                    },
                )

    @classmethod
    def fetch(cls, manual_dir: Path, scratch: Path) -> None:
        """Puts the data set's files into `manual_dir`, unless they are there already and are the right ones."""
        fetch(cls.language, manual_dir, scratch)


def _instructions(name: str, language: str) -> str:
    return (
        f"Run: python -m apps.data --dataset={name} (takes texts and sounds from Debian's packages {_SCRIPTS_PACKAGE} "
        f"and {_LANGUAGES[language].package}; needs apt-get)."
    )


class FilletsCs(_Fillets):
    """TFDS builder: Czech, 1,413 clips to train, 222 to validate, 166 to test."""

    name = "fillets_cs"
    language = "cs"
    MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions(name, language)


class FilletsNl(_Fillets):
    """TFDS builder: Dutch, 1,289 clips to train, 177 to validate, 143 to test."""

    name = "fillets_nl"
    language = "nl"
    MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions(name, language)


def fetch(language: str, manual_dir: Path, scratch: Path) -> None:
    """Puts one language's scripts and sounds into `manual_dir`, unless the right ones are there already."""
    about = _LANGUAGES[language]
    for package, folder, pattern, digest in (
        (_SCRIPTS_PACKAGE, "script", f"*dialogs_{language}.lua", about.scripts_sha256),
        (about.package, "sound", "*.ogg", about.sounds_sha256),
    ):
        if packages.sha256_of_folder(manual_dir / folder) == digest:
            continue
        room = scratch / package
        room.mkdir()
        source = packages.fetch_deb(package, room, only=[f"{_PATH}/{folder}"]) / _PATH / folder
        names = sorted(path.relative_to(source).as_posix() for path in source.rglob(pattern))
        packages.keep(names, source, manual_dir / folder, digest)


def split_clips(folder: Path, language: str) -> dict[str, list[Clip]]:
    """Reads what is said, in which split; the sounds themselves aren't read.

    Args:
        folder: where `fetch` put scripts and sounds.
        language: `cs` or `nl`.

    Returns:
        Split to clips, in the order of their levels.

    Raises:
        DatasetError: a script is damaged, or nothing is left for a split.
    """
    clips, levels = [], set()
    for path in sorted((folder / "script").rglob(f"*dialogs_{language}.lua")):
        level, sound_folder = _place(path, language)
        levels.add(level)
        for name, font, text in _read(path):
            sound_path = folder / "sound" / sound_folder / f"{name}.ogg"
            if _is_spoken(text) and sound_path.exists():
                speaker = _OTHER if level in _LANGUAGES[language].other_voices else _SPEAKERS.get(font, _OTHER)
                clips.append(Clip(level, f"{level}/{name}", speaker, text, sound_path))
    split_of = split_names(levels, lambda level: level.rstrip("0123456789"), _ONE_IN)
    parts = {"train": [], "validation": [], "test": []}
    said = set()
    for split in reversed(parts):
        part = [clip for clip in clips if split_of[clip.level] == split and _words(clip.text) not in said]
        if not part:
            raise packages.DatasetError(f"{folder}: no sentence for {split}; remove the folder and fetch again")
        said |= {_words(clip.text) for clip in part}
        parts[split] = part
    return parts


def split_names(names: Iterable[str], family: Callable[[str], str], one_in: int) -> dict[str, str]:
    """Returns each name's split: `test` and `validation` have a share of the names each, `train` has the rest.

    Args:
        names: each once.
        family: returns what a name has in common with those that must be in the same split.
        one_in: 8 is for an eighth of the names; a split gets fewer where no family fits any more.
    """
    families = defaultdict(list)
    for name in sorted(names):
        families[family(name)].append(name)
    total = sum(map(len, families.values()))
    room = {"test": total // one_in, "validation": total // one_in, "train": total}
    split_of = {}
    for key in sorted(families, key=lambda key: hashlib.sha256(key.encode()).digest()):
        split = next(split for split in room if len(families[key]) <= room[split])
        room[split] -= len(families[key])
        split_of |= dict.fromkeys(families[key], split)
    return split_of


def _place(path: Path, language: str) -> tuple[str, str]:
    """Returns the level of a script and the folder of its sounds."""
    level = path.parent.name
    if level != "share":
        return level, f"{level}/{language}"
    kind = path.name.partition("_")[0]
    level = _SHARED.get(kind, kind)
    return level, f"share/{level}/{language}"


def _read(path: Path) -> Iterator[tuple[str, str, str]]:
    """Reads a script: name, font and text of each dialogue."""
    raw = path.read_bytes()
    try:
        script = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise packages.DatasetError(f"{path}, line {line}: isn't UTF-8; remove the folder and fetch again") from error
    position = re.match(_GAP, script).end()
    while position < len(script):
        found = _DIALOGUE.match(script, position)
        if found is None:
            line = script[:position].count("\n") + 1
            raise packages.DatasetError(
                f"{path}, line {line}: dialogId expected, found {script[position : position + 40]!r}; remove the "
                "folder and fetch again"
            )
        name, font, _, text = found.groups(default="")
        yield name, font, " ".join(re.sub(r"\\(.)", r"\1", text).split())  # the only escapes are \\ and \/
        position = found.end()


def _is_spoken(text: str) -> bool:
    """Whether a text is one, without a place for a number (%1) and in one alphabet."""
    letters = [letter for letter in text if letter.isalpha()]
    return bool(letters) and "%" not in text and all(unicodedata.name(it).startswith("LATIN") for it in letters)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
