"""bible_en_es, from tiny stand-ins and from the real packages."""
# ruff: noqa: RUF001 - the texts have curly quotation marks

import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from tests import fakes
from tfhalf.datasets import DatasetError, bible_en_es

ENGLISH = {
    ("Genesis", 1, 1): '<w lemma="x">God</w><note>1:1 or, <w>gods</w></note><w>made</w> it<note>so</note>. ',
    ("Genesis", 1, 2): "only in English",
    ("Ruth", 1, 16): "<div sID='x'/><w>Ruth</w> said, “<w>Don’t</w><note>x</note> urge me,”<note>y</note>please",
    ("Tobit", 1, 1): "a book that Spanish lacks",
    ("Esther", 1, 1): '<q who="a">‘Why?’</q> <q who="b">said he</q>',
    ("Song of Solomon", 1, 2): "<speaker>Beloved</speaker> <l level='1'/>Kiss me.<l/>",
    ("Psalms", 3, 1): '<title type="psalm">A Psalm.</title> <lg/> <l/>Yahweh,<w>how</w> many!<l/>',
    ("Jonah", 2, 1): "Then Jonah prayed.",
    ("Jonah", 1, 17): "only in English, too",
    ("Romans", 16, 24): "Grace to you. Amen.",
    ("III John", 1, 14): "Peace.",
    ("III John", 1, 15): "counted by English only",
    ("Jude", 1, 1): "Jude, a servant.",
    ("James", 1, 1): "Grace to you. AMEN!",  # word for word in Romans
    ("Revelation of John", 22, 21): 'Amen. <chapter eID="Rev.22"/><div type="glossary"/>Abba is a word.',
}
SPANISH = {
    ("Genesis", 1, 1): '<w>EN</w><transChange type="added">Dios</transChange><w>lo</w> crió',
    ("Ruth", 1, 16): "<w>Y Ruth respondió</w>: ¿preguntándo<transChange>me</transChange>, <w>qué</w>?",
    ("Esther", 1, 1): "¿<w>Por qué</w>? dijo él",
    ("Song of Solomon", 1, 2): "¡Oh, si él me besara!",
    ("Psalms", 3, 1): "Salmo. Jehová, ¡cuántos!",
    ("Jonah", 2, 1): "MAS Jehová había prevenido un gran pez.",
    ("Romans", 16, 24): "La gracia. Amén.",
    ("Romans", 16, 27): "",
    ("III John", 1, 14): "Paz. Amén. Enviada de Roma por Onésimo.",
    ("Jude", 1, 1): "Judas, siervo.",
    ("James", 1, 1): "Gracia á vosotros.",
    ("Revelation of John", 22, 21): 'Amén. <chapter eID="Rev.22"/>',
}


def write_stand_in(folder, english=ENGLISH, spanish=SPANISH) -> None:
    fakes.write_bible(folder / "en", "nrsva", english)
    fakes.write_bible(folder / "es", "kjv", spanish)


def prepare(manual_dir, data_dir) -> dict[str, dict]:
    builder = bible_en_es.BibleEnEs(data_dir=data_dir)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    return read(builder)


def read(builder) -> dict[str, dict]:
    """Split to reference to (English, Spanish, book)."""
    return {
        split: {
            e["reference"].decode(): (e["en"].decode(), e["es"].decode(), e["book"].decode())
            for e in builder.as_dataset(split=split).as_numpy_iterator()
        }
        for split in builder.info.splits
    }


