"""A toy language learned and served; clips beside each other; odd clips; error rates against jiwer; refusals."""

import subprocess
import sys

import jiwer
import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

import tfhalf
from apps import runner, sets
from apps.audio import augmentation, ctc, recognition, spectra
from tests.conftest import options_for
from tfhalf.datasets import sounds

RATE = 16_000
# A letter is a chord of its own, a space is a pause.
HERTZ = {"a": (400, 900), "b": (700, 2500), "č": (1200, 3400), "d": (300, 1700)}
# Roundings of half operands, 2^-11 each, behind two convolutions and an LSTM.
ATOL = {"float32": 2e-4, "mixed_float16": 3e-2}


def speak(text: str, random) -> np.ndarray:
    pieces = []
    for letter in text:
        time = np.arange(round(random.uniform(0.09, 0.13) * RATE)) / RATE
        wave = sum(np.sin(2 * np.pi * hertz * time) for hertz in HERTZ.get(letter, ()))
        pieces += [0.2 * wave * np.hanning(len(time)), np.zeros(round(0.03 * RATE))]
    sound = np.concatenate(pieces) if pieces else np.zeros(800)
    return (2**15 * (sound + 0.002 * random.normal(size=len(sound)))).astype("int16")


class ToySpeech(tfds.core.GeneratorBasedBuilder):
    """Words of four letters; of the training clips some can't be trained on."""

    VERSION = tfds.core.Version("1.0.0")
    ODD = (("7", "a"), ("a" * 40, "ab"), ("?!", "d"), ("ab", "long"))

    def _info(self):
        features = {"speech": sounds.feature(RATE), "text": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        sizes = {"train": 240, "validation": 16, "test": 21}
        return {split: self._generate_examples(num, seed) for seed, (split, num) in enumerate(sizes.items())}

    def _generate_examples(self, num, seed):
        random = np.random.default_rng(seed)
        for index in range(num):
            words = ["".join(random.choice(list(HERTZ), random.integers(1, 4))) for _ in range(random.integers(1, 3))]
            text, said = (" ".join(words),) * 2
            if num == 240 and index < len(self.ODD):
                text, said = self.ODD[index]
            speech = speak(said, random)
            if said == "long":
                speech = np.tile(speech, 17 * RATE // len(speech) + 1)
            yield index, {"speech": sounds.encoded(speech), "text": f"{text.upper()}."}


class ToyOfLabels(ToySpeech):
    """No text."""

    def _info(self):
        features = {"audio": sounds.feature(RATE), "label": tfds.features.ClassLabel(num_classes=2)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))


class ToyWithoutWords(ToySpeech):
    """Nothing that can be trained on."""

    ODD = (("!", "a"),) * 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("data"))


def options(folder: str, *more: str):
    small = ["--dataset=toy_speech", "--width=32", "--depth=1", "--beam_size=8", "--batch_size=8", *more]
    return options_for(recognition.TASK, f"--data_dir={folder}", *small)


@pytest.fixture(scope="module")
def learned(folder, tmp_path_factory):
    """A small half model that has learned the language, its data, what loading printed, and its losses."""
    settings = options(folder, "--epochs=9", "--learning_rate=1e-2")
    sets.prepare(settings)
    printed, say = [], runner.say
    runner.say = printed.append
    try:
        data = recognition.load_data(settings)
    finally:
        runner.say = say
    model = runner.build(recognition.TASK, settings, data)
    losses = [model.fit(data.train(epoch), verbose=0).history["loss"][0] for epoch in range(settings.epochs)]
    return model, data, printed, losses


@pytest.fixture(scope="module")
def answer(learned):
    """What clients get of it."""
    model, data, *_ = learned
    return runner.answering(recognition.TASK, model, data)


def batch(clips: list[np.ndarray], samples: int | None = None) -> dict[str, tf.Tensor]:
    """Inputs of `serve`; behind each clip is noise, which doesn't count."""
    lengths = np.array([len(clip) for clip in clips], "int32")
    samples = max(lengths) if samples is None else samples
    waveform = np.random.default_rng(0).normal(size=[len(clips), samples]).astype("float32")
    for row, clip in zip(waveform, clips, strict=True):
        row[: len(clip)] = clip
    return {"waveform": tf.constant(waveform), "length": tf.constant(lengths)}


def strings(tensor: tf.Tensor) -> list[str]:
    return [text.decode() for text in tensor.numpy()]


