"""The network of text classification and sentiment: a Transformer encoder, and n-grams beside it.

The encoder (KerasHub's layers, its normalisations in front of each part) reads the order of a text's pieces; its output
is averaged over them. Beside it a linear model sees which n-grams of pieces a text has, weighted as tf-idf does; the
logits of both are added. A few thousand texts are too few for an encoder to learn rare words from scratch.

Half precision: ids stay int32; embedding tables, n-grams, the average and the outputs are float32; masks are KerasHub's
and finite in float16.

Sources: Vaswani et al. 2017, arXiv:1706.03762; Xiong et al. 2020, arXiv:2002.04745 (normalisation in front); Joulin et
al. 2017, arXiv:1607.01759 (hashed n-grams); Wang and Manning 2012, ACL P12-2018 (n-grams against networks).
"""

from collections.abc import Callable

import keras
import keras_hub
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import flags

from apps import batches, presets, runner, sets
from apps.text import pieces, texts
from apps.text.wordpieces import WordPieces

_MAX_LENGTH = 256  # pieces of a text that are read, with the special ones; a multiple of 8
HEAD_WIDTH = 32
_BUCKETS = 2**18  # of hashed n-grams; fewer and those of 10,000 short texts meet too often
_PRIME = 1_000_003
# N-grams have a norm of 1, and a learning rate that is made for the encoder; this lets them learn as fast. With more,
# validation losses of vader_movies went up and down.
_GAIN = 10.0
_SHOWN = 16
_COUNTED = 1000  # training batches that n-grams are counted in


def define_flags(values: flags.FlagValues, ngrams: int) -> None:
    """Defines the flags of the network and of its vocabulary."""
    here = {"flag_values": values}
    flags.DEFINE_string(
        "model", "transformer", "transformer, or keras_hub:<preset> (a name from the web, or a folder).", **here
    )
    size_help = "Pieces in the vocabulary, 300 to 64000; fewer where the texts don't have so many."
    flags.DEFINE_integer("vocabulary_size", 8000, size_help, 300, 64000, **here)
    width_help = f"Numbers that stand for a piece, a multiple of {HEAD_WIDTH}, 32 to 1024."
    flags.DEFINE_integer("width", 128, width_help, 32, 1024, **here)
    flags.DEFINE_integer("depth", 2, "Layers of the encoder, 1 to 12.", 1, 12, **here)
    flags.DEFINE_integer(
        "ngrams", ngrams, "Pieces in the longest n-gram beside the encoder, 0 (none) to 4.", 0, 4, **here
    )


def check_options(options) -> None:
    """Refuses flags that can't be, or have no effect.

    Raises:
        AppError: names the flag.
    """
    if presets.is_preset(options.model):
        for flag in ("vocabulary_size", "width", "depth", "ngrams"):
            if flag in options.given:
                raise runner.AppError(f"--{flag} has no effect on --model={options.model}; leave it out")
    elif options.model != "transformer":
        raise runner.AppError(f"--model={options.model} must be transformer or keras_hub:<preset>")
    elif options.width % HEAD_WIDTH:
        raise runner.AppError(f"--width={options.width} must be a multiple of {HEAD_WIDTH}")


# Texts to token ids


class Reader(tf.Module):
    """Texts to the token ids that the network sees: special ones around the first pieces of each text.

    Args:
        vocabulary: `pieces.Vocabulary` or `wordpieces.WordPieces`.
        first: ids in front of each text; so no text is without any.
        last: ids behind it.
    """

    def __init__(self, vocabulary: pieces.Vocabulary | WordPieces, first: list[int], last: list[int]):
        super().__init__()
        self.vocabulary, self.first, self.last = vocabulary, first, last

    def encode(self, lines: np.ndarray) -> tf.RaggedTensor:
        """Returns int32 `[texts, None]`, for training."""
        return self._framed(texts.to_ragged(self.vocabulary.encode(lines)))

    def __call__(self, text: tf.Tensor) -> tf.Tensor:
        """Returns int32 `[batch, length]` of string `[batch]` in plain TensorFlow operations, for serving."""
        return texts.pad(self._framed(self.vocabulary.tokenize(text)))

    def _framed(self, token_ids: tf.RaggedTensor) -> tf.RaggedTensor:
        def rows(special: list[int]) -> tf.Tensor:
            return tf.tile([tf.constant(special, tf.int32)], [token_ids.nrows(), 1])

        room = _MAX_LENGTH - len(self.first) - len(self.last)
        return tf.concat([rows(self.first), token_ids[:, :room], rows(self.last)], axis=1)


