"""`bible_en_es`: verses in English and Spanish, out of Debian's packages sword-text-web and sword-text-sparv.

English is the World English Bible (of today's English), Spanish the Reina-Valera of 1909 (with the spelling of its
time: "fué", "á Jehová"; a chapter's first word is in capitals). A verse is found by book, chapter and number. 31,077
have a text on both sides; 197 of these are left out, since they aren't each other's translation: Reina-Valera counts
some chapters' verses otherwise, as the Hebrew does (`_OUT_OF_STEP`; found by which words occur together). Here and
there a verse still ends some words earlier on one side than on the other.

What isn't the verse's text is removed: notes, the speakers' names of the Song of Songs (English only), the glossary
after Revelation, the remarks on where an epistle was written (Spanish only). Psalms' headings stay, both have them.
Markup is removed without gluing words: the files have no space where a note or an added word was. Whitespace is
single spaces. Accents and inverted marks are kept.

Splits: by book, several genres in each. Many books repeat others nearly word for word, and none of these is in
`validation` or `test`: Samuel, Kings, Chronicles, Isaiah and Jeremiah; Ezra and Nehemiah; Joshua and Judges; Exodus,
Leviticus, Numbers and Deuteronomy; Psalms and Samuel; Matthew, Mark and Luke; 2 Peter and Jude; Ephesians and
Colossians; the Thessalonians. The chosen books hardly share any: 5 of 1,230 test verses and 1 of 972 validation
verses have half of their four-word sequences in one training verse. Two greetings that are word for word in `train`
are left out of `test`.

Source: World English Bible, https://worldenglish.bible; Reina-Valera 1909; both as modules of https://ebible.org
"""

import functools
import itertools
import re
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds
from pysword.bible import SwordBible

from tfhalf.datasets import packages


class _Module(NamedTuple):
    """One Bible: the package, the folder in it, how it counts the verses."""

    package: str
    folder: str
    sha256: str
    versification: str


_MODULES = {
    "en": _Module(
        "sword-text-web", "engWEB2015eb", "3085a32dcb5ed8486a6cd1ed99149415bdc72aa09cf388eeaa1331ba2b05f9f5", "nrsva"
    ),
    "es": _Module(
        "sword-text-sparv", "spaRV1909eb", "14b5e2fafbf8ebfbc0e7d96b93ae0a2ac1a08963004b06e307dac324a2f4a123", "kjv"
    ),
}
_FILES = [f"{testament}.bz{kind}" for testament in ("ot", "nt") for kind in "svz"]
_MODULES_PATH = "usr/share/sword/modules/texts/ztext"
_BOOKS = {
    # history, poetry, prophets, epistles
    "validation": ["Esther", "Song of Solomon"]
    + ["Hosea", "Jonah", "Zephaniah", "Haggai", "Malachi"]
    + ["1 Timothy", "1 Peter", "1 John"],
    "test": ["Ruth", "Ecclesiastes", "Lamentations"] + ["Daniel", "Amos", "Habakkuk"] + ["Philippians", "James"],
}
# Book, chapter: first and last verse, by the English count, that Spanish counts or divides otherwise.
_OUT_OF_STEP = {
    ("Numbers", 13): (1, 33),
    ("Numbers", 30): (1, 16),
    ("Judges", 14): (18, 20),
    ("1 Samuel", 24): (1, 22),
    ("2 Samuel", 20): (25, 26),
    ("1 Kings", 22): (43, 53),
    ("1 Chronicles", 21): (15, 30),
    ("2 Chronicles", 33): (10, 25),
    ("Job", 35): (15, 16),
    ("Job", 39): (1, 30),
    ("Job", 40): (1, 24),
    ("Hosea", 12): (1, 14),
    ("Jonah", 2): (1, 10),
    ("Matthew", 23): (13, 14),  # in turn
    ("Acts", 19): (40, 41),
    ("Romans", 14): (23, 23),  # English has the doxology here, Spanish at the end
    ("2 Corinthians", 13): (12, 14),
}
_NOTE = re.compile(r"<(note|speaker)\b.*?</\1>", re.DOTALL)
_TAG = "<[^>]*>"
# Between a word, with the marks after it, and the next word, with the marks before it.
_SEAM = re.compile(rf"(?<=[\w.,;:!?”\u2019])(?:{_TAG})+(?=[“\u2018¿¡]*\w)")
_AFTER_MARK = re.compile(rf"(?<=[.,;:!?]){_TAG}(?=\w)")
_SPACE_BEFORE_MARK = re.compile(r"\s+(?=[.,;:!?])")
_WRITTEN_FROM = re.compile(r"(?<=Amén\.) .*\b(?:enviada|escrita)\b.*", re.IGNORECASE)