@pytest.fixture(scope="module")
def said():
    """Texts, and clips of very different lengths of them."""
    texts, random = ["d", "ab č", "čad bab", "b"], np.random.default_rng(5)
    return texts, [speak(text, random).astype("float32") / 2**15 for text in texts]


# Learned, and served


def test_it_learns_a_language(learned, answer):
    _, data, _, losses = learned
    assert losses[-1] < losses[0] / 3  # of masked clips, at three speeds
    scores = recognition.score(answer, data)
    assert scores["cer"] < 0.1
    assert scores["total"] == sum(len(text) for _, texts in data.test for text in strings(texts))


def test_what_is_told_of_the_data(learned):
    _, data, printed, _ = learned
    assert data.about == {"sampling_rate": RATE, "characters": [" ", "a", "b", "d", "č"], "beam_size": 8}
    assert printed == [
        "1 characters of the training texts are none of the model's: '7' 1",
        "1 of 240 training clips are left out: longer than 16 seconds",
        "1 of 240 training clips are left out: have a text too long for them",
        "2 of 240 training clips are left out: have no text",
    ]
    assert data.steps_per_epoch == 236 // 8


def test_accuracy_in_training_is_1_less_jiwers_error_rate_of_greedy_search(learned):
    model, data, *_ = learned
    seen = model.evaluate(data.validation, verbose=0, return_dict=True)
    hear, find = recognition.serve(model, data)[0], recognition.decide(model, data)["_greedy"]
    (characters,) = data.resources
    references, heard, losses = [], [], []
    for inputs, packed in data.validation:
        raw = hear(**inputs)
        references += strings(characters.decode(packed[:, 1:]))
        heard += strings(find(raw)["text"])
        losses += (-ctc.log_probability(raw["log_probs"], raw["num_steps"], packed[:, 1:])).numpy().tolist()
    assert seen["character_accuracy"] == pytest.approx(1 - jiwer.cer(references, heard), abs=0.01)  # doubled spaces
    # Of each clip as it is: no mask of Keras' multiplies it.
    assert seen["loss"] == pytest.approx(np.mean(losses) / 32, rel=1e-2)


def test_accuracy_by_hand():
    metric = recognition.CharacterAccuracy()
    paths = np.array([[1, 1, 0, 2, 3], [4, 0, 4, 0, 0]])  # 1 2 3; 4 4, of four steps
    logits = 9 * np.eye(5, dtype="float32")[paths]
    labels = ctc.pack(tf.constant([5, 4]), tf.constant([[1, 2, 0, 0], [4, 4, 3, 1]]))
    metric.update_state(tf.cast(labels, tf.float32), logits)
    assert float(metric.result()) == pytest.approx(1 - 3 / 6)
    metric.update_state(ctc.pack(tf.constant([5]), tf.zeros([1, 1], tf.int32)), logits[:1])
    assert float(metric.result()) == pytest.approx(1 - 6 / 6)


@pytest.mark.parametrize("policy", ATOL)
def test_batch_of_mixed_lengths_answers_as_one_by_one(learned, said, policy):
    model, data, *_ = learned
    texts, clips = said
    call = tf.function(recognition.serve(model, data)[0], reduce_retracing=True)
    with tfhalf.precision.computing_in(model, {"float32": "float32", "mixed_float16": "float16"}[policy]):
        call = tf.function(recognition.serve(model, data)[0], reduce_retracing=True)
        for samples in (None, max(map(len, clips)) + 161):  # an odd number of frames, and an even one
            together = call(**batch(clips, samples))
            for row, clip in enumerate(clips):
                alone = call(**batch([clip]))
                (steps,) = alone["num_steps"].numpy()
                assert together["num_steps"][row] == steps
                np.testing.assert_allclose(
                    together["log_probs"][row, :steps], alone["log_probs"][0, :steps], atol=ATOL[policy]
                )
                assert not together["log_probs"][row, steps:].numpy().any()
    find = recognition.decide(model, data)[""]
    assert strings(find(together)["text"]) == texts


def test_training_does_not_depend_on_the_clips_beside_either(learned, said):
    """Gradients of a batch are the sum of each clip's own."""
    model, data, *_ = learned
    texts, clips = said
    (characters,) = data.resources

    def gradients(rows):
        inputs = batch([clips[row] for row in rows])
        labels = tf.ragged.stack([characters.encode(texts[row]) for row in rows]).to_tensor()
        with tf.GradientTape() as tape:
            logits = model(inputs)
            steps = recognition.count_steps(inputs["length"])
            loss = -tf.reduce_sum(ctc.log_probability(logits, steps, labels))
        return [tf.convert_to_tensor(each).numpy() for each in tape.gradient(loss, model.trainable_variables)]

    with tfhalf.precision.computing_in(model, "float32"):
        together = gradients([0, 2])
        for whole, *parts in zip(together, gradients([0]), gradients([2]), strict=True):
            np.testing.assert_allclose(whole, sum(parts), atol=2e-4 * max(1.0, np.abs(whole).max()))