# Data


def read_parts(options, builder: tfds.core.DatasetBuilder, text: str, target: str) -> list[list[np.ndarray]]:
    """Reads training, validation and test part.

    Args:
        options: the parsed flags.
        builder: of the prepared data set.
        text: its feature that is the text.
        target: its feature that is wanted; an integer of -1 says that there is no label.

    Returns:
        Texts (bytes) and targets of each part, without those that have no label.
    """
    names = sets.split_names(builder)
    parts = [texts.read(builder, name, [text, target]) for name in names]
    if names[1] == "validation" and not np.any(is_labelled(parts[2][1])):  # those of GLUE's test parts are secret
        names = ("train[:90%]", "train[90%:]", "validation")
        parts = [texts.read(builder, name, [text, target]) for name in names]
    for name, part in zip(names, parts, strict=True):
        chosen = is_labelled(part[1])
        if not chosen.any():
            raise runner.AppError(f"--dataset={options.dataset}: no text in {name} has a label; choose another one")
        if not chosen.all():
            runner.say(f"{np.sum(~chosen):,} of {len(chosen):,} texts in {name} have no label and are left out")
        part[:] = [column[chosen] for column in part]
    return parts


def is_labelled(targets: np.ndarray) -> np.ndarray:
    """Returns which targets are there: labels from 0 on, ratings that are numbers."""
    return targets >= 0 if targets.dtype.kind in "iu" else np.isfinite(targets)


def to_data(options, parts, encode_targets: Callable[[np.ndarray], np.ndarray], about: dict) -> runner.Data:
    """Returns what an app's `load_data` gives.

    Args:
        options: the parsed flags.
        parts: as `read_parts` returns them.
        encode_targets: targets to those of the network, float32 `[texts, outputs]`.
        about: what the app has to say of its data.
    """
    train, validation, test = parts
    reader = _make_reader(options, train[0])
    lengths, all_training = _batches(options, reader, train[0], encode_targets(train[1]))
    order, steps = batches.training_order(options, lengths)
    validation_targets = encode_targets(validation[1])
    lengths, all_validation = _batches(options, reader, validation[0], validation_targets)
    test = texts.by_length(*test)
    return runner.Data(
        train=lambda epoch: all_training(order(epoch)),
        steps_per_epoch=steps,
        validation=all_validation(np.argsort(lengths, kind="stable")),
        test=tf.data.Dataset.from_tensor_slices(({"text": test[0]}, test[1])).batch(options.batch_size),
        about=about | {"vocabulary_size": reader.vocabulary.size},
        shown=tf.data.Dataset.from_tensors((validation[0][:_SHOWN], validation_targets[:_SHOWN])),
        resources=(reader,),
    )


def _batches(options, reader: "Reader", lines: np.ndarray, targets: np.ndarray):
    """Lengths of texts in ids; and a function from an order of them to batches."""
    token_ids = reader.encode(lines)

    def make(rows):
        return texts.pad(tf.gather(token_ids, rows)), tf.gather(targets, rows)

    return token_ids.row_lengths().numpy(), lambda order: batches.in_batches(order, make, options.batch_size)


