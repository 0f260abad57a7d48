"""The network's parts by hand, clips of every length and loudness in batches and alone, mixing, and the baseline."""

import functools

import keras
import numpy as np
import pytest
import soundfile
import tensorflow as tf
import tensorflow_datasets as tfds

import tfhalf
from apps import runner
from apps.audio import enhancement, spectra
from benchmarks import spectral_subtraction
from tests.apps.audio.test_quality import noise, oracle, speech
from tests.conftest import options_for
from tfhalf.datasets import sounds

SMALL = ["--width=4", "--units=8", "--window_seconds=0.5", "--batch_size=4"]
DATA = runner.Data(None, 10, None, None, {"sampling_rate": 8000})
LENGTHS = [0, 1, 127, 128, 129, 3_000, 8_000]
# Of the largest sample: roundings of a network of 16 layers that are made in another order.
SAME = {"float32": 2e-5, "mixed_float16": 1e-2}


def build(*arguments: str) -> keras.Model:
    return runner.build(enhancement.TASK, options_for(enhancement.TASK, *SMALL, *arguments), DATA)


def filled_up(lengths: list[int], samples: int, behind: float = 0.0) -> dict[str, np.ndarray]:
    """Noisy speech of these lengths, with something else behind each clip's end."""
    clips = np.stack([speech(samples, seed=row) + noise(samples, row) for row in range(len(lengths))])
    own = np.arange(samples) < np.array(lengths)[:, np.newaxis]
    return {"waveform": np.where(own, clips, behind).astype("float32"), "length": np.array(lengths, "int32")}


def served(model: keras.Model):
    """What is exported, under the signature that it is exported with."""
    serve, signature = enhancement.serve(model, DATA)
    names = sorted(signature)
    function = tf.function(
        lambda *tensors: serve(**dict(zip(names, tensors, strict=True))),
        input_signature=[signature[name] for name in names],
        autograph=False,
    )
    return lambda **inputs: function(*(inputs[name] for name in names))["waveform"].numpy()


@functools.cache
def wild(policy: str):
    """A served model whose weights let nothing pass as it is, with statistics as after a training."""
    model, random = build(f"--dtype_policy={policy}"), np.random.default_rng(7)
    for weight in model.weights:
        values = random.normal(0, 0.3, weight.shape)
        weight.assign(1 + np.abs(values) if "norm" in weight.path else values)
    return served(model)


# Model


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_model_in_each_policy(policy):
    model = build(f"--dtype_policy={policy}")
    inputs = filled_up([4_000, 2_500], 4_000)
    outputs = model(inputs)
    assert outputs.dtype == tf.float32
    assert outputs.shape == (2, 4_000)
    assert tfhalf.left_alone(model) == {}
    if policy != "float32":
        measured = tfhalf.coverage(model, inputs)
        assert measured.multiply_adds_in_half > 0.9
        normalisations = {layer.name for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)}
        assert len(normalisations) == 10
        assert set(measured.islands) == normalisations | {"mask"}


def test_first_answer_is_what_came_in():
    model = build("--dtype_policy=float32")
    model.get_layer("mask").kernel.assign(tf.zeros_like(model.get_layer("mask").kernel))
    inputs = filled_up(LENGTHS, 8_000)
    np.testing.assert_allclose(model(inputs), inputs["waveform"], atol=1e-5)


@pytest.mark.parametrize(("factor", "expected"), [(0.5, np.sin), (0.5j, np.cos), (-0.25, lambda x: -np.sin(x) / 2)])
def test_mask_multiplies_complex_numbers(factor, expected):
    angles = 2 * np.pi * 500 / 8_000 * np.arange(4_000)
    waveform, length = np.sin(angles)[np.newaxis].astype("float32"), np.array([4_000], "int32")
    parts, _, level, own = enhancement.Analysis()(waveform, length)
    assert own.numpy().all()
    mask = tf.ones_like(parts) * [np.real(factor), np.imag(factor)]  # of which 0.5 is 1
    outputs = enhancement.Synthesis()(mask, parts, level, waveform, length)
    np.testing.assert_allclose(outputs[0, 300:-300], expected(angles)[300:-300], atol=2e-3)


