"""Machine translation: the same said in another language.

    python -m apps.text.translation --dataset=bible_en_es
    python -m apps.text.translation --dataset=gnome_docs/de --source=en --target=de
    python -m apps.text.translation --dataset=ted_hrlr_translate/ru_to_en --source=ru --target=en

Expected of the first: BLEU 23.3 and chrF 45.7 on held-out books, in half as in float32, where a phrase table has 23.1
and 47.0 (2026-11-26, RESULTS.md).

A Transformer with an encoder and a decoder (`apps.text.decoder`), its normalisations in front of each part; sub-words
of each language, and one table for those of the target and the output; a lexicon counted from the training pairs
(`apps.text.lexicon`) is added to its logits. It is trained on pairs of similar length with smoothed labels, by Muon
(`apps.optimizers`), and serves text in, text out: pieces (`apps.text.pieces`) and beam search (`apps.text.search`) are
parts of the exported graph.

Source: Vaswani et al. 2017, "Attention is all you need", arXiv:1706.03762.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from absl import flags
from sacrebleu.metrics import BLEU, CHRF

from apps import batches, figures, optimizers, runner, sets
from apps.text import decoder, encoder, lexicon, pieces, search, texts

_LONGEST = 128  # pieces of a text with END
_DROPOUT = 0.1
_SMOOTHING = 0.1  # Vaswani et al., section 5.4
_ALPHA = 0.6  # of the length penalty; Vaswani et al., section 6.1
_WARMUP_SHARE, _MOST_WARMUP = 0.04, 4000  # of the steps; Vaswani et al., section 5.3: 4000 of 100,000
_COOLDOWN_SHARE = 0.25  # not tuned
# The loss is divided by a constant and not by a batch's number of tokens, which would differ on each replica.
_TYPICAL_TOKENS = 32
_FORCED = 8  # tokens that the numbers compared after an export are computed behind
_STRETCH, _MARGIN = 2, 8  # a translation has no more pieces than twice its source's, and 8
_SHOWN = 8
_TRANSLATIONS = 8  # of each token in the lexicon; not tuned
_COLUMNS = ("source", "reference", "translation")


# Flags


def define_flags(values: flags.FlagValues) -> None:
    """Defines what this task adds to the shared flags."""
    here = {"flag_values": values}
    default = "Default: English, of a set with two languages."
    flags.DEFINE_string("source", None, f"Language to translate from, as the data set calls it. {default}", **here)
    flags.DEFINE_string("target", None, "Language to translate to. Default: the other one.", **here)
    size_help = "Pieces of each language, 300 to 64000; fewer where the texts don't have so many."
    flags.DEFINE_integer("vocabulary_size", 4000, size_help, 300, 64000, **here)
    width_help = f"Numbers that stand for a token, a multiple of {encoder.HEAD_WIDTH}, 32 to 1024."
    flags.DEFINE_integer("width", 128, width_help, 32, 1024, **here)
    flags.DEFINE_integer("depth", 2, "Layers of the encoder, and of the decoder, 1 to 12.", 1, 12, **here)
    flags.DEFINE_integer("beam_size", 4, "Sequences that the served search follows, 1 to 16.", 1, 16, **here)


# Model


def build_model(options, data: runner.Data) -> keras.Model:
    """Token ids of the source, and of the target up to each place (int32), to logits of the next token (float32)."""
    width = options.width
    source_ids, target_ids = (keras.Input([None], dtype="int32", name=f"{side}_ids") for side in ("source", "target"))
    source_embedding, target_embedding = (
        encoder.TokenEmbedding(size, width, dtype="float32", name=f"{side}_embedding")
        for side, size in zip(("source", "target"), data.about["vocabulary_sizes"], strict=True)
    )
    padding_mask = keras.ops.not_equal(source_ids, pieces.PAD)
    encoded = encoder.encode(source_embedding(source_ids), padding_mask, options, _DROPOUT)
    x = keras.layers.Dropout(_DROPOUT, name="target_dropout")(target_embedding(target_ids))
    for index in range(options.depth):
        x = decoder.DecoderBlock(width, _DROPOUT, name=f"decoder{index}")(x, padding_mask, encoded)
    decoded = keras.layers.LayerNormalization(name="decoder_norm")(x)
    x = decoder.TiedDense(target_embedding, name="projection")(decoded)
    looked_up = lexicon.LexiconLogits(data.resources[2], width, name="lexicon")(decoded, encoded, source_ids)
    logits = keras.layers.Add(dtype="float32", name="logits")([x, looked_up])
    return keras.Model({"source_ids": source_ids, "target_ids": target_ids}, logits, name="transformer")


def build_optimizer(options, num_steps: int) -> keras.optimizers.Optimizer:
    """Muon with warm-up, the inverse square root and cooldown."""
    warmup = min(max(1, round(_WARMUP_SHARE * num_steps)), _MOST_WARMUP)
    cooldown = max(1, round(_COOLDOWN_SHARE * num_steps))
    schedule = optimizers.InverseSquareRoot(options.learning_rate, warmup, cooldown, num_steps)
    settings = {"adam_beta_2": 0.98, "epsilon": 1e-9, "weight_decay": None, "adam_weight_decay": None}
    return optimizers.Muon(schedule, **settings)


@keras.saving.register_keras_serializable("tfhalf.apps")
class SmoothedCrossEntropy(keras.losses.Loss):
    """Cross-entropy with smoothed labels, summed over a text's tokens; PAD doesn't count.

    Targets: int `[batch, length]`; outputs: logits, float32 `[batch, length, vocabulary]`.
    """

    def call(self, y_true, y_pred):
        """Returns float32 `[batch]`."""
        token_ids, size = tf.cast(y_true, tf.int32), y_pred.shape[-1]
        each = _SMOOTHING / size
        losses = tf.nn.softmax_cross_entropy_with_logits(
            tf.one_hot(token_ids, size, 1 - _SMOOTHING + each, each), y_pred
        )
        return tf.reduce_sum(tf.where(token_ids == pieces.PAD, 0.0, losses), axis=-1) / _TYPICAL_TOKENS


def build_loss(options) -> keras.losses.Loss:
    """Smoothed cross-entropy."""
    return SmoothedCrossEntropy(name="smoothed_cross_entropy")


@keras.saving.register_keras_serializable("tfhalf.apps")
class TokenAccuracy(keras.metrics.Mean):
    """Share of the tokens that come out first, given all true ones before; PAD doesn't count."""

    def __init__(self, name: str = "token_accuracy", dtype: str = "float32"):
        super().__init__(name=name, dtype=dtype)

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Adds a batch of targets and outputs as `SmoothedCrossEntropy` takes them."""
        token_ids = tf.reshape(tf.cast(y_true, tf.int32), [-1])
        right = tf.math.in_top_k(token_ids, tf.reshape(y_pred, [-1, y_pred.shape[-1]]), 1)
        return super().update_state(tf.cast(right, tf.float32), tf.cast(token_ids != pieces.PAD, tf.float32))


def build_metrics(options) -> list[keras.metrics.Metric]:
    """Accuracy of the next token; BLEU needs whole translations."""
    return [TokenAccuracy()]


# Data


def load_data(options) -> runner.Data:
    """Reads any TFDS set with texts in two languages or more."""
    if options.width % encoder.HEAD_WIDTH:
        raise runner.AppError(f"--width={options.width} must be a multiple of {encoder.HEAD_WIDTH}")
    languages = choose_languages(options, sets.describe(options).info.features)
    builder = sets.prepare(options)
    train, validation, test = (texts.read(builder, split, languages) for split in sets.split_names(builder))
    vocabularies = [texts.learn_pieces(options, side, lowercase=False) for side in train]
    sizes = [vocabulary.size for vocabulary in vocabularies]
    pairs, held_out = _encode(vocabularies, train, "training"), _encode(vocabularies, validation, "validation")
    order, steps = batches.training_order(options, _lengths(pairs))
    # Similar lengths together, from the middle on: a bundle is compared with the model on the first ones.
    test = [np.roll(side, -len(side) // 2) for side in texts.by_length(*test)]
    shown = np.linspace(0, len(validation[0]) - 1, _SHOWN, dtype=int)
    return runner.Data(
        train=lambda epoch: _batches(pairs, order(epoch), options.batch_size),
        steps_per_epoch=steps,
        validation=_batches(held_out, np.argsort(_lengths(held_out), kind="stable"), options.batch_size),
        test=_texts(*test).batch(options.batch_size).prefetch(tf.data.AUTOTUNE),
        about={
            "source": languages[0],
            "target": languages[1],
            "vocabulary_sizes": sizes,
            "beam_size": options.beam_size,
        },
        shown=_texts(*(side[shown] for side in validation)).batch(_SHOWN),
        resources=(*vocabularies, lexicon.learn(*pairs, sizes, _TRANSLATIONS)),
    )


def choose_languages(options, features) -> tuple[str, str]:
    """Returns the features to translate from and to.

    Raises:
        AppError: the set has no two, or the flags name others.
    """
    found = sets.kinds(features)
    # Beside languages a set may have other texts, as the name of a page.
    languages = [name for name, kind in found.items() if kind == "Text" and re.fullmatch("[a-z]{2,3}([-_].+)?", name)]
    if len(languages) < 2:
        raise runner.AppError(
            f"--dataset={options.dataset} has the features {sets.in_words(found)}; machine translation needs texts "
            "(Text) in two languages, named by their codes"
        )
    for flag in ("source", "target"):
        value = getattr(options, flag)
        if value is not None and value not in languages:
            raise runner.AppError(f"--{flag}={value}: {options.dataset} has the languages {', '.join(languages)}")
        if value is None and len(languages) > 2:
            raise runner.AppError(
                f"--{flag} is missing: {options.dataset} has {len(languages)} languages, {', '.join(languages)}"
            )
    source, target = options.source, options.target
    if source is None:
        others = [name for name in languages if name != target]
        source = "en" if "en" in others else others[0]
    target = target or next(name for name in languages if name != source)
    if source == target:
        raise runner.AppError(f"--source and --target are both {source}; choose two of {', '.join(languages)}")
    return source, target


def _encode(vocabularies: list[pieces.Vocabulary], pair: list[np.ndarray], part: str) -> list[tf.RaggedTensor]:
    """Token ids of a part's sources and targets; without pairs that are empty on a side, or too long."""
    sides = [vocabulary.encode(side) for vocabulary, side in zip(vocabularies, pair, strict=True)]
    lengths = np.array([[len(token_ids) for token_ids in side] for side in sides])
    (kept,) = np.nonzero(np.all((lengths > 0) & (lengths < _LONGEST), axis=0))
    if left_out := lengths.shape[1] - len(kept):
        reason = f"empty, or longer than {_LONGEST - 1} pieces"
        runner.say(f"{left_out:,} of {lengths.shape[1]:,} {part} pairs are left out: {reason}")
    if not len(kept):
        raise runner.AppError(f"no {part} pair is left; choose another --dataset, or raise --vocabulary_size")
    return [texts.to_ragged(side[index] for index in kept) for side in sides]


