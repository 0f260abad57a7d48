"""A toy voice learned, served and understood; texts of any kind; losses by hand; speakers; refusals."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

import tfhalf
from apps import runner, sets
from apps.audio import alphabet, listener, synthesis
from tests.conftest import options_for
from tfhalf.datasets import sounds

RATE, STRIDE = 16_000, 160
# A letter is a chord of its own, a space is a pause; the second speaker's are higher.
HERTZ = {"a": (400, 900), "b": (700, 1500), "č": (1200, 2200), "d": (300, 1900)}
SMALL = ("--width=32", "--depth=1", "--batch_size=16", "--learning_rate=5e-3", "--epochs=60")


def speak(text: str, random, shift: float = 1.0) -> np.ndarray:
    """A letter and the gap behind it take 11 to 15 frames, of a text all alike."""
    time = np.arange(STRIDE * random.integers(11, 16) - 480) / RATE
    pieces = []
    for letter in text:
        wave = sum(np.sin(2 * np.pi * shift * hertz * time) for hertz in HERTZ.get(letter, ()))
        pieces += [0.2 * wave * np.hanning(len(time)), np.zeros(480)]
    sound = np.concatenate(pieces)
    return (2**15 * (sound + 0.002 * random.normal(size=len(sound)))).astype("int16")


class ToyVoices(tfds.core.GeneratorBasedBuilder):
    """Words of letters; of the training clips some can't be learned from."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "speech": sounds.feature(RATE),
            "text": tfds.features.Text(),
            "speaker": tfds.features.ClassLabel(names=["low", "high", "nobody"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        sizes = {"train": 120, "validation": 16, "test": 12}
        return {split: self._generate_examples(num, seed) for seed, (split, num) in enumerate(sizes.items())}

    def _generate_examples(self, num, seed):
        random = np.random.default_rng(seed)
        for index in range(num):
            sizes = random.integers(1, 5, random.integers(1, 3))
            words = ["".join(random.choice(list(HERTZ), size, replace=False)) for size in sizes]
            text, speaker = " ".join(words), int(index % 3 == 0)
            speech = speak(text, random, 1.3 if speaker else 1.0)
            text = text.replace(" ", ", " if index % 2 else " ")
            if num == 120 and index == 1:
                text = "?!"
            if num == 120 and index == 2:
                speech = np.tile(speech, 11 * RATE // len(speech) + 1)
            yield index, {"speech": sounds.encoded(speech), "text": f"{text.upper()}.", "speaker": speaker}


class ToyWordless(ToyVoices):
    """No text."""

    def _info(self):
        features = {"speech": sounds.feature(RATE), "label": tfds.features.ClassLabel(num_classes=2)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))


class Judge:
    """Knows how long a letter takes, and which chord is which: an oracle without a network."""

    alphabet, folder = alphabet.Alphabet([" ", *HERTZ]), "judge"

    def __init__(self, folder, sampling_rate):
        assert sampling_rate == RATE

    def align(self, recordings, labels, stride):
        assert max(map(max, labels)) <= len(self.alphabet.characters), "it has no marks"
        frames = [
            [0, *[len(recording) // len(own) // stride] * len(own), 1]
            for recording, own in zip(recordings, labels, strict=True)
        ]
        return [np.array(row, np.int32) for row in frames]

    def transcribe(self, recordings):
        return [self._heard(recording) for recording in recordings]

    def _heard(self, recording):
        starts = np.arange(0, len(recording) - 640, 160)
        frames = np.array([recording[start : start + 640] * np.hanning(640) for start in starts]).reshape(-1, 640)
        power = np.abs(np.fft.rfft(frames, RATE)) ** 2
        chords = [[power[:, hertz - 30 : hertz + 30].sum(axis=1) for hertz in chord] for chord in HERTZ.values()]
        loudness = np.min(chords, axis=1)  # of the weaker tone
        said = np.where(loudness.max(axis=0) > 3e3, 1 + loudness.argmax(axis=0), 0)
        runs = [(label, len(list(run))) for label, run in itertools.groupby(said)]
        letters = [
            [*HERTZ][label - 1] if label and size > 3 else " " if size > 8 and not label else "" for label, size in runs
        ]
        return " ".join("".join(letters).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True, scope="module")
def _judged():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthesis, "Listener", Judge)
        yield


def options(folder: str, *arguments: str, dataset: str = "toy_voices"):
    return options_for(
        synthesis.TASK, f"--data_dir={folder}", f"--dataset={dataset}", "--recogniser=judge", *SMALL, *arguments
    )


@pytest.fixture(scope="module")
def learned(folder):
    chosen = options(folder)
    data = runner.load(synthesis.TASK, chosen)
    model = runner.build(synthesis.TASK, chosen, data)
    for epoch in range(chosen.epochs):
        for batch in data.train(epoch):
            model.train_on_batch(*batch)
    return model, data


@pytest.mark.slow
@pytest.mark.soak  # the contract exports a bundle and draws what is shown
def test_it_learns_to_speak_and_the_bundle_speaks_alike(learned, tmp_path):
    model, data = learned
    call = runner.answering(synthesis.TASK, model, data)
    scores = synthesis.score(call, data)
    assert scores["recordings_cer"] == 0
    assert scores["vocoded_cer"] < 0.1
    assert scores["cer"] < 0.5  # of silence it is 1; what is missing are short pauses and the faintest chord
    assert 0 < scores["vocoded_mcd"] < 8
    assert 0 < scores["mcd"] < 8
    assert scores["total"] == 8
    assert synthesis.describe(scores).startswith("Test mel-cepstral distortion: ")

    serve, signature = synthesis.serve(model, data)
    tfhalf.export_saved_model(
        model,
        tmp_path / "1",
        inputs=runner._samples(data),
        serve=serve,
        input_signature=signature,
        decide=synthesis.decide(model, data),
        resources=data.resources,
    )
    served = tfhalf.load_saved_model(tmp_path / "1")
    again = synthesis.score(lambda **inputs: served(inputs), data)
    assert again["mcd"] == pytest.approx(scores["mcd"], abs=0.1)

    texts = ["AB, čd!", "", "   ...  ", "7 \N{SNOWMAN}", "a" * 500, "C\N{COMBINING CARON}"]
    answer = served(np.array([text.encode() for text in texts]))
    assert np.isfinite(answer["waveform"]).all()
    assert np.abs(answer["waveform"]).max() <= 1
    assert answer["length"][1] == answer["length"][2] == answer["length"][3] == 0
    assert answer["durations"][0].astype(bool).sum() == 7  # four letters, the space, and both ends
    assert answer["durations"][4].astype(bool).sum() == 402
    assert answer["length"].tolist() == [max(160 * (row.sum() - 1), 0) for row in answer["durations"]]
    for row, length in zip(answer["waveform"], answer["length"], strict=True):
        assert not row[length:].any()
    alone = served(np.array([b"ab ! \xc4\x8dd"]))
    np.testing.assert_array_equal(alone["durations"][0], answer["durations"][0][: alone["durations"].shape[1]])
    assert Judge("", RATE).transcribe([answer["waveform"][5][: answer["length"][5]]]) == ["č"]


@pytest.mark.soak
def test_marks_are_read_as_pauses(learned):
    model, data = learned
    encode, _ = synthesis.serve(model, data)
    labels = encode(tf.constant(["ab", "A, b."]))["labels"].numpy()
    a, b, space, mark = data.resources[0].encode("ab ,")
    assert labels.tolist() == [[mark, a, b, mark, 0], [mark, a, mark, b, mark]]
    rows = [row[row > 0][1:-1] for inputs, _ in data.train(0) for row in inputs["labels"].numpy()]
    assert {space, mark} <= {label for row in rows for label in row}


@pytest.mark.soak
def test_what_is_shown(learned, tmp_path):
    model, data = learned
    shown = synthesis.show(model, data)
    assert set(shown) == {f"sentence{number}{kind}" for number in (1, 2) for kind in ("", "_synthetic", "_recording")}
    assert shown["sentence1"].startswith(b"\x89PNG")
    assert shown["sentence2_synthetic"].startswith(b"RIFF")
    concluded = synthesis.conclude(runner.answering(synthesis.TASK, model, data), data, tmp_path)
    assert {name.removeprefix("test_") for name in concluded} == set(shown)
    written = sorted(path.read_text() for path in tmp_path.glob("text*.txt"))
    texts = sorted(text.decode() for inputs, _ in data.test for text in inputs["text"].numpy())
    assert written == texts


def test_errors_of_own_places_by_hand():
    target = np.array([[[1, 2, 1], [3, 4, 1], [9, 9, 0]], [[9, 9, 0]] * 3], "float32")
    seen = np.array([[[0, 2], [3, 8], [5, 5]], [[5, 5]] * 3], "float32")
    losses = synthesis.build_loss(None)
    np.testing.assert_allclose(losses["mel"].call(target, seen), [(1 + 0 + 0 + 4) / 4, 0])
    deviances = [1 - 1 + np.log(1), np.exp(3) - 3 - 3 * (3 - np.log(3))]
    np.testing.assert_allclose(losses["prosody"].call(target, seen), [(sum(deviances) + 0 + 16) / 4, 0], rtol=1e-6)
    silent = np.array([[[0, 0, 1]]], "float32")  # a duration of 0 has a finite error, least far down
    low = np.array([[[-3.0, 0]]], "float32")
    np.testing.assert_allclose(losses["prosody"].call(silent, low), [np.exp(-3) / 2], rtol=1e-6)
    for kind in (synthesis.FrameError, synthesis.ProsodyError):
        assert kind.from_config(kind(name="other").get_config()).name == "other"


def test_what_is_filled_up_does_not_overflow():
    target = np.array([[[1, 2, 1], [9, 9, 0]]], "float32")
    seen = tf.constant([[[0.0, 2.0], [200.0, 1e30]]])
    with tf.GradientTape() as tape:
        tape.watch(seen)
        loss = tf.reduce_sum(synthesis.ProsodyError().call(target, seen))
    assert np.isfinite(loss)
    gradient = tape.gradient(loss, seen).numpy()
    assert np.isfinite(gradient).all()
    assert not gradient[0, 1].any()


def test_the_best_duration_is_the_mean():
    durations = np.array([0.1, 0.1, 0.4, 2.0], "float32")
    target = np.stack([durations, 0 * durations, 1 + 0 * durations], axis=-1)[:, np.newaxis]
    logarithms = np.linspace(-3, 1, 401)
    errors = [np.mean(synthesis.ProsodyError().call(target, np.full([4, 1, 2], [x, 0], "float32"))) for x in logarithms]
    assert np.exp(logarithms[np.argmin(errors)]) == pytest.approx(durations.mean(), rel=1e-2)


def test_speakers(folder, capsys):
    data = synthesis.load_data(options(folder))
    assert data.about["speaker"] == "low"
    assert data.steps_per_epoch == (80 - 2) // 16
    assert "2 of 80 training clips are left out" in capsys.readouterr().out
    assert synthesis.load_data(options(folder, "--speaker=high")).about["speaker"] == "high"
    with pytest.raises(runner.AppError, match="--speaker=me: toy_voices has low, high, nobody"):
        synthesis.load_data(options(folder, "--speaker=me"))
    with pytest.raises(runner.AppError, match="no clip of nobody; choose another --speaker"):
        synthesis.load_data(options(folder, "--speaker=nobody"))


def test_refusals(folder, monkeypatch):
    with pytest.raises(runner.AppError, match=r"speech synthesis needs speech .Audio. and text .Text."):
        synthesis.load_data(options(folder, dataset="toy_wordless"))
    with pytest.raises(runner.AppError, match="--width=33 must be even"):
        synthesis.load_data(options(folder, "--width=33"))
    monkeypatch.setattr(sets, "prepare", lambda options: pytest.fail("fetched before the recogniser is there"))
    monkeypatch.setattr(synthesis, "Listener", listener.Listener)
    with pytest.raises(runner.AppError, match=r"--recogniser: judge is no bundle"):
        synthesis.load_data(options(folder))
    with pytest.raises(runner.AppError, match=r"--recogniser.*python -m apps.audio.recognition --dataset=toy_voices"):
        synthesis.load_data(options_for(synthesis.TASK, "--dataset=toy_voices", f"--saved_model_dir={folder}/none"))
