"""What is loaded, kept, refused and forgotten, with a loader that only reads a file."""

import shutil

import pytest

from tfhalf import bundle, versions


class Folder:
    """A base folder, and a keeper that loads the text in each version's file; "bad" can't be loaded."""

    def __init__(self, base, keep=2):
        self.base, self.loads, self.told = base, [], []
        self.keeper = versions.Keeper(base, self.load, keep, self.told.append)

    def load(self, model, number, folder):
        self.loads.append((model, number))
        text = (folder / "file").read_text()
        if text == "bad":
            raise bundle.ExportError("it is\nbad")
        return text

    def put(self, model, number, text="good"):
        folder = self.base / model / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "file").write_text(text)

    def states(self, model):
        return {number: one.state for number, one in self.keeper.models.get(model, {}).items()}


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_newest_versions_are_kept(folder):
    for number in (1, 2, 10):
        folder.put("a", number, f"a{number}")
    folder.put("b", 7)
    folder.keeper.poll()
    assert folder.states("a") == {10: "AVAILABLE", 2: "AVAILABLE"}
    assert (folder.keeper.find("a"), folder.keeper.find("a", 2), folder.keeper.find("a", 1)) == ("a10", "a2", None)
    assert folder.keeper.find("b", 0) == "good"
    assert folder.keeper.find("c") is None


def test_new_version_comes_before_the_old_one_goes(folder):
    folder.put("a", 1)
    folder.put("a", 2)
    folder.keeper.poll()
    seen = []
    load, folder.keeper._load = folder.keeper._load, lambda *a: seen.append(folder.states("a")) or load(*a)
    folder.put("a", 3)
    folder.keeper.poll()
    assert seen == [{1: "AVAILABLE", 2: "AVAILABLE", 3: "LOADING"}]
    assert folder.states("a") == {2: "AVAILABLE", 3: "AVAILABLE"}
    assert folder.told == ["a version 1: unloaded"]


def test_bad_version_is_refused_once_and_the_older_ones_stay(folder):
    folder.put("a", 1)
    folder.put("a", 2)
    folder.put("a", 3, "bad")
    for _ in range(3):
        folder.keeper.poll()
    assert folder.states("a") == {3: "END", 2: "AVAILABLE", 1: "AVAILABLE"}
    assert folder.keeper.models["a"][3].error == "it is bad"
    assert folder.told == ["a version 3: refused: it is bad"]
    assert folder.loads.count(("a", 3)) == 1
    assert folder.keeper.find("a", 3) is None
    assert folder.keeper.find("a") == "good"


def test_version_that_was_not_whole_is_tried_again_when_it_changes(folder):
    folder.put("a", 1, "bad")
    folder.keeper.poll()
    folder.put("a", 1, "better")
    folder.keeper.poll()
    assert folder.keeper.find("a") == "better"


def test_what_is_gone_is_forgotten_but_not_when_nothing_can_be_read(folder):
    folder.put("a", 1)
    folder.put("b", 1)
    folder.keeper.poll()
    shutil.rmtree(folder.base / "a")
    folder.keeper.poll()
    assert folder.keeper.models.keys() == {"b"}
    away = folder.base.rename(folder.base.with_name("away"))
    folder.keeper.poll()
    folder.keeper.poll()
    assert folder.keeper.find("b") == "good"
    assert len([line for line in folder.told if line.startswith("can't read")]) == 1
    away.rename(folder.base)


def test_one_model_that_cannot_be_read_stops_no_other(folder, monkeypatch):
    folder.put("a", 1)
    folder.put("b", 1)
    folder.keeper.poll()
    iterdir = versions.Path.iterdir

    def unreadable(path):
        if path.name == "a":
            raise PermissionError(13, "Permission denied")
        return iterdir(path)

    with monkeypatch.context() as patch:
        patch.setattr(versions.Path, "iterdir", unreadable)
        folder.put("b", 2)
        folder.keeper.poll()
        folder.keeper.poll()
    assert folder.states("b") == {1: "AVAILABLE", 2: "AVAILABLE"}
    assert folder.keeper.find("a") == "good"
    assert [line for line in folder.told if "can't read" in line] == [f"can't read {folder.base / 'a'}; what is loaded "
                                                                     "is served on"]  # fmt: skip


def test_what_may_pass_is_tried_again_with_growing_pauses(folder, monkeypatch):
    now, load = [0.0], folder.keeper._load
    monkeypatch.setattr(versions.time, "monotonic", lambda: now[0])

    def full(*arguments):
        folder.loads.append(arguments[:2])
        raise OSError(28, "No space left on device")

    folder.keeper._load = full
    folder.put("a", 1)
    for now[0] in range(12):
        folder.keeper.poll()
    assert len(folder.loads) == 3  # at 0, 2 and 6
    assert len(folder.told) == 1
    folder.keeper._load, now[0] = load, 14.0
    folder.keeper.poll()
    assert folder.states("a") == {1: "AVAILABLE"}


def test_what_is_no_version_is_left_alone(folder):
    folder.put("a", 1)
    for name in (".staging-2-ab", "0", "-3", "٣", "1.5", "99999999999999999999", "tmp"):
        folder.put("a", name)
    (folder.base / "a" / "README.md").write_text("x")
    (folder.base / "README.md").write_text("x")
    folder.put(".hidden", 1)
    folder.keeper.poll()
    assert folder.loads == [("a", 1)]


def test_what_may_come_is_new_and_on_disk(folder):
    folder.put("a", 2)
    folder.keeper.poll()
    folder.put("a", 1)
    folder.put("a", 3)
    folder.put("b", 1)
    assert folder.keeper.may_come("a", 3)
    assert not folder.keeper.may_come("a", 1)  # old: it was left out on purpose
    assert not folder.keeper.may_come("a", 4)
    assert folder.keeper.may_come("b")
    assert not folder.keeper.may_come("c")
    for name in ("", "..", "../a", "a/3", ".x", "a\0b"):
        assert not folder.keeper.may_come(name, 3)