def test_stand_in_texts_and_splits(tmp_path):
    write_stand_in(tmp_path)
    # James' greeting, a verse that one side lacks, Jonah 2 and the book of Tobit aren't there.
    assert prepare(tmp_path, tmp_path / "data") == {
        "train": {
            "Genesis 1:1": ("God made it.", "EN Dios lo crió", "Genesis"),
            "Psalms 3:1": ("A Psalm. Yahweh, how many!", "Salmo. Jehová, ¡cuántos!", "Psalms"),
            "Romans 16:24": ("Grace to you. Amen.", "La gracia. Amén.", "Romans"),
            "3 John 1:14": ("Peace.", "Paz. Amén.", "3 John"),
            "Jude 1:1": ("Jude, a servant.", "Judas, siervo.", "Jude"),
            "Revelation 22:21": ("Amen.", "Amén.", "Revelation"),
        },
        "validation": {
            "Esther 1:1": ("‘Why?’ said he", "¿Por qué? dijo él", "Esther"),
            "Song of Solomon 1:2": ("Kiss me.", "¡Oh, si él me besara!", "Song of Solomon"),
        },
        "test": {
            "Ruth 1:16": (
                "Ruth said, “Don’t urge me,” please",
                "Y Ruth respondió: ¿preguntándome, qué?",
                "Ruth",
            )
        },
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("es/nt.bzz", None, r"es/nt\.bzz is missing; remove the folder and fetch again"),
        ("es/nt.bzz", b"not compressed", r"es/nt\.bzz: block 0 is damaged; remove the folder and fetch again"),
        ("en/ot.bzz", b"", r"en/ot\.bzz: block 0 is damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    write_stand_in(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        prepare(tmp_path, tmp_path / "data")


def test_bad_utf8_is_named_by_verse(tmp_path):
    write_stand_in(tmp_path, spanish=SPANISH | {("I Samuel", 2, 3): b"habl\xf3"})
    with pytest.raises(DatasetError, match="es, 1 Samuel 2:3: isn't UTF-8; remove the folder and fetch again"):
        prepare(tmp_path, tmp_path / "data")


def test_a_split_without_verses_is_refused(tmp_path):
    write_stand_in(tmp_path, english={("Genesis", 1, 1): "a", ("Jude", 1, 1): "b"})
    with pytest.raises(DatasetError, match="no verse for validation"):
        prepare(tmp_path, tmp_path / "data")


@pytest.fixture(scope="module")
def real(data_dir):
    """The real data set: (its splits, the folder with the packages' files)."""
    if shutil.which("apt-get") is None:
        pytest.skip("this machine has no apt-get")
    return read(tfds.builder("bible_en_es", data_dir=data_dir)), Path(data_dir, "downloads/manual/bible_en_es")


def test_real_counts_and_books(real):
    parts, _ = real
    assert {split: len(part) for split, part in parts.items()} == {"train": 28676, "validation": 972, "test": 1230}
    books = {split: Counter(book for _, _, book in part.values()) for split, part in parts.items()}
    assert sum(map(len, books.values())) == len(set().union(*books.values())) == 66
    assert books["test"] == {
        "Ruth": 85,
        "Ecclesiastes": 222,
        "Lamentations": 154,
        "Daniel": 357,
        "Amos": 146,
        "Habakkuk": 56,
        "Philippians": 102,
        "James": 108,
    }


def test_real_texts(real):
    parts, _ = real
    assert parts["train"]["Genesis 1:1"][:2] == (
        "In the beginning, God created the heavens and the earth.",
        "EN el principio crió Dios los cielos y la tierra.",
    )
    english, spanish, _ = parts["test"]["Ruth 1:16"]
    assert english.startswith("Ruth said, “Don’t urge me to leave you, and to return from following you, for where")
    assert spanish.endswith("iré yo; y donde quiera que vivieres, viviré. Tu pueblo será mi pueblo, y tu Dios mi Dios.")
    assert parts["train"]["Hebrews 13:25"][1] == "La gracia sea con todos vosotros. Amén."
    assert parts["train"]["Revelation 22:21"][0].endswith("with all the saints. Amen.")
    for part in parts.values():
        for english, spanish, _ in part.values():
            for text in (english, spanish):
                assert text == " ".join(text.split())
                assert not re.search(r"[<>{}&\ufffd]|\d:\d|[a-zá-ú][A-ZÁ-Ú]|[.,;:!?][A-Za-zÁ-ú]| [,.;:!?]", text)
            assert english.isascii() or set(english) - set(map(chr, range(128))) <= set("“”\u2018\u2019—")


def test_real_splits_share_no_text(real):
    parts, _ = real
    texts = {
        split: {tuple(re.findall(r"\w+", text.lower())) for verse in part.values() for text in verse[:2]}
        for split, part in parts.items()
    }
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]


def test_real_verses_are_each_others_translation(real):
    """Names that are spelt the same in both languages: where one side has one, the other mostly has it too."""
    parts, _ = real
    verses = {key: verse for part in parts.values() for key, verse in part.items()}
    names = [set(re.findall(r"\b[A-Z][a-z]{3,}\b", verse[side])) for verse in verses.values() for side in (0, 1)]
    english, spanish = Counter(n for s in names[::2] for n in s), Counter(n for s in names[1::2] for n in s)
    common = {name for name in english if english[name] > 4 and 0.8 < english[name] / max(1, spanish[name]) < 1.25}
    assert len(common) > 150
    found = defaultdict(list)
    for reference, left, right in zip(verses, names[::2], names[1::2], strict=True):
        found[reference.partition(":")[0]] += [name in right for name in left & common]
    assert sum(map(sum, found.values())) / sum(map(len, found.values())) > 0.9
    # A chapter whose verses are out of step has hardly a name in place.
    assert [chapter for chapter, hits in found.items() if len(hits) >= 4 and sum(hits) / len(hits) < 0.6] == []
    assert not {"Numbers 13:1", "Hosea 12:1", "Job 39:1", "Jonah 2:1", "Acts 8:37"} & verses.keys()


def test_files_that_are_there_are_not_fetched_again(real, tmp_path):
    _, folder = real
    bible_en_es.fetch(folder, tmp_path / "nowhere")