def test_network_sees_compressed_spectra_of_clips_at_level_1():
    inputs = filled_up([3_000, 900], 3_000, behind=np.nan)
    parts, features, level, own = enhancement.Analysis()(**inputs)
    clips = [inputs["waveform"][0], inputs["waveform"][1, :900]]
    np.testing.assert_allclose(level, [np.sqrt(np.mean(clip.astype("float64") ** 2)) for clip in clips], rtol=1e-5)
    frames = [spectra.num_frames(length, enhancement.FRAMING) for length in (3_000, 900)]
    np.testing.assert_array_equal(np.sum(own, axis=1), frames)
    complex_ = parts[..., 0].numpy().astype("complex128") + 1j * parts[..., 1].numpy()
    alone = spectra.stft((clips[1] / np.float32(level[1]))[np.newaxis], enhancement.FRAMING)
    np.testing.assert_allclose(complex_[1, : frames[1]], alone[0, : frames[1]], atol=1e-4)
    magnitudes = np.abs(complex_) ** 0.3
    heard = np.abs(complex_) > 1e-4
    np.testing.assert_allclose(features[..., 0].numpy()[heard], magnitudes[heard], rtol=1e-3)
    seen = features[..., 1].numpy() + 1j * features[..., 2].numpy()
    np.testing.assert_allclose(seen[heard], (magnitudes * np.exp(1j * np.angle(complex_)))[heard], atol=2e-3)
    assert np.isfinite(features).all()


@pytest.mark.parametrize("policy", SAME)
def test_clips_do_not_depend_on_those_beside_them(policy):
    answer = wild(policy)
    inputs = filled_up(LENGTHS, 8_000, behind=3.0)
    outputs = answer(**inputs)
    for row, length in enumerate(LENGTHS):
        alone = answer(waveform=inputs["waveform"][row : row + 1, :length], length=inputs["length"][row : row + 1])
        assert alone.shape == (1, length)
        scale = np.abs(alone).max(initial=1e-3)
        np.testing.assert_allclose(outputs[row, :length], alone[0], atol=SAME[policy] * scale)
        assert not outputs[row, length:].any()
    changed = np.abs(outputs - np.where(outputs != 0, inputs["waveform"], 0)).max()
    assert changed > 0.01, "the wild model does nothing, so this says nothing"


@pytest.mark.parametrize("policy", SAME)
def test_loudness_goes_through(policy):
    answer = wild(policy)
    inputs = filled_up([8_000, 3_000], 8_000)
    outputs = answer(**inputs)
    for factor in (2.0**-12, 2.0**-4, 2.0**13):
        louder = answer(waveform=inputs["waveform"] * np.float32(factor), length=inputs["length"])
        np.testing.assert_allclose(louder / factor, outputs, atol=SAME[policy] * np.abs(outputs).max())


def test_every_kind_of_clip_is_served():
    answer = wild("mixed_float16")
    random = np.random.default_rng(0)
    kinds = {
        "silence": np.zeros(2_000),
        "clipped": np.sign(random.normal(size=2_000)),
        "one click": np.eye(1, 2_000, 700)[0],
        "the quietest of 16 bits": np.eye(1, 2_000, 1_999)[0] / 32_768,
        "offset": np.full(2_000, 0.7),
        "far beyond full scale": 1e6 * random.normal(size=2_000),
    }
    for kind, clip in kinds.items():
        outputs = answer(waveform=clip[np.newaxis].astype("float32"), length=np.array([2_000], "int32"))
        assert outputs.shape == (1, 2_000), kind
        assert np.isfinite(outputs).all(), kind
        assert np.any(outputs) == (kind != "silence"), kind
    long = filled_up([150_000], 150_000)
    assert np.isfinite(answer(**long)).all()
    nobody = answer(waveform=np.zeros([0, 50], "float32"), length=np.zeros([0], "int32"))
    assert nobody.shape == (0, 50)