def _lengths(pairs: list[tf.RaggedTensor]) -> np.ndarray:
    """What pairs are sorted by: measured, less padding than by target, then source (42 of 38 tokens, not 46)."""
    return np.maximum(*(side.row_lengths().numpy() for side in pairs))


def _batches(pairs: list[tf.RaggedTensor], order: np.ndarray, batch_size: int) -> tf.data.Dataset:
    """Batches of ({source, target up to each place}, next token)."""

    def make(rows):
        source, target = (tf.gather(side, rows) for side in pairs)
        start, end = (tf.fill([tf.size(rows), 1], token) for token in (pieces.START, pieces.END))
        source_ids, target_ids, next_ids = (
            texts.pad(tf.concat(parts, axis=1)) for parts in ([source, end], [start, target], [target, end])
        )
        return {"source_ids": source_ids, "target_ids": target_ids}, next_ids

    return batches.in_batches(order, make, batch_size)


def _texts(source: np.ndarray, references: np.ndarray) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(({"text": source}, references))


# What is served, how it is scored and shown


def serve(model: keras.Model, data: runner.Data):
    """Texts to their token ids, what the encoder makes of them, and log-probabilities of one more token.

    Those are computed behind the first tokens of the source's own text, so that every weight of the decoder counts
    where a bundle is compared with the model. `decide` searches.
    """
    source_vocabulary, target_vocabulary, _ = data.resources
    both = keras.Model(model.input, [model.get_layer("encoder_norm").output, model.output])

    def encode(text):
        token_ids = source_vocabulary.tokenize(text)[:, : _LONGEST - 1]
        ends = tf.fill([tf.shape(text)[0], 1], pieces.END)
        source_ids = tf.concat([token_ids, ends], axis=1).to_tensor(pieces.PAD)
        starts = tf.fill([tf.shape(text)[0], 1], pieces.START)
        forced = tf.concat([starts, target_vocabulary.tokenize(text)], axis=1)
        forced = forced.to_tensor(pieces.PAD, shape=[None, _FORCED])
        encoded, logits = both({"source_ids": source_ids, "target_ids": forced}, training=False)
        log_probs = tf.nn.log_softmax(logits[:, -1])
        return {"source_ids": source_ids, "encoded": tf.cast(encoded, tf.float32), "log_probs": log_probs}

    return encode, {"text": tf.TensorSpec([None], tf.string)}