class BibleEnEs(tfds.core.GeneratorBasedBuilder):
    """TFDS builder: 28,676 verses in English and Spanish to train, 972 to validate, 1,230 to test."""

    name = "bible_en_es"
    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Run: python -m apps.data --dataset=bible_en_es (takes two Bibles from Debian's packages "
        f"{_MODULES['en'].package} and {_MODULES['es'].package}; needs apt-get)."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "Verses of the World English Bible and of the Reina-Valera of 1909, aligned by their numbers. Split by "
                "book. Licence: both are in the public domain."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "en": tfds.features.Text(),
                    "es": tfds.features.Text(),
                    "reference": tfds.features.Text(doc="Like Ruth 1:16."),
                    "book": tfds.features.Text(),
                }
            ),
            supervised_keys=("en", "es"),
            homepage="https://ebible.org",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        folder = Path(dl_manager.manual_dir)
        english, spanish = (_read(folder / language, _MODULES[language]) for language in ("en", "es"))
        parts = {"train": [], "validation": [], "test": []}
        for reference, text in english.items():
            translation = spanish.get(reference)
            if text and translation and not _is_out_of_step(*reference):
                split = next((split for split, books in _BOOKS.items() if reference[0] in books), "train")
                parts[split].append((reference, text, translation))
        train = {_words(text) for _, *texts in parts["train"] for text in texts}
        for split in _BOOKS:
            parts[split] = [verse for verse in parts[split] if train.isdisjoint(map(_words, verse[1:]))]
        for split, part in parts.items():
            if not part:
                raise packages.DatasetError(f"{folder}: no verse for {split}; remove the folder and fetch again")
        return {split: self._generate_examples(part) for split, part in parts.items()}

    def _generate_examples(self, verses: list):
        for (book, chapter, verse), english, spanish in verses:
            reference = f"{book} {chapter}:{verse}"
            yield reference, {"en": english, "es": spanish, "reference": reference, "book": book}


def fetch(manual_dir: Path, scratch: Path) -> None:
    """Puts the two Bibles into `manual_dir`, unless they are there already and are the right ones."""
    for language, module in _MODULES.items():
        target = manual_dir / language
        if packages.sha256_of_folder(target) == module.sha256:
            continue
        folder = scratch / module.package
        folder.mkdir()
        source = packages.fetch_deb(module.package, folder) / _MODULES_PATH / module.folder
        packages.keep(_FILES, source, target, module.sha256)


def _read(folder: Path, module: _Module) -> dict[tuple[str, int, int], str]:
    """Reads a Bible: (book, chapter, verse) to text, which may be empty."""
    for name in _FILES:
        if not (folder / name).is_file():  # pysword would go on without a testament
            raise packages.DatasetError(f"{folder / name} is missing; remove the folder and fetch again")
    bible = SwordBible(folder, "ztext", module.versification, "utf-8", "OSIS")
    decompress = bible._decompressed_text

    @functools.cache  # a block is a whole book; pysword would decompress it for each of its verses
    def decompress_once(testament: str, block: int) -> bytes:
        text = decompress(testament, block)
        if not text:  # what pysword says of a damaged block
            raise packages.DatasetError(
                f"{folder}/{testament}.bzz: block {block} is damaged; remove the folder and fetch again"
            )
        return text

    bible._decompressed_text = decompress_once
    verses = {}
    for book in itertools.chain.from_iterable(bible.get_structure().get_books().values()):
        name = _plain_name(book.name)
        numbers = [(chapter, verse + 1) for chapter, n in enumerate(book.chapter_lengths, 1) for verse in range(n)]
        for number, text in zip(numbers, bible.get_iter(books=book.name, clean=False), strict=True):
            if "\ufffd" in text:
                raise packages.DatasetError(
                    f"{folder}, {name} {number[0]}:{number[1]}: isn't UTF-8; remove the folder and fetch again"
                )
            verses[name, *number] = _clean(text)
        verses[name, *number] = _WRITTEN_FROM.sub("", verses[name, *number])
    return verses


def _plain_name(name: str) -> str:
    """Returns `1 Samuel` for `I Samuel`, and Revelation without its author."""
    roman, _, rest = name.partition(" ")
    count = {"I": 1, "II": 2, "III": 3, "IV": 4}.get(roman)
    return f"{count} {rest}" if count else name.removesuffix(" of John")


def _clean(text: str) -> str:
    """Returns a verse without markup.

    >>> _clean('<w lemma="x">God</w><note>1:1 or, gods</note><w>made</w> it<note>so</note>. <chapter eID="Gen.1"/>')
    'God made it.'
    """
    text = _NOTE.sub("</>", text.partition("<chapter eID=")[0])
    # An added word has no space around it, an added ending has no end of a word before it: hécho<transChange>lo.
    text = _SEAM.sub(lambda found: " " if "</" in found[0] else found[0], text)
    text = re.sub(_TAG, "", _AFTER_MARK.sub(" ", text))
    return _SPACE_BEFORE_MARK.sub("", " ".join(text.split()))


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _is_out_of_step(book: str, chapter: int, verse: int) -> bool:
    first, last = _OUT_OF_STEP.get((book, chapter), (1, 0))
    return first <= verse <= last
