"""fillets_cs and fillets_nl, from stand-ins with the oddities of the real files, and from the real packages."""

import hashlib
import re
import shutil
from collections import Counter, defaultdict

import numpy as np
import pytest
import scipy.signal
import soundfile
import tensorflow_datasets as tfds

from tests import fakes
from tfhalf import datasets
from tfhalf.datasets import DatasetError, fillets

# With the jokes that all share, 25 levels: three test and three validate.
LEVELS = "airplane alibaba atlantis aztec barrel bathroom briefcase broom cabin1 cabin2 cannons cave city".split()  # noqa: SIM905
LEVELS += "dump elk fdto gems gods hole map music party1 party2 reef".split()  # noqa: SIM905


def dialogue(name: str, text: str | None, font: str = "font_small") -> str:
    return f'dialogId("{name}", "{font}", "English")\n' + (f'dialogStr("{text}")\n\n' if text is not None else "\n")


def write_stand_in(folder, language="cs", **scripts: tuple) -> None:
    """Writes all levels and the jokes; those that aren't given have one sentence of their own."""
    for level in LEVELS:
        fakes.write_dialogues(
            folder, f"{level}/", language, *scripts.pop(level, (dialogue("own", f"To je {level}."), "own"))
        )
    fakes.write_dialogues(folder, "share/black_", language, dialogue("smrt-m-0", "Ach nééé."), "smrt-m-0")
    for place, script in scripts.items():
        fakes.write_dialogues(folder, place, language, *script)


def prepare(manual_dir, data_dir, builder=fillets.FilletsCs) -> dict[str, list]:
    builder = builder(data_dir=data_dir)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    return read(builder)


def read(builder) -> dict[str, list]:
    """Split to examples, with strings and the speaker's name."""
    names = builder.info.features["speaker"].names
    return {
        split: [
            {key: value.decode() if isinstance(value, bytes) else value for key, value in example.items()}
            | {"speaker": names[example["speaker"]]}
            for example in builder.as_dataset(split=split).as_numpy_iterator()
        ]
        for split in builder.info.splits
    }


def said(parts, level: str) -> dict[str, tuple[str, str]]:
    """Name to (text, speaker) of what is said in a level."""
    return {
        e["id"].removeprefix(f"{level}/"): (e["text"], e["speaker"])
        for part in parts.values()
        for e in part
        if e["level"] == level
    }


def levels_of(parts) -> dict[str, set[str]]:
    return {split: {example["level"] for example in part} for split, part in parts.items()}


def test_stand_in_splits_are_by_hash_and_the_same_in_both_languages(tmp_path):
    write_stand_in(tmp_path / "a")
    write_stand_in(tmp_path / "b", "nl")
    levels = levels_of(prepare(tmp_path / "a", tmp_path / "a" / "data"))
    assert levels == levels_of(prepare(tmp_path / "b", tmp_path / "b" / "data", fillets.FilletsNl))
    # By hand: families by the sha256 of their names; the first that fit into three levels test, the next ones validate.
    families = defaultdict(list)
    for level in [*LEVELS, "blackjokes"]:
        families[re.fullmatch(r"([a-z]+)\d?", level)[1]].append(level)
    expected = {"test": set(), "validation": set(), "train": set()}
    for family in sorted(families, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        for split, most in (("test", 3), ("validation", 3), ("train", 25)):
            if len(expected[split]) + len(families[family]) <= most:
                expected[split] |= set(families[family])
                break
    assert levels == expected
    assert len(levels["test"]) == len(levels["validation"]) == 3


def test_families_stay_together():
    letters = "abcdefghijklmnop"
    names = [f"{letter}{number}" for letter in letters for number in (1, 2)]
    split_of = fillets.split_names(names, lambda name: name[0], 8)
    assert len(split_of) == 32
    for letter in letters:
        assert split_of[f"{letter}1"] == split_of[f"{letter}2"]
    assert Counter(split_of.values()) == {"test": 4, "validation": 4, "train": 24}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"Je v  C:\\WINDOWS\\CONFIG,\tnebo v \/etc.", r"Je v C:\WINDOWS\CONFIG,tnebo v /etc."),
        (" Řekl: 'Ó, “ďas”!' ", "Řekl: 'Ó, “ďas”!'"),
        (r"Tak \"co\"?", 'Tak "co"?'),
        ("Ne -- to není poznámka.", "Ne -- to není poznámka."),
        ("LC-10", "LC-10"),
        ("", None),
        ("...", None),
        ("A%1.", None),
        ("Подожди. Počkej, svítí červená.", None),
    ],
)
def test_text(tmp_path, text, expected):
    write_stand_in(tmp_path, reef=(dialogue("a", text), "a"))
    texts = said(prepare(tmp_path, tmp_path / "data"), "reef")
    assert texts == ({} if expected is None else {"a": (expected, "small")})


