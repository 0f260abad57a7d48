"""`vader_movies`, `vader_tweets`, `vader_amazon`, `vader_nyt`: rated sentences, out of the pip package vaderSentiment.

Only the source distribution carries them (`hutto_ICWSM_2014.tar.gz`). A line is id, mean rating, text, separated by
tabs; the rating is the mean of about 20 people's, -4 to 4. Texts are as in the file, tweets with their `&amp;`.

`label` is the rating's sign. A rating of exactly 0 has none: label -1, TFDS's word for no label; leave these out when
you train a classifier. They are 37 of 10,605 movie sentences, 4 of 4,200 tweets, 98 of 3,708 sentences of Amazon's
reviews, 244 of 5,190 of the New York Times' editorials.

Splits: a fifth tests, by document where the id tells one (`258_70` is sentence 70 of document 258: Amazon has 300, the
Times 498) and by sentence where it doesn't (films, tweets). Whether two sentences on films are from one review isn't
known. Documents that share a text, told apart by neither case nor punctuation, count as one, so that no text is on
both sides: "it was good" and "It was GOOD!!" are two of the tweets that were made up to be rated. In the file's order,
every fifth document (or set of such) goes to `test`.

Source: C. Hutto and E. Gilbert, "VADER: A parsimonious rule-based model for sentiment analysis of social media text",
ICWSM 2014; https://github.com/cjhutto/vaderSentiment
"""

import math
import re
import tarfile
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from tfhalf.datasets import packages

_PACKAGE = "vaderSentiment==3.3.2"
_SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
_ARCHIVE_FOLDER = "hutto_ICWSM_2014"
_LABELS = ["negative", "positive"]
_MAX_RATING = 4


class _Sentence(NamedTuple):
    identity: str
    rating: float
    text: str


class _Rated(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What the four have in common."""

    VERSION = tfds.core.Version("1.0.0")
    file: ClassVar[str]
    file_sha256: ClassVar[str]
    about: ClassVar[str]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                f"{self.about}, each rated by about 20 people from -4 to 4. No text and no document is in both parts. "
                "Licence: MIT (vaderSentiment), as far as its author can give one for others' texts."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "rating": tfds.features.Scalar(np.float32, doc="Mean rating, -4 to 4."),
                    "label": tfds.features.ClassLabel(names=_LABELS, doc="The rating's sign; -1 when it is 0."),
                }
            ),
            supervised_keys=("text", "label"),
            homepage="https://github.com/cjhutto/vaderSentiment",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        parts = {"train": [], "test": []}
        sentences = _read(Path(dl_manager.manual_dir) / self.file)
        for sentence, group in zip(sentences, _groups(sentences), strict=True):
            parts["test" if group % 5 == 4 else "train"].append(sentence)
        return {split: self._generate_examples(part) for split, part in parts.items()}

    def _generate_examples(self, sentences: list[_Sentence]):
        for identity, rating, text in sentences:
            label = int(rating > 0) if rating else -1
            yield identity, {"text": text, "rating": rating, "label": label}

    @classmethod
    def fetch(cls, manual_dir: Path, scratch: Path) -> None:
        """Puts the data set's file into `manual_dir`, unless it is there already and is the right one."""
        target = manual_dir / cls.file
        if target.exists() and packages.sha256(target) == cls.file_sha256:
            return
        content = packages.fetch_sdist(_PACKAGE, _SDIST_SHA256, scratch)
        with tarfile.open(content / _ARCHIVE) as archive:
            archive.extract(f"{_ARCHIVE_FOLDER}/{cls.file}", scratch, filter="data")
        (scratch / _ARCHIVE_FOLDER / cls.file).replace(target)


def _instructions(name: str) -> str:
    return f"Run: python -m apps.data --dataset={name} (takes one file from pip's {_PACKAGE})."


class VaderMovies(_Rated):
    """TFDS builder: 8,485 sentences on films to train, 2,120 to test."""

    name = "vader_movies"
    MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions(name)
    file = "movieReviewSnippets_GroundTruth.txt"
    file_sha256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
    about = "10,605 sentences from reviews of films"


class VaderTweets(_Rated):
    """TFDS builder: 3,361 tweets to train, 839 to test."""

    name = "vader_tweets"
    MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions(name)
    file = "tweets_GroundTruth.txt"
    file_sha256 = "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f"
    about = "4,000 tweets and 200 texts made up like tweets"


class VaderAmazon(_Rated):
    """TFDS builder: 2,952 sentences of customers' reviews to train, 756 to test."""

    name = "vader_amazon"
    MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions(name)
    file = "amazonReviewSnippets_GroundTruth.txt"
    file_sha256 = "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2"
    about = "3,708 sentences from 300 customers' reviews of five products"


class VaderNyt(_Rated):
    """TFDS builder: 4,180 sentences of editorials to train, 1,010 to test."""

    name = "vader_nyt"
    MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions(name)
    file = "nytEditorialSnippets_GroundTruth.txt"
    file_sha256 = "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e"
    about = "5,190 sentences from 498 editorials of the New York Times"


def _read(path: Path) -> list[_Sentence]:
    sentences = []
    for number, raw in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            identity, rating, text = raw.decode("utf-8").split("\t")
            sentence = _Sentence(identity, float(rating), text.strip())
        except UnicodeDecodeError as error:
            raise packages.DatasetError(
                f"{path}, line {number}: isn't UTF-8; remove the file and fetch again"
            ) from error
        except ValueError as error:
            raise packages.DatasetError(
                f"{path}, line {number}: id, rating and text with tabs between expected, found {raw[:60]!r}; "
                "remove the file and fetch again"
            ) from error
        if not sentence.text or not math.fabs(sentence.rating) <= _MAX_RATING:
            raise packages.DatasetError(
                f"{path}, line {number}: a text and a rating of -4 to 4 expected, found {raw[:60]!r}; "
                "remove the file and fetch again"
            )
        sentences.append(sentence)
    return sentences


def _groups(sentences: list[_Sentence]) -> list[int]:
    """Returns each sentence's group, counted from 0 in their order: documents that share a text are one group."""
    parent = {}  # document to another one of its group, or to itself

    def root(document: str) -> str:
        while parent[document] != document:
            document = parent[document]
        return document

    documents = [sentence.identity.partition("_")[0] for sentence in sentences]
    first = {}  # text to the first document that has it
    for sentence, document in zip(sentences, documents, strict=True):
        parent.setdefault(document, document)
        text = " ".join(re.findall(r"\w+", sentence.text.lower())) or sentence.text.lower()
        parent[root(document)] = root(first.setdefault(text, document))
    number = {}
    return [number.setdefault(root(document), len(number)) for document in documents]
