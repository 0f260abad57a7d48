"""Connectionist temporal classification: loss, greedy and beam search, and which frame belongs to which label.

A network gives each frame a probability of each label and of BLANK. A path names one of them for each frame, and says
what is left of it when repeats are merged and then blanks are taken out: a labelling. A labelling is as likely as all
of its paths together.

Labels are 1 and above; BLANK is 0, and so is what stands behind the last label of a row. Loss and searches are
TensorFlow's own operations, which run on the CPU: the loss is that of `tf.compat.v1.nn.ctc_loss`, which took a seventh
of the time of the loop in `tf.nn.ctc_loss` and keras.losses.CTC. What they lack is here:

* A labelling that needs more frames than there are is impossible, and its loss infinite. `CTC` counts it as 0 without a
  gradient, since the network can't help it; `left_out` tells how many there are. (The operation forgets that equal
  labels need a blank between them, the loop has a finite loss and a gradient for all of them.)
* Rows without a label or without a frame, and batches without a row, are refused by the operations.
* The operation's loss is infinite where a label has a probability below 10^-38. Here no log-probability counts less
  than -80, and the gradient still leads out of there.
* A beam's own score leaves out paths that it dropped. Here a labelling's score is its log-probability.

Not mended: TensorFlow's beam search now and then drops a beginning that the textbook's keeps (on logits that are noise
2 answers of 246 differed). With a beam as wide as there are labellings it finds the likeliest one.

Half precision: everything is float32, whatever the logits are; labels and lengths are integers.

Sources: Graves et al. 2006, "Connectionist temporal classification", ICML (loss, best path); Hannun et al. 2014,
arXiv:1408.2873 (prefix beam search).
"""

from typing import NamedTuple

import keras
import tensorflow as tf

BLANK = 0
# The operation takes the logarithms of probabilities again; e^-80 is far from float32's smallest ones.
_LEAST = -80.0


# Loss