def test_lengths_that_cannot_be_are_the_nearest_that_can():
    answer = wild("mixed_float16")
    waveform = filled_up([600] * 3, 600)["waveform"]
    outputs = answer(waveform=waveform, length=np.array([-5, 600, 10**6], "int32"))
    assert not outputs[0].any()
    right = answer(waveform=waveform, length=np.array([0, 600, 600], "int32"))
    np.testing.assert_array_equal(outputs, right)


def test_steps_on_silence_are_not_skipped():
    model = build()
    inputs = filled_up([4_000] * 3, 4_000)
    inputs["waveform"][1:] = 0
    targets = np.stack([speech(4_000), np.zeros(4_000), np.zeros(4_000)])
    for waveform in (inputs["waveform"], np.zeros([3, 4_000], "float32"), inputs["waveform"][:, ::-1]):
        loss, _ = model.train_on_batch(inputs | {"waveform": waveform}, targets)
        assert np.isfinite(loss)
    assert model.optimizer.steps_skipped == 0
    assert all(np.isfinite(weight.numpy()).all() for weight in model.weights)


# Data


# Each number once, so that it can be told where a window is from.
NUMBERS = (1 + np.random.default_rng(0).permutation(20_000)).astype("int16")


class TinyNoisy(tfds.core.GeneratorBasedBuilder):
    """Clean clips are NUMBERS one after the other; the noise is minus twice the number."""

    VERSION = tfds.core.Version("1.0.0")
    with_snr, cut, loud = True, 0, 1

    def _info(self):
        features = {"noisy": sounds.feature(8_000), "clean": sounds.feature(8_000)}
        features |= {"snr": np.float32} if self.with_snr else {}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(num) for name, num in (("train", 20), ("validation", 3), ("test", 5))}

    def _generate_examples(self, num):
        at = 0
        for index in range(num):
            clean = NUMBERS[at:][: 1_000 - 100 * (index % 4)]
            at += len(clean)
            noisy = -clean[: len(clean) - self.cut]
            clips = {"noisy": sounds.encoded(noisy), "clean": sounds.encoded(clean * self.loud)}
            yield index, clips | ({"snr": -5 + 5 * (index % 2)} if self.with_snr else {})


class TinyNoisyUntold(TinyNoisy):
    with_snr = False


class TinyNoisyOfTwoLengths(TinyNoisy):
    cut = 1


class TinyNoisySilent(TinyNoisy):
    loud = 0


def load(folder, *arguments: str) -> runner.Data:
    flags = [f"--data_dir={folder}", "--dataset=tiny_noisy", "--window_seconds=0.125", "--batch_size=3", *arguments]
    return enhancement.load_data(options_for(enhancement.TASK, *flags))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("data"))


def test_windows_are_mixed_anew(folder):
    data = load(folder, "--min_snr=-3", "--max_snr=7")
    # 17,000 samples are 17 windows, of which one is room for a first place that is drawn.
    assert data.steps_per_epoch == 16 // 3
    builder = tfds.builder("tiny_noisy", data_dir=folder)
    _, clean, _ = enhancement.read(builder, "train", builder.info.features)
    whole = np.concatenate(clean)
    windows = np.lib.stride_tricks.sliding_window_view(whole.astype("float64"), 1_000)
    place = {value: index for index, value in enumerate(whole)}
    heard, places_of_noise, ratios = [], [], []
    for inputs, targets in data.train(3).as_numpy_iterator():
        assert inputs["waveform"].shape == targets.shape == (3, 1_000)
        np.testing.assert_array_equal(inputs["length"], 1_000)
        for mixture, target in zip(inputs["waveform"], targets, strict=True):
            at = place[round(target[0] * 32_768)]
            np.testing.assert_array_equal(target * 32_768, whole[at : at + 1_000])
            heard += range(at, at + 1_000)
            added = mixture.astype("float64") - target
            ratios.append(10 * np.log10(np.sum(target.astype("float64") ** 2) / np.sum(added**2)))
            likeness = windows @ -added / np.linalg.norm(windows, axis=1) / np.linalg.norm(added)
            assert likeness.max() > 1 - 1e-6
            places_of_noise.append(likeness.argmax() - at)
    assert len(heard) == len(set(heard)) == 15_000
    assert len(set(places_of_noise)) == 15
    assert -3.001 <= min(ratios) < -1
    assert 5 < max(ratios) <= 7.001