def _make_reader(options, lines: np.ndarray) -> Reader:
    """Returns the reader that `--model` needs; its vocabulary is learned from training texts, or the preset's."""
    if not presets.is_preset(options.model):
        vocabulary = texts.learn_pieces(options, lines, lowercase=True)
        return Reader(vocabulary, [pieces.START], [])
    tokenizer = presets.load(keras_hub.tokenizers.Tokenizer, options.model)
    if not isinstance(tokenizer, keras_hub.tokenizers.WordPieceTokenizer):
        raise runner.AppError(
            f"--model={options.model}: its tokenizer is {type(tokenizer).__name__}, and only WordPiece (BERT, "
            "DistilBERT, ELECTRA) can be served by plain TensorFlow; choose another preset"
        )
    vocabulary = WordPieces(tokenizer.get_vocabulary(), tokenizer.lowercase, tokenizer.strip_accents)
    if tokenizer.pad_token_id != pieces.PAD:
        raise runner.AppError(f"--model={options.model}: its padding has the id {tokenizer.pad_token_id}, not 0")
    return Reader(vocabulary, [tokenizer.cls_token_id], [tokenizer.sep_token_id])


# Network


class TokenEmbedding(keras.layers.Embedding):
    """Token ids to vectors of about 1, plus sines that tell the position; made for float32, as half rounds positions.

    Source: Vaswani et al. 2017, sections 3.4 and 3.5.
    """

    def __init__(self, size: int, width: int, **settings):
        normal = keras.initializers.RandomNormal(stddev=width**-0.5)
        super().__init__(size, width, embeddings_initializer=normal, **settings)

    def call(self, token_ids, start=0):
        """Embeds int32 `[batch, length]`, the first of which are at the position `start`."""
        # Powers of 10,000, from 1 down; the paper has sines and cosines in turns.
        rates = 1e4 ** (-np.arange(0, self.output_dim, 2, dtype="float32") / self.output_dim)
        positions = tf.cast(start + tf.range(tf.shape(token_ids)[1]), tf.float32)
        angles = positions[:, tf.newaxis] * rates
        return super().call(token_ids) * self.output_dim**0.5 + tf.concat([tf.sin(angles), tf.cos(angles)], axis=-1)


class NgramLogits(keras.layers.Embedding):
    """A linear model on the n-grams of a text: tf-idf, then a sum of one row of the table for each.

    A single piece has a row of its own, longer n-grams share rows by a hash. tf-idf is scikit-learn's, with smooth idf
    and the L2 norm, except that an n-gram that comes twice counts in the norm as two.

    Args:
        units: outputs.
        vocabulary_size: ids.
        longest: pieces in the longest n-gram, 1 or more.
    """

    def __init__(self, units: int, vocabulary_size: int, longest: int, **settings):
        size = vocabulary_size + (_BUCKETS if longest > 1 else 0)
        super().__init__(size, units, embeddings_initializer="zeros", **settings)
        self.vocabulary_size, self.longest = vocabulary_size, longest

    def build(self, input_shape=None):
        """Makes the table and the weights of n-grams."""
        super().build(input_shape)
        self.idf = self.add_weight(name="idf", shape=[self.input_dim], initializer="ones", trainable=False)

    def adapt(self, batches) -> None:
        """Weighs n-grams by how few texts have them.

        Args:
            batches: of token ids, int32 `[batch, length]`.
        """
        counts, num = np.zeros(self.idf.shape, np.int64), 0
        for token_ids in batches:
            for row in np.asarray(self._ngrams(token_ids)):
                counts[np.unique(row)] += 1
            num += len(token_ids)
        self.idf.assign(np.log((1 + num) / (1 + counts)) + 1)

    def call(self, token_ids):
        """Returns float32 `[batch, units]` of int32 `[batch, length]`."""
        ngrams = self._ngrams(token_ids)
        weights = tf.where(ngrams == pieces.PAD, 0.0, tf.gather(tf.convert_to_tensor(self.idf), ngrams))
        norm = tf.norm(weights, axis=1, keepdims=True)
        weights = tf.math.divide_no_nan(weights, norm)
        return _GAIN * tf.reduce_sum(weights[..., tf.newaxis] * super().call(ngrams), axis=1)

    def compute_output_shape(self, input_shape):
        """Returns `[batch, units]`."""
        return input_shape[0], self.output_dim

    def _ngrams(self, token_ids) -> tf.Tensor:
        """Rows of the table, int32 `[batch, length * longest]`; PAD where a text has no n-gram."""
        size, found, hashed = self.vocabulary_size, [token_ids], tf.cast(token_ids, tf.int64)
        for ahead in range(1, self.longest):
            behind = tf.pad(token_ids[:, ahead:], [[0, 0], [0, ahead]])[:, : tf.shape(token_ids)[1]]
            hashed = (hashed * _PRIME + tf.cast(behind, tf.int64)) % _BUCKETS
            found.append(tf.where(behind == pieces.PAD, pieces.PAD, size + tf.cast(hashed, tf.int32)))
        return tf.concat(found, axis=1)


