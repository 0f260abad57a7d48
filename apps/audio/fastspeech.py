"""The network of speech synthesis: characters to log-mel frames, all at once.

An encoder reads the characters, a predictor says of each how long, how high and how loud it is said, each is repeated
for as many frames as it takes, and a decoder makes a spectrum of each frame. Encoder and decoder are feed-forward
Transformers: attention, then convolutions along time, normalised in front. The class is that of FastSpeech 2. Other
than there, pitch and loudness are one number for each character, as in FastPitch, one predictor tells all three, and
there are characters and no phonemes.

A row's result doesn't depend on the rows beside it: what is filled up is left out of attention, and is 0 in front of
each convolution.

Half precision: the embedding, positions, repetition (its gradient is a sum over frames), what leaves encoder and
decoder and the outputs are float32; attention and convolutions are half. Durations are integers, and predicted as
float32 logarithms.

Sources: Ren et al. 2021, "FastSpeech 2", arXiv:2006.04558; Lancucki 2021, "FastPitch", arXiv:2006.06873.
"""

import keras
import keras_hub
import tensorflow as tf

_HEADS = 2
_KERNEL, _WIDER = 5, 4  # of the convolutions in a block; the paper has 9, with which they are half of a step
_PREDICTOR_KERNEL = 3
_DROPOUT = 0.1  # the paper's predictor has 0.5 (RESULTS.md)
_IN_FLOAT32 = {"dtype": "float32", "autocast": False}


def build_model(num_characters: int, num_mel_bins: int, width: int, depth: int) -> keras.Model:
    """Returns the model.

    Args:
        num_characters: labels are 1 to this; 0 is what a row is filled up with.
        num_mel_bins: numbers in a frame.
        width: of all layers, an even number.
        depth: blocks of the encoder, and of the decoder.

    Returns:
        From `labels` (int32 `[batch, length]`), `durations` (frames of each, int32) and `prosody` (pitch and loudness
        of each, float32 `[batch, length, 2]`) to `mel` (float32 `[batch, frames, num_mel_bins]`) and `prosody` (float32
        `[batch, length, 3]`: logarithm of the duration in tens of frames, pitch, loudness).
    """
    labels, durations = (keras.Input([None], dtype="int32", name=name) for name in ("labels", "durations"))
    prosody = keras.Input([None, 2], dtype="float32", name="prosody")
    own = keras.ops.not_equal(labels, 0)
    # As large as the positions that are added: of Keras' 0.05 the decoder heard nothing after 300 steps.
    normal = keras.initializers.RandomNormal(stddev=1.0)
    x = keras.layers.Embedding(
        num_characters + 1, width, embeddings_initializer=normal, dtype="float32", name="characters"
    )(labels)
    encoded = _transform(x, own, width, depth, "encoder")
    predicted = _predict(encoded, own, width)

    x = keras.layers.Dense(width, name="prosody_embedding")(prosody)
    x = keras.layers.Add(name="with_prosody")([encoded, x])
    x, own = LengthRegulator(name="length_regulator")(x, durations)
    x = _transform(x, own, width, depth, "decoder")
    mel = keras.layers.Dense(num_mel_bins, dtype="float32", name="mel")(x)
    inputs = {"labels": labels, "durations": durations, "prosody": prosody}
    return keras.Model(inputs, {"mel": mel, "prosody": predicted}, name="fastspeech")


def halves(model: keras.Model) -> tuple[keras.Model, keras.Model]:
    """Returns what is before durations are known and what is behind, which have the model's layers.

    The first goes from labels to what the encoder made of them and to `prosody`; the second from that, durations and
    prosody (as the model's inputs) to `mel`.
    """
    encoded, named = model.get_layer("encoder_norm").output, model.input
    first = keras.Model(named["labels"], [encoded, model.output["prosody"]])
    return first, keras.Model([encoded, named["durations"], named["prosody"]], model.output["mel"])


def _transform(x, own, width: int, depth: int, name: str):
    """A feed-forward Transformer."""
    positions = keras_hub.layers.SinePositionEncoding(name=f"{name}_positions", **_IN_FLOAT32)(x)
    x = keras.layers.Add(dtype="float32", name=f"{name}_input")([x, positions])
    x = keras.layers.Dropout(_DROPOUT, name=f"{name}_dropout")(x)
    for index in range(depth):
        part = f"{name}{index}"
        y = keras.layers.LayerNormalization(name=f"{part}_attention_norm")(x)
        attention = keras.layers.MultiHeadAttention(_HEADS, width // _HEADS, dropout=_DROPOUT, name=f"{part}_attention")
        y = attention(y, y, attention_mask=own[:, None])
        x = _add(x, y, f"{part}_attention")
        y = keras.layers.LayerNormalization(name=f"{part}_norm")(x)
        y = _convolve(y, own, _WIDER * width, _KERNEL, f"{part}_conv1")
        y = keras.layers.Conv1D(width, 1, name=f"{part}_conv2")(y)
        x = _add(x, y, part)
    return keras.layers.LayerNormalization(dtype="float32", name=f"{name}_norm")(x)


def _add(x, y, name: str):
    y = keras.layers.Dropout(_DROPOUT, name=f"{name}_dropout")(y)
    return keras.layers.Add(name=f"{name}_sum")([x, y])


def _convolve(x, own, filters: int, kernel_size: int, name: str):
    x = keras.ops.where(own[:, :, None], x, 0)
    return keras.layers.Conv1D(filters, kernel_size, padding="same", activation="relu", name=name)(x)


def _predict(x, own, width: int):
    """Log-duration, pitch and loudness of each character."""
    for index in (1, 2):
        x = _convolve(x, own, width, _PREDICTOR_KERNEL, f"predictor{index}")
        x = keras.layers.LayerNormalization(name=f"predictor{index}_norm")(x)
        x = keras.layers.Dropout(_DROPOUT, name=f"predictor{index}_dropout")(x)
    return keras.layers.Dense(3, dtype="float32", name="predicted_prosody")(x)


class LengthRegulator(keras.layers.Layer):
    """Repeats what belongs to a character for each of its frames, in float32."""

    def __init__(self, **settings):
        super().__init__(**_IN_FLOAT32 | settings)

    def call(self, x, durations):
        """Repeats.

        Args:
            x: `[batch, length, width]`.
            durations: frames of each, int32 `[batch, length]`, 0 or more.

        Returns:
            float32 `[batch, frames, width]`, as many frames as the longest row has and at least 1, 0 behind a row's
            own; and which are its own, bool `[batch, frames]`.
        """
        ends = tf.cumsum(durations, axis=1)
        counts = ends[:, -1]
        frames = tf.range(tf.maximum(tf.reduce_max(counts), 1))
        rows = tf.broadcast_to(frames, [tf.shape(x)[0], tf.size(frames)])
        index = tf.minimum(tf.searchsorted(ends, rows, side="right"), tf.shape(x)[1] - 1)
        own = rows < counts[:, tf.newaxis]
        repeated = tf.gather(tf.cast(x, tf.float32), index, batch_dims=1)
        return tf.where(own[:, :, tf.newaxis], repeated, 0.0), own

    def compute_output_spec(self, x, durations):
        """Returns the form of the results."""
        batch, _, width = x.shape
        return keras.KerasTensor([batch, None, width], "float32"), keras.KerasTensor([batch, None], "bool")