def test_script_with_every_oddity(tmp_path):
    script = (
        '\r\n-- Init: dialogId("no", "no", "no")\r\n'
        + dialogue("v-first", "První.", "font_big")
        + 'dialogId("m-lines", "font_small",\n  "English (in brackets), \\"quoted\\"")\n'
        + '-- between\ndialogStr(\n"Na dvou řádcích.")'
        + dialogue("x", "Všichni.", "font_both")
        + dialogue("laser", None, "")
        + dialogue("silent", "Bez zvuku.")
        + dialogue("empty", "Bez vzorku.")
        + dialogue("last", "Poslední.", "font_viking1")
        + "-- end"
    )
    # nameless: a sound that no text names
    write_stand_in(tmp_path, reef=(script, "v-first", "m-lines", "x", "laser", "last", "nameless"), map=("",))
    fakes.write_sound(tmp_path / "sound/reef/cs/empty.ogg", np.zeros([0, 2]), 22050)
    parts = prepare(tmp_path, tmp_path / "data")
    assert said(parts, "reef") == {
        "v-first": ("První.", "big"),
        "m-lines": ("Na dvou řádcích.", "small"),
        "x": ("Všichni.", "other"),
        "last": ("Poslední.", "other"),
    }
    assert said(parts, "map") == {}


def test_other_scripts_of_a_level_and_shared_ones(tmp_path):
    write_stand_in(
        tmp_path,
        **{
            "briefcase/brief_": (dialogue("kd-uvod", "Dobrý den, ryby.", "font_white"), "kd-uvod"),
            "share/border_": (dialogue("cil-v", "Máme práci.", "font_big"), "cil-v"),
            "share/shout_": (dialogue("sp-shout", "Juchů!"), "sp-shout"),
            "share/bore_": (dialogue("ob-m", "Nudím se."), "ob-m"),
        },
    )
    parts = prepare(tmp_path, tmp_path / "data")
    assert said(parts, "briefcase") == {"own": ("To je briefcase.", "small"), "kd-uvod": ("Dobrý den, ryby.", "other")}
    assert said(parts, "border") == {"cil-v": ("Máme práci.", "big"), "sp-shout": ("Juchů!", "small")}
    assert said(parts, "blackjokes") == {"smrt-m-0": ("Ach nééé.", "small")}
    assert said(parts, "borejokes") == {"ob-m": ("Nudím se.", "small")}


def test_fish_with_other_voices_are_others_in_czech_only(tmp_path):
    for language, builder, speaker in (("cs", fillets.FilletsCs, "other"), ("nl", fillets.FilletsNl, "big")):
        write_stand_in(tmp_path / language, language, hole=(dialogue("a", "To.", "font_big"), "a"))
        parts = prepare(tmp_path / language, tmp_path / language / "data", builder)
        assert said(parts, "hole") == {"a": ("To.", speaker)}


def test_what_is_said_in_two_splits_stays_in_the_smaller_one(tmp_path):
    write_stand_in(tmp_path)
    levels = levels_of(prepare(tmp_path, tmp_path / "data"))
    train, validation, test = (min(levels[split] - {"blackjokes"}) for split in ("train", "validation", "test"))
    scripts = {
        train: [("1", "Haló!"), ("2", "...kdo ví?"), ("3", "Vlastní."), ("4", "Vlastní.")],
        validation: [("1", "haló"), ("2", "Kdo ví"), ("3", "Jiné.")],
        test: [("1", "Haló..."), ("2", "Poslední.")],
    }
    scripts = {
        level: ("".join(dialogue(*each) for each in texts), *(name for name, _ in texts))
        for level, texts in scripts.items()
    }
    write_stand_in(tmp_path / "second", **scripts)
    parts = prepare(tmp_path / "second", tmp_path / "second" / "data")
    assert levels_of(parts) == levels
    assert said(parts, test).keys() == {"1", "2"}
    assert said(parts, validation).keys() == {"2", "3"}
    assert said(parts, train).keys() == {"3", "4"}  # twice in one split is none of our business