def fits(lengths: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Says which labellings are possible: there is a frame for each label, and one between two that are equal.

    Args:
        lengths: frames of each row, int32 `[batch]`.
        labels: int32 `[batch, longest]`.

    Returns:
        bool `[batch]`.
    """
    repeated = (labels[:, 1:] == labels[:, :-1]) & (labels[:, 1:] != BLANK)
    return _count(labels != BLANK) + _count(repeated) <= lengths


def log_probability(logits: tf.Tensor, lengths: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Returns how likely labellings are.

    Args:
        logits: float `[batch, frames, classes]`, finite.
        lengths: frames of each row, int32 `[batch]`; those behind are ignored.
        labels: int32 `[batch, longest]`.

    Returns:
        float32 `[batch]`, -inf where a labelling is impossible.
    """
    log_probs = tf.nn.log_softmax(tf.cast(logits, tf.float32))
    log_probs += tf.stop_gradient(tf.maximum(log_probs, _LEAST) - log_probs)
    possible, count = fits(lengths, labels), _count(labels != BLANK)
    inputs, op_lengths = _operands(log_probs, lengths)
    # What the operation would refuse asks for one label in one frame instead, and so does the row that was added.
    asked = tf.pad(possible & (count > 0), [[0, 1]])[:, tf.newaxis]
    op_labels = tf.pad(labels, [[0, 1], [0, 1]])
    op_labels = tf.where(asked, op_labels, tf.one_hot(0, tf.shape(op_labels)[1], dtype=tf.int32))
    found = tf.sparse.from_dense(op_labels)
    loss = tf.compat.v1.nn.ctc_loss(found.with_values(found.values - 1), inputs, tf.where(asked[:, 0], op_lengths, 1))[
        : tf.shape(logits)[0]
    ]
    inside = tf.sequence_mask(lengths, tf.shape(logits)[1])
    only_blanks = tf.reduce_sum(tf.where(inside, log_probs[..., BLANK], 0.0), axis=1)
    return tf.where(possible, tf.where(count > 0, -loss, only_blanks), -float("inf"))


class CTC(keras.losses.Loss):
    """Minus the log-probability of a row's labelling; 0, without a gradient, where that is impossible.

    y_true is what `pack` returns, y_pred are logits, float `[batch, frames, classes]`. With Keras' usual reduction rows
    that count 0 are rows of the mean.
    """

    def __init__(self, name: str = "ctc", **settings):
        super().__init__(name=name, **{"dtype": "float32"} | settings)

    def call(self, y_true, y_pred):
        """Returns the loss of each row, float32 `[batch]`."""
        lengths, labels = _unpack(y_true)
        return tf.where(fits(lengths, labels), -log_probability(y_pred, lengths, labels), 0.0)


def pack(lengths: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Returns y_true, int32 `[batch, 1 + longest]`: the frames of each row (at most 2^24), then its labels."""
    return tf.concat([lengths[:, tf.newaxis], labels], axis=1)


def left_out(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    """A metric: the share of rows whose labelling is impossible; of each row 1 or 0, float32 `[batch]`."""
    return 1.0 - tf.cast(fits(*_unpack(y_true)), tf.float32)


def _unpack(y_true: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    y_true = tf.cast(y_true, tf.int32)  # Keras made it float32
    return y_true[:, 0], y_true[:, 1:]


# Search


def greedy(logits: tf.Tensor, lengths: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Finds the labelling of the likeliest path.

    Args:
        logits: float `[batch, frames, classes]`, finite.
        lengths: frames of each row, int32 `[batch]`; those behind are ignored.

    Returns:
        Labels int32 `[batch, longest]`, BLANK behind the last one, and their log-probability, float32 `[batch]`.
    """
    found, _ = tf.nn.ctc_greedy_decoder(*_operands(tf.cast(logits, tf.float32), lengths))
    return _answer(found[0], logits, lengths)


def beam(logits: tf.Tensor, lengths: tf.Tensor, *, beam_size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Finds a likely labelling: of all beginnings the `beam_size` likeliest ones of each frame go on.

    Arguments and results as of `greedy`. One row at a time is searched, on one core.
    """
    operands = _operands(tf.cast(logits, tf.float32), lengths)
    found, _ = tf.nn.ctc_beam_search_decoder(*operands, beam_width=beam_size)
    return _answer(found[0], logits, lengths)


def _operands(logits: tf.Tensor, lengths: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """What the operations want: frames first, blank last, at least one frame and one row."""
    padded = tf.pad(tf.roll(logits, -1, axis=2), [[0, 1], [0, 1], [0, 0]])
    return tf.transpose(padded, [1, 0, 2]), tf.pad(lengths, [[0, 1]])


def _answer(found: tf.SparseTensor, logits: tf.Tensor, lengths: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    labels = tf.cast(tf.sparse.to_dense(found.with_values(found.values + 1)), tf.int32)[: tf.shape(logits)[0]]
    return labels, log_probability(logits, lengths, labels)


# Alignment


class Alignment(NamedTuple):
    """The likeliest path of a known labelling.

    Attributes:
        states: int32 `[batch, frames]`: 2i + 1 is label i (from 0), 2i the blank before it; -1 behind a row's frames.
        durations: frames of each label, int32 `[batch, longest]`, 1 or more, in all as many as the row has. Blanks
            before the first label and behind the last one are theirs; of those between two labels half belongs to
            each, the odd one to the former.
        scores: log-probability of the path, float32 `[batch]`.

    Of an impossible labelling states are -1, durations 0, and the score is -inf. A row without labels has no durations.
    """

    states: tf.Tensor
    durations: tf.Tensor
    scores: tf.Tensor


def align(logits: tf.Tensor, lengths: tf.Tensor, labels: tf.Tensor) -> Alignment:
    """Finds out which frame belongs to which label (Viterbi), all rows at once; faster inside a `tf.function`.

    Args:
        logits: float `[batch, frames, classes]`, finite.
        lengths: frames of each row, int32 `[batch]`.
        labels: int32 `[batch, longest]`.
    """
    frames = tf.shape(logits)[1]
    # A frame more, which is behind every row: a scan needs one.
    log_probs = tf.nn.log_softmax(tf.cast(tf.pad(logits, [[0, 0], [0, 1], [0, 0]]), tf.float32))
    batch, longest = tf.unstack(tf.shape(labels))
    classes = tf.reshape(tf.stack([tf.zeros_like(labels), labels], axis=2), [batch, 2 * longest])
    classes = tf.pad(classes, [[0, 0], [0, 1]])
    emitted = tf.transpose(tf.gather(log_probs, classes, axis=2, batch_dims=1), [1, 0, 2])  # [frames, batch, states]
    # From one label to the next without a blank, where they differ. States behind a row's own lead nowhere.
    jumps = (classes != BLANK) & (classes != _shift(classes, 2, BLANK))
    start = tf.one_hot(tf.zeros_like(lengths), tf.shape(classes)[1], 0.0, -float("inf"))

    def forward(before, frame):
        totals, _ = before
        index, emitted = frame
        two = tf.where(jumps, _shift(totals, 2, -float("inf")), -float("inf"))
        ways = tf.stack([totals, _shift(totals, 1, -float("inf")), two])
        inside = (index < lengths)[:, tf.newaxis]
        totals = tf.where(inside, tf.reduce_max(ways, axis=0) + emitted, totals)
        return totals, tf.where(inside, tf.argmax(ways, axis=0, output_type=tf.int32), 0)

    totals, moves = tf.scan(forward, (tf.range(frames + 1), emitted), (start, tf.zeros_like(classes)))
    count = _count(labels != BLANK)
    ends = tf.stack([2 * count, tf.maximum(2 * count - 1, 0)], axis=1)
    finals = tf.gather(totals[-1], ends, batch_dims=1)
    final = tf.gather(ends, tf.argmax(finals, axis=1), batch_dims=1)
    before = tf.scan(lambda state, move: state - tf.gather(move, state, batch_dims=1), moves, final, reverse=True)

    scores = tf.reduce_max(finals, axis=1)
    known = tf.sequence_mask(lengths, frames) & (scores > -float("inf"))[:, tf.newaxis]
    states = tf.where(known, tf.transpose(before[1:]), -1)  # before a frame is behind the one before
    return Alignment(states, _durations(states, count, longest), scores)


def _durations(states: tf.Tensor, count: tf.Tensor, longest: tf.Tensor) -> tf.Tensor:
    sizes = tf.reduce_sum(tf.one_hot(states, 2 * longest + 1, dtype=tf.int32), axis=1)
    own, blanks = sizes[:, 1::2], sizes[:, 0::2]
    label, last = tf.range(longest), count[:, tf.newaxis] - 1
    before = tf.where(label == 0, blanks[:, :-1], blanks[:, :-1] // 2)
    behind = tf.where(label == last, blanks[:, 1:], blanks[:, 1:] - blanks[:, 1:] // 2)
    return tf.where(label <= last, own + before + behind, 0)


def _shift(rows: tf.Tensor, by: int, fill) -> tf.Tensor:
    """Moves what is in each row to the right."""
    return tf.pad(rows, [[0, 0], [by, 0]], constant_values=fill)[:, : tf.shape(rows)[1]]


def _count(where: tf.Tensor) -> tf.Tensor:
    return tf.math.count_nonzero(where, axis=1, dtype=tf.int32)
