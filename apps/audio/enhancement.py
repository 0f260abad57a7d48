"""Speech enhancement: what was said, without the noise.

    python -m apps.audio.enhancement --dataset=fillets_noisy

Expected of it: 8.0 dB nearer to the clean speech of the test part than the noisy clips are, by SI-SDR, and 8.8 dB where
speech and noise are equally loud, in either precision (2026-11-26); benchmarks/spectral_subtraction.py has 1.3 dB in
both. Its 8 epochs took 20 minutes on 2 cores with other programs beside, the first, nearly alone, 98 seconds.

A convolutional recurrent network on the short-time spectrum gives a complex ratio mask: convolutions halve the
frequencies five times, a bidirectional LSTM looks along time, transposed convolutions double the frequencies again,
each beside what was there before; the mask multiplies the noisy spectrum, and so changes phases too.

A clip is divided by its own level first and multiplied by it in the end. Its result doesn't depend on the clips beside
it in a batch: convolutions look back in time only, the LSTM leaves out frames that are filled up, and
BatchNormalization goes by its moving statistics. Sound is at 8 kHz. A long clip is served as a whole: a minute takes
about 100 MB of memory (measured up to five).

It trains on windows that are mixed anew in each epoch: speech, the noise of another place (noisy - clean), at a ratio
that is drawn. The loss is SI-SDR and SNR (`apps.audio.quality`).

Half precision: spectra, levels and what is done with them are float32: a bin's power spans more than float16 has. The
network gets magnitudes to the power of 0.3, which span a few powers of ten. The layer that gives the mask is float32:
what it gives is multiplied in float32.

Sources: Tan and Wang 2018, "A convolutional recurrent neural network for real-time speech enhancement", Interspeech
(network); Williamson et al. 2016, IEEE/ACM Transactions on Audio, Speech, and Language Processing 24(3) (mask).
"""

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from absl import flags
from matplotlib.figure import Figure

from apps import batches, figures, runner, sets
from apps.audio import clips, quality, spectra, waveforms

SAMPLING_RATE = 8000
FRAMING = spectra.framing(SAMPLING_RATE, window=0.032, stride=0.016)
_COMPRESSION = 0.3
_FAINT = 1e-12  # power of a bin of a clip at level 1 that counts as none
_WIDTHS = (1, 2, 4, 4, 4)  # times --width
_LARGEST_MASK = 2.0  # of its real and its imaginary part; it begins at 1, which changes nothing
_WEIGHT_DECAY = 0.01
_NUM_VALIDATED = 176
_SHOWN = 2


# Flags


def define_flags(values: flags.FlagValues) -> None:
    """Defines what this task adds to the shared flags."""
    here = {"flag_values": values}
    flags.DEFINE_integer("width", 16, "Channels of the first convolution, 1 to 256; later have up to 4 times as many.",
                         1, 256, **here)  # fmt: skip
    flags.DEFINE_integer("units", 128, "Units of the LSTM in each direction, 1 to 2048.", 1, 2048, **here)
    flags.DEFINE_float("window_seconds", 3.0, "Length of training windows, 0.1 to 60 seconds.", 0.1, 60.0, **here)
    flags.DEFINE_float("min_snr", -8.0, "Loudest noise to train on: speech over noise, -60 to 60 dB.", -60, 60, **here)
    flags.DEFINE_float("max_snr", 12.0, "Faintest noise to train on, --min_snr to 60 dB.", -60, 60, **here)


# Model