def test_speech_is_the_sound(tmp_path):
    write_stand_in(tmp_path)
    for part in prepare(tmp_path, tmp_path / "data").values():
        for example in part:
            speech = example["speech"]
            assert speech.dtype == np.int16
            folder = "share/blackjokes" if example["level"] == "blackjokes" else example["level"]
            path = tmp_path / "sound" / folder / "cs" / f"{example['id'].partition('/')[2]}.ogg"
            samples, _ = soundfile.read(path)
            expected = scipy.signal.resample_poly(samples[:, 0], 320, 441) * 32768
            assert len(speech) == 4000
            np.testing.assert_allclose(speech[500:-500], expected[500:-500], atol=100)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (b'dialogId("a", "font_big", "A")\ndialogStr("\xe8au")\n', r"dialogs_cs\.lua, line 2: isn't UTF-8; remove the"),
        (
            dialogue("a", "A") + 'dialogStr("B")',
            r"line 4: dialogId expected, found 'dialogStr\(\"B\"\)'; .*fetch again",
        ),
        ('dialogId("a", "font_big")\n', "line 1: dialogId expected"),
        ('dialogId("a", "font_big", "A")\ndialogStr("B)\n', "line 2: dialogId expected"),
        ("\n\n<html>", "line 3: dialogId expected, found '<html>'"),
    ],
)
def test_damaged_scripts_are_named(tmp_path, script, message):
    write_stand_in(tmp_path, reef=(script, "a"))
    with pytest.raises(DatasetError, match=message):
        prepare(tmp_path, tmp_path / "data")


def test_damaged_sounds_are_named(tmp_path):
    write_stand_in(tmp_path)
    (tmp_path / "sound/reef/cs/own.ogg").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"reef/cs/own\.ogg: .*; remove the folder and fetch again"):
        prepare(tmp_path, tmp_path / "data")


def test_no_files_are_told(tmp_path):
    with pytest.raises(DatasetError, match="no sentence for test; remove the folder and fetch again"):
        prepare(tmp_path, tmp_path / "data")


@pytest.mark.slow
@pytest.mark.soak  # the stand-in goes the same way
def test_real_packages(tmp_path):
    if shutil.which("apt-get") is None:
        pytest.skip("this machine has no apt-get")
    lines = []
    builder = datasets.prepare("fillets_nl", str(tmp_path), lines.append)
    assert "fetching fillets_nl from packages, 103 MB" in lines
    counts = {split: about.num_examples for split, about in builder.info.splits.items()}
    assert counts == {"train": 1289, "validation": 177, "test": 143}
    manual = tmp_path / "downloads" / "manual" / "fillets_nl"
    (tmp_path / "nowhere").mkdir()
    fillets.fetch("nl", manual, tmp_path / "nowhere")
    assert list((tmp_path / "nowhere").iterdir()) == []  # what is there isn't fetched again

    for folder in ("scratch", "cs"):
        (tmp_path / folder).mkdir()
    fillets.fetch("cs", tmp_path / "cs", tmp_path / "scratch")
    parts = {
        "nl": read(builder),
        "cs": {
            split: [clip._asdict() for clip in part]
            for split, part in fillets.split_clips(tmp_path / "cs", "cs").items()
        },
    }
    assert [len(part) for part in parts["cs"].values()] == [1413, 222, 166]
    levels = [levels_of(parts[language]) for language in ("cs", "nl")]
    for split, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not (levels[0][split] | levels[1][split]) & (levels[0][other] | levels[1][other])
        for language in ("cs", "nl"):
            texts = [{tuple(re.findall(r"\w+", e["text"].lower())) for e in parts[language][s]} for s in (split, other)]
            assert not texts[0] & texts[1]
    assert {e["speaker"] for part in parts["nl"].values() for e in part} == {"small", "big"}
    minutes = {split: sum(len(e["speech"]) for e in part) / 16000 / 60 for split, part in parts["nl"].items()}
    assert minutes == pytest.approx({"train": 75.6, "validation": 10.9, "test": 9.1}, abs=0.06)
    assert said(parts["nl"], "airplane")["let-m-divna"] == ("Wat is dit voor raar schip?", "small")
    assert said(parts["cs"], "airplane")["let-m-divna"] == ("Co je to za divnou loď?", "small")
    assert said(parts["cs"], "cabin1")["k1-pap-kruty"] == ("Krrrutý kapitán Silverrrr...", "other")
    # Nobody says thirty characters a second, or one every second: a text of another sound would show.
    for example in parts["nl"]["test"]:
        assert 1 < len(example["text"]) / (len(example["speech"]) / 16000) < 30