def decide(model: keras.Model, data: runner.Data):
    """Beam search, and greedy search beside it."""
    tokens = {"start": pieces.START, "end": pieces.END, "pad": pieces.PAD, "alpha": _ALPHA}
    _, vocabulary, _ = data.resources

    def translate(raw, find, **settings):
        padding_mask = raw["source_ids"] != pieces.PAD
        lengths = tf.reduce_sum(tf.cast(padding_mask, tf.int32), axis=1)
        limits = tf.minimum(_STRETCH * lengths + _MARGIN, _LONGEST)
        step, caches = decoder.token_by_token(model, raw["encoded"], raw["source_ids"])
        token_ids, scores = find(step, caches, limits, **tokens, **settings)
        is_text = lengths > 1  # without END; what says nothing isn't worth a word
        token_ids = tf.where(is_text[:, tf.newaxis], token_ids, pieces.PAD)
        translation = vocabulary.detokenize(tf.RaggedTensor.from_tensor(token_ids))
        return {"translation": translation, "score": tf.where(is_text, scores, 0.0)}

    return {
        "": lambda raw: translate(raw, search.beam, beam_size=data.about["beam_size"]),
        "_greedy": lambda raw: translate(raw, search.greedy),
    }


def _translations(call: runner.Call, dataset: tf.data.Dataset) -> list[tuple[str, str, str]]:
    """Sources, references and what the served function makes of them."""
    rows = []
    for inputs, references in dataset:
        columns = inputs["text"].numpy(), references.numpy(), np.asarray(call(**inputs)["translation"])
        rows += zip(*([text.decode(errors="replace") for text in column] for column in columns), strict=True)
    return rows


