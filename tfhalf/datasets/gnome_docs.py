"""`gnome_docs/de`, `/fr`, `/ru`: GNOME's help in English and another language, out of Debian's gnome-user-docs.

A page is an XML file (Mallard) that a program made out of the English one and the translators' texts, so both have the
same tree. Where they don't, the page is left out; else the n-th paragraph is the n-th one's translation. Information on
the page and authors' remarks to each other are no text and are skipped. Left out are paragraphs that nobody translated
(they are the same on both sides), and those with a picture, or a link without words, inside: the reader would see
something that the file doesn't hold.

Text of elements inside a paragraph stays where it is, with its spaces. Elements that are shown with something between
them get it: keys `Alt+Tab`, menus `File ▸ Save`. Whitespace is single spaces.

Splits: by page; pages whose names begin with the same word (`color-calibrate-camera`, `color-calibrate-printer`) are
much alike and stay together. About a tenth of the pages validates, a tenth tests; which is decided by the word's
sha256, so that it is the same for all languages. Help repeats itself ("Open the Activities overview and start typing
Settings"): what is in an earlier split word for word, in either language, is left out of the later one. Sentences that
differ by one word ("Click Mouse & Touchpad in the sidebar", "Click Keyboard in the sidebar") are on both sides.

Source: GNOME Documentation Project, https://gitlab.gnome.org/GNOME/gnome-user-docs
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple
from xml.etree import ElementTree

import tensorflow_datasets as tfds

from tfhalf.datasets import packages

_PACKAGE, _PACKAGE_PATH = "gnome-user-docs", "usr/share/help"
_FOLDER = "pages"
_FOLDER_SHA256 = "6e5a7734f2052f2a17fbd49ba4cb9134a124123a83c2bc8be7e4f7c2a5178e3d"
_ENGLISH = "C"  # the locale's name
_LANGUAGES = {"de": "German", "fr": "French", "ru": "Russian"}
_MALLARD = "{http://projectmallard.org/1.0/}"
_PARAGRAPH = f"{_MALLARD}p"
_NO_TEXT = {f"{_MALLARD}info", f"{_MALLARD}comment"}
_BETWEEN = {f"{_MALLARD}keyseq": "+", f"{_MALLARD}guiseq": " ▸ "}
_SHARES = {"test": 0.1, "validation": 0.1}  # of the pages


class _Pair(NamedTuple):
    page: str
    english: str
    translation: str


class GnomeDocs(tfds.core.GeneratorBasedBuilder):
    """TFDS builder: paragraphs of GNOME's help in English and German, French or Russian."""

    name = "gnome_docs"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=code, description=f"English to {language}.")
        for code, language in _LANGUAGES.items()
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Run: python -m apps.data --dataset=gnome_docs/de (takes pages from Debian's package {_PACKAGE}; needs "
        "apt-get)."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        language = self.builder_config.name
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                f"Paragraphs of GNOME's help in English and {_LANGUAGES[language]}, split by page; no paragraph is in "
                "two splits. Licence: CC-BY-SA-3.0 (GNOME Documentation Project and its translators)."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "en": tfds.features.Text(),
                    language: tfds.features.Text(),
                    "page": tfds.features.Text(doc="Like gnome-help/keyboard."),
                }
            ),
            supervised_keys=("en", language),
            homepage="https://help.gnome.org",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        folder = Path(dl_manager.manual_dir) / _FOLDER
        pairs = _read(folder / _ENGLISH, folder / self.builder_config.name)
        split_of = _split({path.stem for path in (folder / _ENGLISH).rglob("*.page")})
        parts = {"train": [], "validation": [], "test": []}
        seen = {}  # words of a side to the split that has them
        for split, part in parts.items():
            for pair in pairs:
                if split_of[Path(pair.page).name] != split:
                    continue
                sides = [("en", _words(pair.english)), ("other", _words(pair.translation))]
                if all(seen.get(side, split) == split for side in sides):
                    part.append(pair)
                    seen |= dict.fromkeys(sides, split)
            if not part:
                raise packages.DatasetError(f"{folder}: no paragraph for {split}; remove the folder and fetch again")
        return {split: self._generate_examples(part) for split, part in parts.items()}

    def _generate_examples(self, pairs: list[_Pair]):
        for index, (page, english, translation) in enumerate(pairs):
            yield index, {"en": english, self.builder_config.name: translation, "page": page}


def fetch(manual_dir: Path, scratch: Path) -> None:
    """Puts the pages of all languages into `manual_dir`, unless they are there already and are the right ones."""
    target = manual_dir / _FOLDER
    if packages.sha256_of_folder(target) == _FOLDER_SHA256:
        return
    folders = [f"{_PACKAGE_PATH}/{language}" for language in (_ENGLISH, *_LANGUAGES)]
    source = packages.fetch_deb(_PACKAGE, scratch, only=folders) / _PACKAGE_PATH
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*.page"))
    packages.keep(names, source, target, _FOLDER_SHA256)


def _read(english: Path, other: Path) -> list[_Pair]:
    """Reads all paragraphs that are translated, page after page."""
    pairs = []
    for path in sorted(english.rglob("*.page")):
        name = path.relative_to(english)
        if not (other / name).exists():
            continue
        trees = [_parse(path), _parse(other / name)]
        if _shape(trees[0]) != _shape(trees[1]):
            continue
        for paragraphs in zip(*map(_paragraphs, trees), strict=True):
            texts = [" ".join(_text(paragraph).split()) for paragraph in paragraphs]
            if all(map(_is_complete, paragraphs)) and all(texts) and _words(texts[0]) != _words(texts[1]):
                pairs.append(_Pair(name.with_suffix("").as_posix(), *texts))
    return pairs


def _parse(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:  # bad UTF-8 too; it says line and column
        raise packages.DatasetError(f"{path}: {error}; remove the folder and fetch again") from error


def _children(element: ElementTree.Element) -> list[ElementTree.Element]:
    return [child for child in element if child.tag not in _NO_TEXT]


def _shape(element: ElementTree.Element) -> tuple:
    """Returns the tree of tags down to the paragraphs; inside of these, translators may change the order."""
    inside = () if element.tag == _PARAGRAPH else tuple(map(_shape, _children(element)))
    return element.tag, inside


def _paragraphs(element: ElementTree.Element) -> Iterator[ElementTree.Element]:
    for child in _children(element):
        if child.tag == _PARAGRAPH:
            yield child
        else:
            yield from _paragraphs(child)


def _is_complete(paragraph: ElementTree.Element) -> bool:
    """Whether all that the reader sees is text: no picture, no link whose words are another page's title."""
    return all(
        element.tag != f"{_MALLARD}media" and "".join(element.itertext()).strip() for element in paragraph.iter()
    )


def _text(element: ElementTree.Element) -> str:
    if element.tag in _BETWEEN:
        return _BETWEEN[element.tag].join(" ".join(_text(child).split()) for child in element)
    return (element.text or "") + "".join(_text(child) + (child.tail or "") for child in element)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _split(pages: set[str]) -> dict[str, str]:
    """Returns each page's split; pages whose names begin with the same word have the same one."""
    families = defaultdict(list)
    for page in sorted(pages):
        families[page.partition("-")[0]].append(page)
    room = {split: max(1, round(share * len(pages))) for split, share in _SHARES.items()} | {"train": len(pages)}
    split_of = {}
    for word in sorted(families, key=lambda word: hashlib.sha256(word.encode()).digest()):
        split = next(split for split in room if len(families[word]) <= room[split])
        room[split] -= len(families[word])
        split_of |= dict.fromkeys(families[word], split)
    return split_of