class Analysis(keras.layers.Layer):
    """Waveforms to spectra of clips at level 1, what the network sees of them, and what is needed to go back."""

    def __init__(self, **settings):
        # Without autocast no policy rounds a waveform on its way in.
        super().__init__(**{"dtype": "float32", "autocast": False} | settings)

    def call(self, waveform, length):
        """Computes the transform.

        Args:
            waveform: float32 `[batch, samples]`; what lies behind a clip's end is ignored.
            length: samples of each clip, int32 `[batch]`.

        Returns:
            Real and imaginary parts, float32 `[batch, frames, bins, 2]`; magnitudes to the power of 0.3 and both parts
            made smaller alike, float32 `[batch, frames, bins, 3]`; the clips' levels, float32 `[batch]`; which frames
            are a clip's own, bool `[batch, frames]`.
        """
        waveform, length = tf.cast(waveform, tf.float32), tf.cast(length, tf.int32)
        waveform = tf.where(tf.sequence_mask(length, tf.shape(waveform)[1]), waveform, 0.0)
        count = tf.maximum(tf.cast(length, tf.float32), 1.0)
        level = tf.sqrt(tf.reduce_sum(waveform**2, axis=1) / count)
        transform = spectra.stft(tf.math.divide_no_nan(waveform, level[:, tf.newaxis]), FRAMING)
        parts = tf.stack([tf.math.real(transform), tf.math.imag(transform)], axis=-1)
        power = tf.reduce_sum(parts**2, axis=-1, keepdims=True) + _FAINT
        magnitude = power ** (_COMPRESSION / 2)
        features = tf.concat([magnitude, parts * (magnitude / tf.sqrt(power))], axis=-1)
        own = tf.sequence_mask(spectra.num_frames(length, FRAMING), tf.shape(parts)[1])
        return parts, features, level, own

    def compute_output_spec(self, waveform, length):
        """Returns the form of the results."""
        batch, samples = waveform.shape
        frames = None if samples is None else spectra.num_frames(samples, FRAMING)
        shape = [batch, frames, FRAMING.num_bins]
        return (
            keras.KerasTensor([*shape, 2], "float32"),
            keras.KerasTensor([*shape, 3], "float32"),
            keras.KerasTensor([batch], "float32"),
            keras.KerasTensor([batch, frames], "bool"),
        )


class Synthesis(keras.layers.Layer):
    """Masks and spectra to waveforms."""

    def __init__(self, **settings):
        super().__init__(**{"dtype": "float32", "autocast": False} | settings)

    def call(self, mask, parts, level, waveform, length):
        """Multiplies complex numbers, and goes back.

        Args:
            mask: real and imaginary parts, -1 to 1, float32 `[batch, frames, bins, 2]`.
            parts: of the spectra, as mask.
            level: of the clips, float32 `[batch]`.
            waveform: that the result is as long as, `[batch, samples]`.
            length: samples of each clip, int32 `[batch]`.

        Returns:
            float32 `[batch, samples]`, 0 behind each clip's end.
        """
        factors, transform = (tf.complex(*tf.unstack(each, axis=-1)) for each in (mask * _LARGEST_MASK, parts))
        clean = spectra.inverse_stft(factors * transform, tf.cast(length, tf.int32), FRAMING)
        return clean[:, : tf.shape(waveform)[1]] * level[:, tf.newaxis]

    def compute_output_spec(self, mask, parts, level, waveform, length):
        """Returns the form of the result."""
        return keras.KerasTensor(waveform.shape, "float32")