def score(call: runner.Call, data: runner.Data) -> dict[str, float]:
    """sacreBLEU and chrF of the test part."""
    _, references, translations = zip(*_translations(call, data.test), strict=True)
    return compare(translations, references) | {"total": len(translations)}


def compare(translations: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Returns sacreBLEU and chrF."""
    bleu, chrf = (metric().corpus_score(translations, [references]).score for metric in (BLEU, CHRF))
    return {"bleu": bleu, "chrf": chrf}


def describe(scores: dict[str, float]) -> str:
    """The line that ends a run."""
    return f"Test {in_words(scores)}"


def in_words(scores: dict[str, float]) -> str:
    """Returns what `compare` returned as a part of a line, with signatures."""
    parts = []
    for name, metric in (("BLEU", BLEU()), ("chrF", CHRF())):
        metric.corpus_score([""], [[""]])  # the signature tells how many references there were
        parts.append(f"{name}: {scores[name.lower()]:.2f} ({metric.get_signature()})")
    return " | ".join(parts)


def show(model: keras.Model, data: runner.Data) -> dict[str, str]:
    """Some validation texts, and what greedy search makes of them."""
    encode, find = serve(model, data)[0], decide(model, data)["_greedy"]
    call = tf.function(lambda text: find(encode(text)), autograph=False)
    return {"translations": figures.to_table(_COLUMNS, _translations(call, data.shown))}


def conclude(call: runner.Call, data: runner.Data, folder: Path) -> dict[str, str]:
    """Some test texts with their translations, also as files to try apps/predict.py on."""
    rows = _translations(call, data.test)
    rows = [rows[index] for index in np.linspace(0, len(rows) - 1, _SHOWN, dtype=int)]
    texts.write_examples((source.encode() for source, _, _ in rows), folder)
    return {"test_translations": figures.to_table(_COLUMNS, rows)}


# Main

TASK = runner.Task(
    name="machine_translation",
    define_flags=define_flags,
    defaults={"dataset": "bible_en_es", "batch_size": 32, "epochs": 11, "learning_rate": 2.5e-3},
    load_data=load_data,
    build_model=build_model,
    build_optimizer=build_optimizer,
    build_loss=build_loss,
    build_metrics=build_metrics,
    monitor="val_loss",
    serve=serve,
    decide=decide,
    score=score,
    metric="bleu",
    margin=0.2,
    describe=describe,
    show=show,
    conclude=conclude,
    short={"width": 64, "depth": 1, "epochs": 3, "steps_per_epoch": 200, "beam_size": 1},
)

if __name__ == "__main__":
    runner.main(TASK)