def test_odd_clips(learned):
    model, data, *_ = learned
    random = np.random.default_rng(1)
    clips = {
        "empty": np.zeros(0),
        "one sample": np.full(1, 0.3),
        "silent": np.zeros(9000),
        "clipped": np.sign(random.normal(size=9000)),
        "constant": np.ones(4000),
        "beyond full scale": 40 * random.normal(size=3000),
        "long": random.normal(size=40 * RATE) / 9,
    }
    with tfhalf.precision.computing_in(model, "float32"):  # roundings of half differ with the shape of a batch
        answer = runner.answering(recognition.TASK, model, data)
        answers = answer(**batch(list(clips.values())))
        alone = [answer(**batch([clip.astype("float32")])) for clip in clips.values()]
    raw = recognition.serve(model, data)[0](**batch(list(clips.values())[:4]))
    assert raw["num_steps"].numpy().tolist() == [0, 1, 15, 15]
    assert np.isfinite(answers["score"]).all()
    assert answers["text"][0] == b""
    assert answers["score"][0] == 0.0
    for row, name in enumerate(clips):
        assert alone[row]["text"][0] == answers["text"][row], name
        # The features of a clip that never changes are rounding errors, which differ with the shape of a batch.
        atol = 0.3 if name in ("silent", "constant") else 1e-3
        np.testing.assert_allclose(alone[row]["score"][0], answers["score"][row], atol=atol, rtol=1e-3, err_msg=name)


def test_a_length_that_cannot_be_is_the_nearest_that_can(answer, said):
    clip = said[1][1]
    inputs = {"waveform": tf.constant(np.stack([clip] * 2)), "length": tf.constant([10**9, -5])}
    expected = answer(**batch([clip, np.zeros(0, "float32")]))
    assert answer(**inputs)["text"].numpy().tolist() == expected["text"].numpy().tolist()
    nothing = {"waveform": tf.zeros([2, 0]), "length": tf.constant([0, 7])}
    assert answer(**nothing)["text"].numpy().tolist() == [b"", b""]


