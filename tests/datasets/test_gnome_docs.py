"""gnome_docs, from tiny stand-ins and from the real package."""

import re
import shutil
from itertools import chain

import pytest
import tensorflow_datasets as tfds

from tests import fakes
from tfhalf import datasets
from tfhalf.datasets import DatasetError, gnome_docs

# Ten pages: one validates, one tests.
NAMES = "apps color disk files mouse net power shell sound user".split()  # noqa: SIM905


def write_stand_in(folder, **pages: tuple[str, str]) -> None:
    """Writes pages in English and German; those that aren't given have one paragraph of their own."""
    for name in NAMES:
        english, german = pages.get(name, (f"<p>Page {name}.</p>", f"<p>Seite {name}.</p>"))
        fakes.write_help_page(folder / "pages" / "C" / "gnome-help" / f"{name}.page", english, "<desc><p>x</p></desc>")
        fakes.write_help_page(folder / "pages" / "de" / "gnome-help" / f"{name}.page", german)


def prepare(manual_dir, data_dir) -> dict[str, list]:
    builder = gnome_docs.GnomeDocs(config="de", data_dir=data_dir)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    return read(builder, "de")


def read(builder, language: str) -> dict[str, list]:
    """Split to (page, English, translation) of each paragraph."""
    return {
        split: [
            tuple(e[key].decode() for key in ("page", "en", language))
            for e in builder.as_dataset(split=split).as_numpy_iterator()
        ]
        for split in builder.info.splits
    }


def texts_of(parts, page: str) -> list[tuple[str, str]]:
    return sorted(texts for part in parts.values() for name, *texts in part if name == f"gnome-help/{page}")


def test_stand_in_splits(tmp_path):
    write_stand_in(tmp_path)
    parts = prepare(tmp_path, tmp_path / "data")
    assert {split: len(part) for split, part in parts.items()} == {"train": 8, "validation": 1, "test": 1}
    assert sorted(chain(*parts.values())) == [(f"gnome-help/{n}", f"Page {n}.", f"Seite {n}.") for n in NAMES]


@pytest.mark.parametrize(
    ("english", "german", "expected"),
    [
        (
            "<p>Open the\n  <gui>Activities</gui> <app>overview</app>, <em>then</em> wait.</p>",
            "<p>Öffnen Sie die <gui>Aktivitäten</gui>-Übersicht.</p>",
            ["Open the Activities overview, then wait.", "Öffnen Sie die Aktivitäten-Übersicht."],
        ),
        (
            "<p>Press <keyseq><key>Alt</key> <key>Tab</key></keyseq> or <guiseq><gui>A</gui><gui>B</gui></guiseq>.</p>",
            "<p><keyseq><key>Strg</key>\n<key>X</key></keyseq>.</p>",
            ["Press Alt+Tab or A ▸ B.", "Strg+X."],
        ),
        (
            "<section><title>T</title><comment><p>Fix me</p></comment><p>One<!-- no --> two.</p></section>",
            "<section><title>Ü</title><p>Eins zwei.</p></section>",
            ["One two.", "Eins zwei."],
        ),
        ("<p>Not translated.</p>", "<p>Not <em>translated</em>.</p>", None),
        ('<p>See <link xref="a"/>.</p>', "<p>Siehe <link>Seite A</link>.</p>", None),
        ("<p>Press the <media><p>gear</p></media> button.</p>", "<p>Den <media/> Knopf drücken.</p>", None),
        ("<p/>", "<p>Mehr.</p>", None),
        ("<p>One.</p><p>Two.</p>", "<p>Eins.</p>", None),  # out of step: the page is left out
        ("<list><p>One.</p></list>", "<p>Eins.</p>", None),
    ],
)
def test_paragraph(tmp_path, english, german, expected):
    write_stand_in(tmp_path, mouse=(english, german))
    assert texts_of(prepare(tmp_path, tmp_path / "data"), "mouse") == [expected] * (expected is not None)


