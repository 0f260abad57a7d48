"""Spectra against numpy and scipy in float64: clips of every length and loudness, in batches and alone, any policy."""

import keras
import numpy as np
import pytest
import scipy.signal
import tensorflow as tf

from apps.audio import spectra

RATE = 16_000
SPEECH = spectra.framing(RATE)
FRAMINGS = [SPEECH, spectra.Framing(512, 128), spectra.Framing(512, 256), spectra.Framing(11, 5), spectra.Framing(4, 1)]
LENGTHS = [0, 1, 2, 159, 160, 161, 400, 4_001]


def clips(*lengths: int, seed: int = 0) -> np.ndarray:
    """Noise under a sine, at half of full scale; 0 behind each clip's end."""
    longest = max(lengths)
    samples = 0.1 * np.random.default_rng(seed).normal(size=[len(lengths), longest])
    samples += 0.3 * np.sin(0.2 * np.arange(longest))
    return np.where(np.arange(longest) < np.array(lengths)[:, None], samples, 0).astype("float32")


def hann(length: int) -> np.ndarray:
    """TensorFlow's has its middle at length // 2: periodic where the length is even, symmetric where it is odd."""
    return scipy.signal.windows.hann(length, sym=length % 2 == 1)


def frames_of(samples: np.ndarray, framing: spectra.Framing) -> np.ndarray:
    """Float64 frames around every multiple of the stride, up to the one at or behind the end; under Hann windows."""
    length, stride = framing
    middles = range(0, len(samples) + stride, stride) if len(samples) else [0]
    around = np.concatenate([np.zeros(length // 2), samples.astype("float64"), np.zeros(length + stride)])
    return np.stack([around[middle : middle + length] for middle in middles]) * hann(length)


def transform(samples: np.ndarray, framing: spectra.Framing) -> np.ndarray:
    return np.fft.rfft(frames_of(samples, framing), framing.fft_length)


def back(values: np.ndarray, length: int, framing: spectra.Framing) -> np.ndarray:
    """Griffin and Lim 1984: windowed frames added up, divided by the sum of squared windows; float64."""
    window = hann(framing.sequence_length)
    size = (len(values) - 1) * framing.sequence_stride + framing.sequence_length
    total, weights = np.zeros(size), np.zeros(size)
    for index, frame in enumerate(np.fft.irfft(values, framing.fft_length)[:, : framing.sequence_length]):
        place = slice(index * framing.sequence_stride, index * framing.sequence_stride + framing.sequence_length)
        total[place] += frame * window
        weights[place] += window**2
    own = slice(framing.sequence_length // 2, framing.sequence_length // 2 + length)
    return total[own] / weights[own]


# Transform


def test_framing_and_number_of_frames_by_hand():
    assert spectra.framing(22_050, 0.05, 0.0125) == (1_102, 276)
    assert (SPEECH.fft_length, SPEECH.num_bins) == (512, 257)
    assert spectra.Framing(512, 128).fft_length == 512
    expected = [1, 2, 2, 2, 2, 3, 4, 27]
    assert [spectra.num_frames(length, SPEECH) for length in LENGTHS] == expected
    for kind in (np.array, tf.constant):
        found = spectra.num_frames(kind(LENGTHS, "int32"), SPEECH)
        assert found.dtype == "int32"
        np.testing.assert_array_equal(found, expected)
    for window, stride in ((0.02, 0.011), (0.0001, 0.00005), (0.02, 0.0)):
        with pytest.raises(ValueError, match=f"window={window} and stride={stride} seconds at 16000"):
            spectra.framing(RATE, window, stride)


@pytest.mark.parametrize("framing", FRAMINGS, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_transform_is_numpys_and_comes_back(framing, length):
    samples = clips(length)
    found = spectra.stft(tf.constant(samples), framing)
    assert found.dtype == tf.complex64
    assert found.shape == (1, spectra.num_frames(length, framing), framing.num_bins)
    np.testing.assert_allclose(found[0], transform(samples[0], framing), atol=1e-5 * framing.sequence_length)
    again = spectra.inverse_stft(found, tf.constant([length]), framing)
    assert again.dtype == tf.float32
    assert again.shape == (1, (found.shape[1] - 1) * framing.sequence_stride)
    np.testing.assert_allclose(again[:, :length], samples, atol=2e-6)
    assert not again[:, length:].numpy().any()


@pytest.mark.parametrize("framing", FRAMINGS, ids=str)
def test_changed_spectra_come_back_as_near_as_can_be(framing):
    lengths = [1_000, 1, 640]
    samples = clips(*lengths)
    random = np.random.default_rng(1)
    values = spectra.stft(tf.constant(samples), framing).numpy()
    values *= random.uniform(0, 2, values.shape) * np.exp(1j * random.uniform(-1, 1, values.shape))
    values[..., [0, -1]] = values[..., [0, -1]].real
    hostile = values.copy()
    for row, length in enumerate(lengths):
        hostile[row, spectra.num_frames(length, framing) :] = np.nan  # not the clip's own
    found = spectra.inverse_stft(tf.constant(hostile), tf.constant(lengths), framing)
    for row, length in enumerate(lengths):
        own = values[row, : spectra.num_frames(length, framing)]
        np.testing.assert_allclose(found[row, :length], back(own, length, framing), atol=1e-5)
        assert not found[row, length:].numpy().any()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-6, 1e4, 1e15])
def test_quiet_and_loud_clips_come_back(scale):
    samples = scale * clips(1_234)
    again = spectra.inverse_stft(spectra.stft(tf.constant(samples), SPEECH), tf.constant([1_234]), SPEECH)
    np.testing.assert_allclose(again[:, :1_234], samples, atol=2e-6 * scale)


# Log-mel features


def mel_bands(count: int, framing: spectra.Framing, rate: int, low: float, high: float) -> np.ndarray:
    """Triangles that are straight on the mel scale of O'Shaughnessy, float64, one band after the other."""

    def mel(hertz):
        return 1127 * np.log1p(hertz / 700)

    edges = np.linspace(mel(low), mel(high), count + 2)
    places = mel(np.arange(framing.num_bins) * rate / framing.fft_length)
    bands = np.zeros([framing.num_bins, count])
    for band, (left, middle, right) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        for index, place in enumerate(places):
            if index:  # the mean of a frame is no sound
                bands[index, band] = max(0, min((place - left) / (middle - left), (right - place) / (right - middle)))
    return bands


def log_mel(samples: np.ndarray, count: int = 80, low: float = 20, high: float = 8_000, normalize: bool = True):
    bands = mel_bands(count, SPEECH, RATE, low, high)
    power = np.abs(transform(samples, SPEECH)) ** 2 @ bands
    floor = 2.0**-30 / 12 * (hann(400) ** 2).sum() * bands.sum(axis=0)
    features = np.log(np.maximum(power, floor))
    if normalize:
        features = (features - features.mean(axis=0)) / np.sqrt(features.var(axis=0) + 1e-5)
    return features


@pytest.mark.parametrize(
    "settings", [{}, {"num_mel_bins": 40, "min_freq": 60.0, "max_freq": 7_000.0}, {"normalize": False}], ids=str
)
def test_features_are_float64s(settings):
    lengths = [4_001, 0, 1, 161, 2_000]
    samples = clips(*lengths)
    layer = spectra.LogMel(**settings)
    found = layer(samples, tf.constant(lengths))
    count = settings.get("num_mel_bins", 80)
    assert found.dtype == tf.float32
    assert found.shape == (5, 27, count)
    assert layer.weights == []
    for row, length in enumerate(lengths):
        own = spectra.num_frames(length, SPEECH)
        expected = log_mel(
            samples[row, :length], count, settings.get("min_freq", 20), settings.get("max_freq", 8_000),
            settings.get("normalize", True)
        )  # fmt: skip
        np.testing.assert_allclose(found[row, :own], expected, atol=2e-3)
        silence = 0 if settings.get("normalize", True) else log_mel(np.zeros(0), normalize=False)[0]
        np.testing.assert_allclose(found[row, own:], np.broadcast_to(silence, [27 - own, count]), atol=1e-5)


def test_each_clip_is_normalised_over_its_own_frames():
    lengths = [4_001, 1_600]
    found = spectra.LogMel()(clips(*lengths), tf.constant(lengths)).numpy()
    for row, length in enumerate(lengths):
        own = found[row, : spectra.num_frames(length, SPEECH)]
        np.testing.assert_allclose(own.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(own.std(axis=0), 1, atol=1e-3)


def test_what_lies_behind_a_clip_and_how_loud_it_is_change_nothing():
    lengths = [4_001, 0, 1, 161, 2_000]
    layer, samples = spectra.LogMel(), clips(*lengths)
    found = layer(samples, tf.constant(lengths))
    dirty = np.where(np.arange(4_001) < np.array(lengths)[:, None], samples, np.nan)
    np.testing.assert_array_equal(layer(dirty, tf.constant(lengths)), found)
    np.testing.assert_allclose(
        layer(np.pad(samples, [[0, 0], [0, 999]]), tf.constant(lengths))[:, :27], found, atol=1e-4
    )
    for row, length in enumerate(lengths):
        alone = layer(samples[row : row + 1, :length], tf.constant([length]))
        np.testing.assert_allclose(alone[0], found[row, : alone.shape[1]], atol=1e-4)
    np.testing.assert_allclose(layer(samples / 16, tf.constant(lengths))[0], found[0], atol=1e-3)


def test_hostile_clips_have_finite_features():
    random = np.random.default_rng(2)
    noise = random.normal(size=3_000)
    hostile = {
        "silence": np.zeros(3_000),
        "constant": np.full(3_000, 0.5),
        "one click": np.eye(1, 3_000, 1_500)[0],
        "clipped": np.sign(noise),
        "16-bit numbers": np.round(20_000 * noise),
        "very loud": 1e15 * noise,
        "very quiet": 1e-30 * noise,
        "below 16 bits": 1e-6 * noise,
        "half silent": np.where(np.arange(3_000) < 1_500, noise, 0),
    }
    samples = np.stack(list(hostile.values())).astype("float32")
    found = spectra.LogMel()(samples, tf.fill([len(samples)], 3_000)).numpy()
    assert np.isfinite(found).all()
    assert np.abs(found).max() < 20**0.5  # of 20 frames one can't be farther than that from their mean
    for name, features in zip(hostile, found, strict=True):
        assert np.any(np.abs(features) > 0.1) == (name not in ("silence", "very quiet", "below 16 bits")), name
    raw = spectra.LogMel(normalize=False)(samples, tf.fill([len(samples)], 3_000)).numpy()
    np.testing.assert_array_equal(raw[0], raw[list(hostile).index("very quiet")])
    lengths = tf.range(1_000, 60_000, 1_733)  # sums of as many equal numbers are rounded
    silence = spectra.LogMel()(np.zeros([len(lengths), 60_000], "float32"), lengths)
    assert np.abs(silence).max() < 0.01
    with pytest.raises(ValueError, match=r"of num_mel_bins=300 bands from 20\.0 to 8000\.0 Hz \d+ have no frequency"):
        spectra.LogMel(num_mel_bins=300)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_no_policy_changes_a_bit(policy):
    lengths = tf.constant([3_000, 17])
    samples = clips(3_000, 17) / 300  # float16 would lose most of it
    expected = spectra.LogMel()(samples, lengths).numpy()
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        inputs = [keras.Input([None], name="waveforms"), keras.Input([], dtype="int32", name="lengths")]
        layer = spectra.LogMel(name="features")
        model = keras.Model(inputs, layer(*inputs))
    finally:
        keras.config.set_dtype_policy(before)
    assert model.output.shape == (None, None, 80)
    assert (layer.dtype_policy.name, model.output.dtype) == ("float32", "float32")
    np.testing.assert_array_equal(model([tf.constant(samples), lengths]), expected)
    layer.dtype_policy = policy  # as a plan might
    np.testing.assert_array_equal(layer(samples, lengths), expected)


def test_a_model_with_it_is_saved_and_loaded(tmp_path):
    inputs = [keras.Input([None], name="waveforms"), keras.Input([], dtype="int32", name="lengths")]
    settings = {"num_mel_bins": 23, "window": 0.032, "stride": 0.008, "min_freq": 50.0, "max_freq": 3_500.0}
    layer = spectra.LogMel(8_000, normalize=False, name="features", **settings)
    model = keras.Model(inputs, layer(*inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", {"LogMel": spectra.LogMel})
    samples, lengths = tf.constant(clips(900, 5)), tf.constant([900, 5])
    np.testing.assert_array_equal(loaded([samples, lengths]), model([samples, lengths]))
    assert loaded.get_layer("features").get_config() == layer.get_config()


# Griffin-Lim


def first_phases(frames: int, framing: spectra.Framing) -> np.ndarray:
    uniform = tf.random.stateless_uniform([frames, framing.num_bins], (1984, 2013)).numpy()
    return np.exp(2j * np.pi * uniform)


@pytest.mark.parametrize("momentum", [0.0, 0.99])
def test_iterations_are_the_papers(momentum):
    framing, length = spectra.Framing(64, 16), 500
    magnitudes = np.abs(transform(clips(length)[0], framing))
    now, last = first_phases(len(magnitudes), framing), 0
    for iterations in range(4):
        found = spectra.griffin_lim(
            tf.constant(magnitudes[None], tf.float32), tf.constant([length]), framing, iterations=iterations,
            momentum=momentum
        )  # fmt: skip
        expected = back(magnitudes * now / np.abs(now), length, framing)
        np.testing.assert_allclose(found[0, :length], expected, atol=1e-4)
        real = transform(expected, framing)
        now, last = real + momentum * (real - last), real


def distance(waveform: np.ndarray, magnitudes: np.ndarray, framing: spectra.Framing) -> float:
    """How far a waveform's magnitudes are from the wanted ones, of their size."""
    return np.linalg.norm(np.abs(transform(waveform, framing)) - magnitudes) / np.linalg.norm(magnitudes)


def test_it_comes_nearer_and_the_fast_one_nearest():
    framing, length = spectra.Framing(256, 64), 6_000
    wave = clips(length)[0] * np.sin(np.arange(length) / 700)
    magnitudes = np.abs(transform(wave, framing))

    def found(iterations, momentum):
        result = spectra.griffin_lim(
            tf.constant(magnitudes[None], tf.float32), tf.constant([length]), framing, iterations=iterations,
            momentum=momentum
        )  # fmt: skip
        return distance(result[0, :length].numpy(), magnitudes, framing)

    plain = [found(iterations, 0.0) for iterations in (0, 1, 2, 4, 8, 32)]
    assert plain == sorted(plain, reverse=True)
    assert plain[-1] < plain[0] / 2
    assert found(32, 0.99) < plain[-1]


def test_clips_do_not_depend_on_each_other_and_silence_stays_silent():
    framing, lengths = spectra.Framing(64, 16), [500, 0, 1, 333, 500]
    samples = clips(*lengths)
    samples[-1] = 0
    magnitudes = np.abs(spectra.stft(tf.constant(samples), framing))
    form = [tf.TensorSpec([None, None, 33]), tf.TensorSpec([None], tf.int32)]
    run = tf.function(
        lambda values, sizes: spectra.griffin_lim(values, sizes, framing, iterations=3), form, autograph=False
    )
    found = run(tf.constant(magnitudes), tf.constant(lengths)).numpy()
    assert np.isfinite(found).all()
    assert not found[-1].any()
    np.testing.assert_array_equal(run(tf.constant(magnitudes), tf.constant(lengths)), found)
    for row, length in enumerate(lengths):
        own = spectra.num_frames(length, framing)
        alone = run(tf.constant(magnitudes[row : row + 1, :own]), tf.constant([length]))
        np.testing.assert_allclose(alone[0, :length], found[row, :length], atol=1e-4)
        assert not found[row, length:].any()


def test_an_exported_graph_answers_the_same(tmp_path):
    layer = spectra.LogMel()

    @tf.function(input_signature=[tf.TensorSpec([None, None]), tf.TensorSpec([None], tf.int32)], autograph=False)
    def serve(waveforms, lengths):
        values = spectra.stft(waveforms, SPEECH)
        return {
            "features": layer(waveforms, lengths),
            "again": spectra.inverse_stft(values, lengths, SPEECH),
            "invented": spectra.griffin_lim(tf.abs(values), lengths, SPEECH, iterations=2),
        }

    module = tf.Module()
    module.layer = layer
    tf.saved_model.save(module, tmp_path, signatures=serve)
    served = tf.saved_model.load(tmp_path).signatures["serving_default"]
    for lengths in ([2_000, 0, 777], [0], [1], [401]):
        samples = clips(*lengths)
        answer = served(waveforms=tf.constant(samples), lengths=tf.constant(lengths))
        np.testing.assert_allclose(answer["again"][:, : max(lengths)], samples, atol=2e-6)
        np.testing.assert_allclose(answer["features"], layer(samples, tf.constant(lengths)), atol=1e-4)
        assert answer["invented"].shape == answer["again"].shape
        assert np.isfinite(answer["invented"]).all()
    nobody = served(waveforms=tf.zeros([0, 100]), lengths=tf.zeros([0], tf.int32))
    assert nobody["features"].shape == (0, 2, 80)


def test_features_lead_back_to_magnitudes_with_these_features():
    layer = spectra.LogMel(RATE, window=0.04, normalize=False)
    random = np.random.default_rng(0)
    sound = np.cumsum(random.normal(size=[2, 8000]), axis=1).astype("float32") * 1e-3
    lengths = np.array([8000, 5000], "int32")
    features = layer(sound, lengths)
    magnitudes = layer.magnitudes(features)
    assert magnitudes.shape == [2, features.shape[1], layer.framing.num_bins]
    assert np.all(magnitudes.numpy() >= 0)
    waveforms = spectra.griffin_lim(magnitudes, lengths, layer.framing)
    again = layer(waveforms, lengths).numpy()
    own = np.arange(features.shape[1]) < 1 + 5000 // layer.framing.sequence_stride
    difference = np.abs(again - features.numpy())
    assert np.median(difference[0]) < 0.5  # of natural logarithms of power, 2 dB
    assert np.median(difference[1, own]) < 0.5