def build_model(options, data: runner.Data) -> keras.Model:
    """Noisy waveforms (float32, of any length) and their lengths (int32) to waveforms without noise (float32)."""
    inputs = {
        "waveform": keras.Input([None], name="waveform"),
        "length": keras.Input([], dtype="int32", name="length"),
    }
    parts, x, level, own = Analysis(name="analysis")(**inputs)
    skips = []
    for number, factor in enumerate(_WIDTHS, 1):
        # Frames before, not behind: what a clip is filled up with must not reach into it.
        x = keras.layers.ZeroPadding2D([[1, 0], [1, 1]], name=f"encode{number}_pad")(x)
        x = keras.layers.Conv2D(options.width * factor, [2, 3], [1, 2], use_bias=False, name=f"encode{number}")(x)
        x = _norm_relu(x, f"encode{number}")
        skips.append(x)
    shape = x.shape[2:]
    x = keras.layers.Reshape([-1, shape[0] * shape[1]], name="flat")(x)
    for number in (1, 2):
        lstm = keras.layers.LSTM(options.units, return_sequences=True, name="lstm")
        x = keras.layers.Bidirectional(lstm, name=f"along_time{number}")(x, mask=own)
    x = keras.layers.Dense(shape[0] * shape[1], name="widen")(x)
    x = keras.ops.relu(x)  # an operation and no layer: here Keras' mask ends, of which convolutions know nothing
    x = keras.layers.Reshape([-1, *shape], name="unflat")(x)
    for number, factor in reversed(list(enumerate((1, *_WIDTHS[:-1]), 1))):
        x = keras.layers.Concatenate(name=f"decode{number}_join")([x, skips.pop()])
        x = keras.layers.Conv2DTranspose(
            options.width * factor, [1, 3], [1, 2], use_bias=False, name=f"decode{number}"
        )(x)
        x = keras.layers.Cropping2D([[0, 0], [1, 1]], name=f"decode{number}_crop")(x)
        x = _norm_relu(x, f"decode{number}")
    small = keras.initializers.RandomNormal(stddev=0.01)
    mask = keras.layers.Conv2D(2, 1, activation="tanh", kernel_initializer=small, bias_initializer=_as_it_is,
                               dtype="float32", name="mask")(x)  # fmt: skip
    return keras.Model(inputs, Synthesis(name="synthesis")(mask, parts, level, **inputs), name="crn")


def _norm_relu(x, name: str):
    x = keras.layers.BatchNormalization(momentum=0.9, name=f"{name}_norm")(x)
    return keras.layers.ReLU(name=f"{name}_relu")(x)


def _as_it_is(shape, dtype=None):
    """A bias of the mask's layer of which the mask is about 1."""
    return tf.constant([np.arctanh(1 / _LARGEST_MASK), 0.0], dtype)


def build_optimizer(options, num_steps: int) -> keras.optimizers.Optimizer:
    """AdamW with warm-up and cosine decay."""
    return runner.adamw(options.learning_rate, num_steps, _WEIGHT_DECAY)


def build_loss(options) -> keras.losses.Loss:
    """SI-SDR and SNR."""
    return quality.SpeechDistortion()


def build_metrics(options) -> list[keras.metrics.Metric]:
    """SI-SDR."""
    return [keras.metrics.MeanMetricWrapper(quality.si_sdr, name="si_sdr")]


# Data


def load_data(options) -> runner.Data:
    """Reads any TFDS set with noisy and clean speech, of any rate; all of it is kept in memory."""
    if options.min_snr > options.max_snr:
        raise runner.AppError(f"--min_snr={options.min_snr:g} is more than --max_snr={options.max_snr:g}; lower it")
    features = sets.require_features(options, "speech enhancement", {"noisy": "Audio", "clean": "Audio"})
    builder = sets.prepare(options)
    train, validation, test = sets.split_names(builder)
    batches_of, steps = _mixed_anew(options, *read(builder, train, features)[:2])
    noisy, clean, snrs = read(builder, validation, features)
    chosen = np.linspace(0, len(clean) - 1, min(_NUM_VALIDATED, len(clean))).round().astype(int)
    heard = [_whole_clips(options, noisy, clean, snrs, rows) for rows in (chosen, chosen[:_SHOWN])]
    noisy, clean, snrs = read(builder, test, features)
    return runner.Data(
        train=batches_of,
        steps_per_epoch=steps,
        validation=heard[0].map(lambda inputs, targets: (inputs, targets[0])),
        test=_whole_clips(options, noisy, clean, snrs, np.arange(len(clean))),
        about={"sampling_rate": SAMPLING_RATE},
        shown=heard[1],
    )