def test_what_pages_share_is_in_the_first_split_only(tmp_path):
    write_stand_in(tmp_path)
    parts = prepare(tmp_path, tmp_path / "data")
    (validation, test) = (parts[split][0][0].partition("/")[2] for split in ("validation", "test"))
    (train,) = sorted(set(NAMES) - {validation, test})[:1]
    shared = {
        train: ("<p>Same.</p><p>Own.</p>", "<p>Gleich.</p><p>Eigen.</p>"),
        validation: ("<p>SAME</p><p>Left.</p><p>Twice.</p>", "<p>Dasselbe.</p><p>Links.</p><p>Doppelt.</p>"),
        test: ("<p>Another.</p><p>twice</p><p>Right.</p>", "<p>Gleich!</p><p>Zweimal.</p><p>Rechts.</p>"),
    }
    write_stand_in(tmp_path / "second", **shared)
    parts = prepare(tmp_path / "second", tmp_path / "second" / "data")
    assert texts_of(parts, train) == [["Own.", "Eigen."], ["Same.", "Gleich."]]
    assert texts_of(parts, validation) == [["Left.", "Links."], ["Twice.", "Doppelt."]]
    assert texts_of(parts, test) == [["Right.", "Rechts."]]


def test_pages_that_begin_with_the_same_word_stay_together():
    pages = {f"{word}-{number}" for word in "abcdefghij" for number in range(3)}
    split_of = gnome_docs._split(pages)
    assert split_of.keys() == pages
    for word in "abcdefghij":
        assert len({split_of[f"{word}-{number}"] for number in range(3)}) == 1
    assert sorted(split_of.values()).count("test") == sorted(split_of.values()).count("validation") == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<page>\n<p>open</page>", r"de/gnome-help/mouse\.page: mismatched tag: line 2.*fetch again"),
        (b"<page>\n<p>gr\xfcn</p></page>", r"de/gnome-help/mouse\.page: not well-formed \(invalid token\): line 2"),
        (b"", r"de/gnome-help/mouse\.page: no element found: line 1"),
    ],
)
def test_damaged_pages_are_named(tmp_path, content, message):
    write_stand_in(tmp_path)
    (tmp_path / "pages" / "de" / "gnome-help" / "mouse.page").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        prepare(tmp_path, tmp_path / "data")


def test_no_pages_are_told(tmp_path):
    with pytest.raises(DatasetError, match="no paragraph for train; remove the folder and fetch again"):
        prepare(tmp_path, tmp_path / "data")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The real data sets: (language to its splits, the folder with the package's files)."""
    if shutil.which("apt-get") is None:
        pytest.skip("this machine has no apt-get")
    folder = tmp_path_factory.mktemp("real")
    parts = {code: read(datasets.prepare(f"gnome_docs/{code}", str(folder)), code) for code in ("de", "fr", "ru")}
    return parts, folder / "downloads" / "manual" / "gnome_docs"


@pytest.mark.parametrize(
    ("language", "counts"), [("de", (2286, 157, 301)), ("fr", (1901, 117, 241)), ("ru", (2199, 157, 285))]
)
def test_real_counts_and_nothing_in_two_splits(real, language, counts):
    parts = real[0][language]
    assert tuple(len(parts[split]) for split in ("train", "validation", "test")) == counts
    for index in range(3):
        seen = [{" ".join(re.findall(r"\w+", row[index].lower())) for row in part} for part in parts.values()]
        assert len(set().union(*seen)) == sum(map(len, seen))


def test_real_splits_are_the_same_in_all_languages(real):
    split_of = {}
    for parts in real[0].values():
        for split, part in parts.items():
            for page, _, _ in part:
                assert split_of.setdefault(page.rpartition("/")[2].partition("-")[0], split) == split


def test_real_texts(real):
    parts, _ = real
    german = {english: translation for part in parts["de"].values() for _, english, translation in part}
    assert german["To change the key or keys to be pressed for a keyboard shortcut:"] == (
        "So ändern Sie für eine Tastenkombination die zu drückenden Tasten:"
    )
    assert german["Press Super+Alt+S."] == "Drücken Sie Super+Alt+S."
    russian = [translation for part in parts["ru"].values() for _, _, translation in part]
    assert sum(bool(re.search(r"[\u0430-\u044f]", text)) for text in russian) > 0.99 * len(russian)
    for language in parts.values():
        for _, *texts in chain(*language.values()):
            assert all(text == " ".join(text.split()) for text in texts)


def test_files_that_are_there_are_not_fetched_again(real, tmp_path):
    gnome_docs.fetch(real[1], tmp_path / "nowhere")