def build_model(options, data: runner.Data, num_outputs: int, dropout: float) -> keras.Model:
    """Token ids (int32, PAD is 0) to `num_outputs` numbers for each text (float32)."""
    token_ids = keras.Input([None], dtype="int32", name="token_ids")
    padding_mask = keras.ops.not_equal(token_ids, pieces.PAD)
    preset = presets.is_preset(options.model)
    features = (_pretrained if preset else _transformer)(token_ids, padding_mask, options, data, dropout)
    features = keras.layers.Dropout(dropout, dtype="float32", name="features_dropout")(features)
    logits = keras.layers.Dense(num_outputs, dtype="float32", name="encoder_logits")(features)
    if options.ngrams and not preset:
        ngrams = NgramLogits(
            num_outputs, data.about["vocabulary_size"], options.ngrams, dtype="float32", name="ngram_logits"
        )
        # In training each branch is left out of half of the texts: else the encoder, which soon knows them by heart,
        # leaves the n-grams nothing to learn.
        both = keras.ops.stack([logits, ngrams(token_ids)], axis=1)
        both = keras.layers.Dropout(0.5, noise_shape=[None, 2, 1], dtype="float32", name="branch_dropout")(both)
        logits = keras.ops.sum(both, axis=1)
        ngrams.adapt(inputs for inputs, _ in data.train(0).take(_COUNTED))
    return keras.Model(token_ids, logits, name="text_encoder")


def _transformer(token_ids, padding_mask, options, data, dropout):
    """The mean over a text's pieces of what the encoder makes of them."""
    embedding = TokenEmbedding(data.about["vocabulary_size"], options.width, dtype="float32", name="embedding")
    x = encode(embedding(token_ids), padding_mask, options, dropout)
    nothing = keras.ops.logical_not(keras.ops.any(padding_mask, axis=1, keepdims=True))  # its mean isn't 0 / 0
    mask = keras.ops.logical_or(padding_mask, nothing)
    return keras.layers.GlobalAveragePooling1D(dtype="float32", name="mean")(x, mask=mask)


def encode(x, padding_mask, options, dropout: float):
    """The encoder's `--depth` layers over embedded tokens `[batch, length, --width]`, and a last normalisation."""
    x = keras.layers.Dropout(dropout, name="embedding_dropout")(x)
    for index in range(options.depth):
        heads, name = options.width // HEAD_WIDTH, f"encoder{index}"
        x = keras_hub.layers.TransformerEncoder(
            4 * options.width, heads, dropout=dropout, activation="relu", normalize_first=True, name=name
        )(x, padding_mask=padding_mask)
    return keras.layers.LayerNormalization(name="encoder_norm")(x)


def _pretrained(token_ids, padding_mask, options, data, dropout):
    """What a pretrained backbone makes of a text's first token."""
    backbone = presets.load(keras_hub.models.Backbone, options.model)
    inputs = {"token_ids": token_ids, "padding_mask": padding_mask, "segment_ids": keras.ops.zeros_like(token_ids)}
    outputs = backbone({tensor.name: inputs[tensor.name] for tensor in backbone.inputs})
    return (outputs["sequence_output"] if isinstance(outputs, dict) else outputs)[:, 0]