def read(builder, split: str, features) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Returns a part's noisy and clean clips, and the ratios between them.

    Args:
        builder: prepared.
        split: as TFDS has it.
        features: of the set.

    Returns:
        int16 `[samples]` each, twice; and dB, float32 `[clips]`, nan where the set doesn't tell.

    Raises:
        AppError: the part is empty, its sound isn't mono, or two clips that belong together differ in length.
    """
    names = ["noisy", "clean", *(["snr"] if "snr" in features else [])]
    noisy, clean, *snrs = clips.read(builder, split, names, SAMPLING_RATE)
    for each, other in zip(noisy, clean, strict=True):
        if len(each) != len(other):
            raise runner.AppError(
                f"{builder.name}: a noisy clip of {len(each)} samples has a clean one of {len(other)}; they must be of "
                "one length, choose another --dataset"
            )
    return noisy, clean, np.asarray(snrs[0] if snrs else [np.nan] * len(clean), "float32")


def _mixed_anew(options, noisy: list[np.ndarray], clean: list[np.ndarray]):
    """Epoch (from 0) to its batches, and their number.

    The clips are one track, of which an epoch has windows without a gap between them, from a place on that is drawn:
    so nothing is filled up, and nearly each second is heard once in an epoch.
    """
    window, size = round(options.window_seconds * SAMPLING_RATE), options.batch_size
    noisy, clean = np.concatenate(noisy), np.concatenate(clean)
    num = len(clean) // window - 1
    steps = num // size
    if steps < 1:
        raise runner.AppError(
            f"--batch_size={size} is more than the {max(0, num)} windows of {options.window_seconds:g} seconds in the "
            "training part; lower it or --window_seconds"
        )
    tracks = {"noisy": tf.constant(noisy), "clean": tf.constant(clean)}

    def batches_of(epoch: int) -> tf.data.Dataset:
        random = np.random.default_rng(sets.epoch_seed(options.seed, epoch))
        speech_at = random.integers(len(clean) - num * window + 1) + window * random.permutation(num)
        noise_at = random.integers(len(clean) - window + 1, size=num)
        snrs = random.uniform(options.min_snr, options.max_snr, num).astype("float32")

        def mix(rows):
            def cut(name, places):
                at = tf.gather(places, rows)[:, tf.newaxis] + tf.range(window, dtype=places.dtype)
                return tf.cast(tf.gather(tracks[name], at), tf.float32) / clips.FULL_SCALE

            speech, noise = cut("clean", speech_at), cut("noisy", noise_at) - cut("clean", noise_at)
            energies = (tf.reduce_sum(each**2, axis=1) for each in (speech, noise))
            gain = tf.sqrt(tf.math.divide_no_nan(*energies) / 10 ** (tf.gather(snrs, rows) / 10))
            mixture = speech + gain[:, tf.newaxis] * noise
            return {"waveform": mixture, "length": tf.fill(tf.shape(rows), window)}, speech

        return batches.in_batches(np.arange(steps * size).reshape([steps, size]), mix, size)

    return batches_of, steps


def _whole_clips(options, noisy, clean, snrs: np.ndarray, rows: np.ndarray) -> tf.data.Dataset:
    """Batches of clips of similar length: named inputs, (clean speech, ratios)."""
    lengths = np.array([len(clip) for clip in clean])
    noisy, clean = clips.to_ragged(noisy), clips.to_ragged(clean)

    def make(rows):
        waveform, length = clips.pad(tf.gather(noisy, rows), SAMPLING_RATE)
        targets, _ = clips.pad(tf.gather(clean, rows), SAMPLING_RATE)
        return {"waveform": waveform, "length": length}, (targets, tf.gather(snrs, rows))

    return batches.in_batches(rows[np.argsort(lengths[rows], kind="stable")], make, options.batch_size)


# What is served, how it is scored and shown


def serve(model: keras.Model, data: runner.Data):
    """The exported function: clips of any lengths, filled up to one, to as many samples without noise."""

    def enhance(waveform, length):
        length = tf.clip_by_value(length, 0, tf.shape(waveform)[1])
        return {"waveform": model({"waveform": waveform, "length": length}, training=False)}

    return enhance, {
        "waveform": tf.TensorSpec([None, None], tf.float32),
        "length": tf.TensorSpec([None], tf.int32),
    }


def score(call: runner.Call, data: runner.Data) -> dict[str, float]:
    """What `apps.audio.quality.compare` measures of the test part."""
    return quality.compare(*answers(call, data.test), SAMPLING_RATE)


def answers(call: runner.Call, dataset: tf.data.Dataset) -> tuple[list, list, list, np.ndarray]:
    """Returns clean clips, noisy ones and what `call` makes of them, float32 `[samples]` each; and their ratios."""
    cleans, noisies, estimates, ratios = [], [], [], []
    for inputs, (targets, snrs) in dataset:
        enhanced = np.asarray(call(**inputs)["waveform"])
        for row, length in enumerate(inputs["length"].numpy()):
            for clips_, batch in ((cleans, targets), (noisies, inputs["waveform"]), (estimates, enhanced)):
                clips_.append(np.asarray(batch[row])[:length])
        ratios.append(snrs.numpy())
    return cleans, noisies, estimates, np.concatenate(ratios)


def describe(scores: dict[str, float]) -> str:
    """The line that ends a run."""
    line = f"Test SI-SDR: {scores['si_sdr']:.2f} dB, {scores['si_sdr_improvement']:.2f} dB better than the noisy clips"
    others = [f"{name.upper()}: {scores[name]:.3f}" for name in ("stoi", "pesq") if name in scores]
    return " | ".join([line, *others])


def show(model: keras.Model, data: runner.Data) -> dict[str, bytes]:
    """Validation clips before and after, to be seen and heard."""
    call, _ = serve(model, data)
    return _before_and_after(*answers(call, data.shown)[:3])


def conclude(call: runner.Call, data: runner.Data, folder: Path) -> dict[str, bytes]:
    """How far each test clip came; and a few of them, also as files to try apps/predict.py on."""
    *columns, _ = answers(call, data.test)
    before, after = (
        np.array([quality.si_sdr_of(clean, clip) for clean, clip in zip(columns[0], column, strict=True)])
        for column in columns[1:]
    )
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(title="Test part", xlabel="SI-SDR of the noisy clip, dB", ylabel="improvement, dB")
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.scatter(before, after - before, s=6, alpha=0.5)
    # Clips are in the order of their lengths: some that are neither short nor long.
    few = np.argsort(before[: len(before) // 2], kind="stable")[:_SHOWN] if len(before) > 1 else [0]
    cleans, noisies, estimates = ([column[row] for row in few] for column in columns)
    clips.write_examples(noisies, SAMPLING_RATE, folder)
    return {"improvement": figures.to_png(figure)} | _before_and_after(cleans, noisies, estimates)


def _before_and_after(cleans, noisies, estimates) -> dict[str, bytes]:
    """A picture of the spectra of each clip, and its sounds."""
    shown = {}
    for number, versions in enumerate(zip(noisies, estimates, cleans, strict=True), 1):
        rows = list(zip(("noisy", "enhanced", "clean"), versions, strict=True))
        shown[f"clip{number}"] = figures.to_png(clips.spectrograms(rows, SAMPLING_RATE))
        shown |= {f"clip{number}_{name}": waveforms.to_wav(clip, SAMPLING_RATE) for name, clip in rows}
    return shown


# Main

TASK = runner.Task(
    name="speech_enhancement",
    define_flags=define_flags,
    defaults={"dataset": "fillets_noisy", "batch_size": 8, "epochs": 8, "learning_rate": 1e-3},
    load_data=load_data,
    build_model=build_model,
    build_optimizer=build_optimizer,
    build_loss=build_loss,
    build_metrics=build_metrics,
    monitor="val_si_sdr",
    serve=serve,
    score=score,
    metric="si_sdr_improvement",
    margin=0.1,
    describe=describe,
    show=show,
    conclude=conclude,
    short={"width": 8, "units": 64, "window_seconds": 1.0, "epochs": 3, "steps_per_epoch": 60},
)

if __name__ == "__main__":
    runner.main(TASK)