def test_epochs_are_pure_functions_of_the_seed(folder):
    def first(data, epoch):
        inputs, targets = next(data.train(epoch).as_numpy_iterator())
        return inputs["waveform"].tobytes() + targets.tobytes()

    data, again, other = load(folder), load(folder), load(folder, "--seed=1")
    assert first(data, 2) == first(again, 2)
    assert len({first(data, 0), first(data, 1), first(other, 0), first(other, 1)}) == 4


def test_whole_clips_validate_and_test(folder):
    data = load(folder)
    builder = tfds.builder("tiny_noisy", data_dir=folder)
    noisy, clean, snrs = enhancement.read(builder, "test", builder.info.features)
    expected = {(tuple(a), tuple(b), float(snr)) for a, b, snr in zip(noisy, clean, snrs, strict=True)}
    found, lengths = set(), []
    for inputs, (targets, ratios) in data.test.as_numpy_iterator():
        assert inputs["waveform"].shape == targets.shape
        for row, length in enumerate(inputs["length"]):
            assert not inputs["waveform"][row, length:].any()
            both = (tuple((each[row, :length] * 32_768).astype(int)) for each in (inputs["waveform"], targets))
            found.add((*both, float(ratios[row])))
            lengths.append(length)
    assert found == expected
    assert lengths == sorted(lengths)
    assert data.about == {"sampling_rate": 8000}
    shapes = [(inputs["waveform"].shape, targets.shape) for inputs, targets in data.validation.as_numpy_iterator()]
    assert shapes == [((3, 2_560), (3, 2_560))]
    (untold,) = [ratios for _, (_, ratios) in load(folder, "--dataset=tiny_noisy_untold", "--batch_size=5").test]
    assert np.isnan(untold).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min_snr=3", "--max_snr=2.5"], "--min_snr=3 is more than --max_snr=2.5; lower it"),
        (["--batch_size=17"], r"--batch_size=17 is more than the 16 windows of 0.125 seconds .*lower it or --window"),
        (["--window_seconds=3"], "--batch_size=3 is more than the 0 windows of 3 seconds in the training part"),
        (["--dataset=mnist_5k"], r"--dataset=mnist_5k has .*speech enhancement needs noisy \(Audio\) and clean"),
        (["--dataset=tiny_noisy_of_two_lengths"], r"has a clean one of \d+; they must be of one length"),
        (["--dataset=fillets_noise"], "did you mean fillets_noisy"),
    ],
)
def test_what_cannot_work_is_refused(folder, arguments, message):
    with pytest.raises((runner.AppError, runner.datasets.DatasetError), match=message):
        load(folder, *arguments)


# Scores, figures, files