@pytest.mark.slow
def test_bundle_hears_the_same_in_a_process_of_its_own(learned, answer, said, tmp_path):
    model, data, *_ = learned
    serve, signature = recognition.serve(model, data)
    inputs = batch(said[1])
    tfhalf.export_saved_model(
        model,
        tmp_path / "1",
        inputs={name: tensor.numpy() for name, tensor in batch(said[1][:2]).items()},
        serve=serve,
        input_signature=signature,
        decide=recognition.decide(model, data),
        resources=data.resources,
    )
    np.savez(tmp_path / "inputs.npz", **inputs)
    code = f"""
import sys
sys.modules["keras"] = sys.modules["tfhalf"] = None  # importing them would fail
import numpy as np, tensorflow as tf
loaded = tf.saved_model.load("{tmp_path}/1")
for name in ("serving_default", "serving_default_greedy", "serving_float32", "serving_bfloat16"):
    outputs = loaded.signatures[name](**{{k: tf.constant(v) for k, v in np.load("{tmp_path}/inputs.npz").items()}})
    print("heard", name, *outputs["text"].numpy().tolist(), *np.round(outputs["score"].numpy(), 3), sep="|")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = [line.split("|") for line in result.stdout.splitlines() if line.startswith("heard")]
    assert len(rows) == 4
    scores = answer(**inputs)["score"].numpy()
    for _, name, *cells in rows:
        assert cells[:4] == [str(text.encode()) for text in said[0]], name
        if "greedy" not in name:
            np.testing.assert_allclose(np.array(cells[4:], float), scores, atol=0.3, err_msg=name)


# Half precision


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_features_are_not_rounded(folder, learned, said, policy):
    settings = options(folder, f"--dtype_policy={policy}")
    model = runner.build(recognition.TASK, settings, learned[1])
    assert tfhalf.left_alone(model) == {}
    features = keras.Model(model.input, model.get_layer("spec_augment").output)
    inputs = batch(said[1])
    np.testing.assert_array_equal(features(inputs), spectra.LogMel(RATE)(inputs["waveform"], inputs["length"]))
    measured = tfhalf.coverage(model, inputs)
    assert set(measured.islands) == {"log_mel", "conv0_norm", "conv1_norm", "norm0", "logits"}


def test_first_loss_scale_fits(learned):
    model, *_ = learned
    assert model.optimizer.steps_skipped <= 1
    assert all(np.isfinite(weight.numpy()).all() for weight in model.weights)


# Data, scores, what is shown


def test_steps_are_those_of_the_model(learned):
    model, *_ = learned
    for samples in (1, 160, 161, 480, 481, 5120, 4960):
        logits = model({"waveform": tf.zeros([1, samples]), "length": tf.constant([samples])})
        assert logits.shape[1] == recognition.count_steps(samples), samples
    assert recognition.count_steps(4960) == 8  # a multiple of 8, as XLA's loop wants it


def test_training_clips_are_played_at_three_speeds(folder, learned):
    *_, data = learned[0], learned[1]
    ratios = []
    settings = options(folder)
    builder = tfds.builder("toy_speech", data_dir=folder)
    lengths = [len(example["speech"]) for example in tfds.as_numpy(builder.as_dataset(split="train"))]
    possible = {round(length / speed) for length in lengths for speed in (0.9, 1.0, 1.1)}
    for inputs, packed in data.train(3):
        ratios += inputs["length"].numpy().tolist()
        np.testing.assert_array_equal(packed[:, 0], recognition.count_steps(inputs["length"].numpy()))
        assert ctc.fits(packed[:, 0], packed[:, 1:]).numpy().all()
    assert settings.batch_size * data.steps_per_epoch == len(ratios)
    assert all(min(abs(length - each) for each in possible) <= 1 for length in ratios)
    assert sum(length not in set(lengths) for length in ratios) > len(ratios) / 3


def test_error_rates_by_hand():
    scores = recognition.compare(["abc de", "x"], ["abd e", ""])
    assert scores == {"cer": pytest.approx(3 / 7), "wer": pytest.approx(3 / 3), "total": 7}
    assert recognition.compare(["", "ab"], ["", "ab"]) == {"cer": 0.0, "wer": 0.0, "total": 2}
    assert recognition.describe(scores) == "Test CER: 42.86% of 7 characters | WER: 100.00%"


def test_what_is_shown(learned, answer, tmp_path):
    model, data, *_ = learned
    shown = recognition.show(model, data)
    assert list(shown) == ["transcripts", "alignment", "clip1", "clip2"]
    assert shown["alignment"].startswith(b"\x89PNG")
    assert shown["clip1"].startswith(b"RIFF")
    assert shown["transcripts"].count("\n") == 9
    concluded = recognition.conclude(answer, data, tmp_path)
    assert list(concluded) == ["test_transcripts", "test_clips", "test_clip1", "test_clip2"]
    assert len(list(tmp_path.glob("clip*.wav"))) == 8
    assert concluded["test_clip1"] == (tmp_path / "clip1.wav").read_bytes()


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset=toy_of_labels"], r"has the features audio \(Audio\), label \(ClassLabel\); speech recognition "),
        (["--dataset=toy_without_words"], "no training clip is left"),
        (["--batch_size=999"], "is more than the 236 training examples"),
    ],
)
def test_data_that_cannot_be_used(folder, arguments, message):
    with pytest.raises(runner.AppError, match=message):
        recognition.load_data(options(folder, *arguments))


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [(["--features=log_mel"], "features"), (["--task=keywords", "--beam_size=3"], "beam_size")],
)
def test_flags_of_the_other_task_are_refused(arguments, flag):
    with pytest.raises(runner.AppError, match=f"--{flag} has no effect on --task="):
        runner.chosen(recognition.TASK, options_for(recognition.TASK, *arguments))


def test_task_that_is_asked_for():
    own = options_for(recognition.TASK, "--width=64")
    assert runner.chosen(recognition.TASK, own) == (recognition.TASK, own)
    task, other = runner.chosen(recognition.TASK, options_for(recognition.TASK, "--task=keywords", "--width=64"))
    assert task.name == "keyword_spotting"
    assert (other.dataset, other.width, other.depth, other.epochs) == ("gcin_tones", 64, 4, task.defaults["epochs"])


def test_speeds_fit():
    assert max(recognition._SPEEDS) == 1.1
    assert augmentation.reader([np.zeros(10, "int16")], RATE, recognition._SPEEDS)(tf.constant([1]))[1].numpy() == [10]