def test_score_knows_good_from_bad(folder):
    data = load(folder)
    cleans, noisies, estimates, snrs = enhancement.answers(lambda waveform, length: {"waveform": waveform}, data.test)
    assert [len(clip) for clip in cleans] == [len(clip) for clip in estimates] == [700, 800, 900, 1_000, 1_000]
    np.testing.assert_array_equal(np.concatenate(noisies), np.concatenate(estimates))
    assert sorted(snrs) == [-5, -5, -5, 0, 0]
    random = np.random.default_rng(1)
    errors = {length: random.normal(0, 1e-3, length) for length in (700, 800, 900, 1_000)}

    def call(waveform, length):
        rows = [np.pad(errors[n], [0, waveform.shape[1] - n]) for n in np.asarray(length)]
        return {"waveform": np.stack(rows) - waveform}  # its clips are minus the speech

    scores = enhancement.score(call, data)
    reached = [oracle(clean, clean + errors[len(clean)]) for clean in cleans]
    assert scores["si_sdr"] == pytest.approx(np.mean(reached), abs=1e-3)
    assert scores["total"] == 5
    assert {"improvement_-5dB", "improvement_0dB"} < set(scores)
    with pytest.raises(runner.AppError, match="is silent"):
        enhancement.score(call, load(folder, "--dataset=tiny_noisy_silent"))


def test_line_of_the_summary():
    scores = {"si_sdr": 9.121, "si_sdr_improvement": 6.5, "stoi": 0.8512, "pesq": 2.5, "total": 572}
    line = "Test SI-SDR: 9.12 dB, 6.50 dB better than the noisy clips"
    assert enhancement.describe(scores) == f"{line} | STOI: 0.851 | PESQ: 2.500"
    del scores["pesq"], scores["stoi"]
    assert enhancement.describe(scores) == line


def test_figures_sounds_and_files(folder, tmp_path):
    data, model = load(folder), build()
    shown = enhancement.show(model, data)
    kinds = {name: content[:4] for name, content in shown.items()}
    assert set(kinds) == {f"clip{n}{end}" for n in (1, 2) for end in ("", "_noisy", "_enhanced", "_clean")}
    assert all(kind == (b"RIFF" if "_" in name else b"\x89PNG") for name, kind in kinds.items())
    answer = runner.answering(enhancement.TASK, model, data)
    concluded = enhancement.conclude(answer, data, tmp_path)
    assert set(concluded) == {"improvement", *shown}
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["clip1.wav", "clip2.wav"]
    noisy = {clip.tobytes() for clip in enhancement.read(*_test_part(folder))[0]}
    for file in files:
        samples, rate = soundfile.read(file, dtype="int16")
        assert rate == 8_000
        assert samples.tobytes() in noisy


def _test_part(folder):
    builder = tfds.builder("tiny_noisy", data_dir=folder)
    return builder, "test", builder.info.features


# The baseline


def test_subtraction_takes_steady_noise_away():
    clean = np.concatenate([speech(16_000), np.zeros(4_000, "float32")])
    noisy = clean + noise(len(clean))
    cleaned = spectral_subtraction.subtract(noisy)
    assert cleaned.shape == noisy.shape
    assert oracle(clean, cleaned) > oracle(clean, noisy) + 3
    assert np.std(cleaned[-3_000:-500]) < 0.2 * np.std(noisy[-3_000:-500])


def test_subtraction_without_noise_changes_nothing():
    clean = np.concatenate([np.zeros(8_000, "float32"), speech(16_000)])
    np.testing.assert_allclose(spectral_subtraction.subtract(clean), clean, atol=1e-5)


@pytest.mark.parametrize("samples", [0, 1, 100, 129])
def test_subtraction_of_short_and_silent_clips(samples):
    for clip in (np.zeros(samples), np.ones(samples)):
        outputs = spectral_subtraction.subtract(clip.astype("float32"))
        assert outputs.shape == (samples,)
        assert np.isfinite(outputs).all()


def test_table_of_the_baseline(folder, capsys):
    load(folder)
    values = runner.types.SimpleNamespace(dataset="tiny_noisy", data_dir=folder, saved_model=None)
    spectral_subtraction._run(values)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["tiny_noisy, noisy input", "tiny_noisy, spectral subtraction"]
    assert "si_sdr_improvement 0 " in lines[0]
    assert all("total 5" in line for line in lines)
