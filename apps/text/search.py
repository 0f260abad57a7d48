"""Search for the sequence of tokens that a model gives the highest score, inside a graph: beam search and greedy.

The score of a sequence is its log-probability, END's included, divided by ((5 + length) / 6)^alpha, where the length
counts END. Without that longer sequences would lose to shorter ones, whatever they say: each token takes from the sum.

Beam search keeps the `beam_size` likeliest unfinished sequences of each length, and of all those that END finishes the
one with the highest score. END may finish a sequence where that is among the `beam_size` likeliest ways to go on with
any sequence of the row; at the limit of the row it must. (Where it always may, a short sequence wins that nobody would
say: its one unlikely END costs less than many tokens. A model that knew the half of a language answered with two
words.) A row is decided when the best finished sequence beats what its likeliest unfinished one could still reach, with
every token to come being certain and the length at the limit. That bound is exact: stopping changes no answer, and no
row's answer depends on the rows beside it.

Greedy search takes the likeliest token at each step, and stops at END.

Everything is float32, and a sequence's numbers are added up in the order of its tokens. The model is a function of
one token and a state (`Step`); nothing is known of it here.

Source: Wu et al. 2016, "Google's neural machine translation system", arXiv:1609.08144, section 7.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

# Tokens int32 [rows], their position (int32, from 0), a nested structure of tensors [rows, ...] -> log-probabilities of
# the next token, float32 [rows, vocabulary], and the structure's next values. Axes but the first may grow.
Step = Callable[[tf.Tensor, tf.Tensor, Any], tuple[tf.Tensor, Any]]


def beam(
    step: Step, state: Any, limits: tf.Tensor, *, beam_size: int, alpha: float, start: int, end: int, pad: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Finds sequences with a high score, in a loop as long as the longest of them needs.

    Args:
        step: the model; `batch * beam_size` rows, those of one text behind one another.
        state: what `step` gets first, `[batch, ...]`.
        limits: int32 `[batch]`, the largest length of each sequence with END, 1 or more.
        beam_size: unfinished sequences that are kept, 1 or more.
        alpha: exponent of the length penalty, 0 (none) or more.
        start: the token before the first one.
        end: the token that finishes a sequence.
        pad: fills up after END.

    Returns:
        Tokens int32 `[batch, length of the longest]`, each sequence ending with END, and its score, float32 `[batch]`.
    """
    batch = tf.shape(limits)[0]
    state = tf.nest.map_structure(lambda tensor: tf.repeat(tensor, beam_size, axis=0), state)
    first_row = tf.range(batch)[:, tf.newaxis] * beam_size
    highest = length_penalty(limits, alpha)

    def undecided(index, alive, sequences, last, best, best_sequence, state):
        return tf.reduce_any(alive[:, 0] / highest > best)

    def advance(index, alive, sequences, last, best, best_sequence, state):
        log_probs, state = step(last, index, state)
        vocabulary_size = tf.shape(log_probs)[1]
        totals = alive[:, :, tf.newaxis] + tf.reshape(log_probs, [batch, beam_size, vocabulary_size])

        at_limit = (index + 1 >= limits)[:, tf.newaxis]
        flat = tf.reshape(totals, [batch, beam_size * vocabulary_size])
        # Twice as many as go on: END is at most once among those of each sequence.
        likeliest, chosen = tf.math.top_k(flat, 2 * beam_size)
        may_end = (totals[:, :, end] >= likeliest[:, beam_size - 1, tf.newaxis]) | at_limit
        finished = tf.where(may_end, totals[:, :, end] / length_penalty(index + 1, alpha), -float("inf"))
        winner = tf.argmax(finished, axis=1, output_type=tf.int32)
        candidate = tf.gather(finished, winner, batch_dims=1)
        better = candidate > best
        ending = _append(tf.gather(sequences, winner, batch_dims=1), tf.fill([batch], end))
        best_sequence = tf.where(better[:, tf.newaxis], ending, _append(best_sequence, tf.fill([batch], pad)))

        going_on = (chosen % vocabulary_size != end) & ~at_limit
        alive, ranks = tf.math.top_k(tf.where(going_on, likeliest, -float("inf")), beam_size)
        chosen = tf.gather(chosen, ranks, batch_dims=1)
        parents, tokens = chosen // vocabulary_size, chosen % vocabulary_size
        sequences = _append(tf.gather(sequences, parents, batch_dims=1), tokens)
        rows = tf.reshape(first_row + parents, [-1])
        state = tf.nest.map_structure(lambda tensor: tf.gather(tensor, rows), state)
        return index + 1, alive, sequences, tf.reshape(tokens, [-1]), tf.maximum(candidate, best), best_sequence, state

    never = tf.fill([batch, beam_size - 1], -float("inf"))  # at first there is one sequence, not beam_size equal ones
    variables = (
        tf.constant(0),
        tf.concat([tf.zeros([batch, 1]), never], axis=1),
        tf.zeros([batch, beam_size, 0], tf.int32),
        tf.fill([batch * beam_size], start),
        tf.fill([batch], -float("inf")),
        tf.zeros([batch, 0], tf.int32),
        state,
    )
    *_, scores, sequences, _ = _loop(undecided, advance, variables, limits)
    return sequences, scores


def greedy(
    step: Step, state: Any, limits: tf.Tensor, *, alpha: float, start: int, end: int, pad: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Takes the likeliest token at each step; arguments and results as of `beam`, with `batch` rows."""
    batch = tf.shape(limits)[0]

    def unfinished(index, last, total, length, sequences, state):
        return tf.reduce_any(length == 0)

    def advance(index, last, total, length, sequences, state):
        log_probs, state = step(last, index, state)
        tokens = tf.where(index + 1 < limits, tf.argmax(log_probs, axis=1, output_type=tf.int32), end)
        going = length == 0
        total += tf.where(going, tf.gather(log_probs, tokens, batch_dims=1), 0.0)
        tokens = tf.where(going, tokens, pad)
        length = tf.where(tokens == end, index + 1, length)
        return index + 1, tokens, total, length, _append(sequences, tokens), state

    variables = (
        tf.constant(0),
        tf.fill([batch], start),
        tf.zeros([batch]),
        tf.zeros([batch], tf.int32),  # 0: it goes on
        tf.zeros([batch, 0], tf.int32),
        state,
    )
    _, _, total, length, sequences, _ = _loop(unfinished, advance, variables, limits)
    return sequences, total / length_penalty(length, alpha)


def length_penalty(length: tf.Tensor, alpha: float) -> tf.Tensor:
    """Returns what a log-probability is divided by, float32: ((5 + length) / 6)^alpha."""
    return ((5.0 + tf.cast(length, tf.float32)) / 6.0) ** alpha


def _append(sequences: tf.Tensor, tokens: tf.Tensor) -> tf.Tensor:
    return tf.concat([sequences, tokens[..., tf.newaxis]], axis=-1)


def _loop(condition, body, variables, limits: tf.Tensor):
    """A loop whose tensors may grow in every axis; it ends even where numbers are NaN."""
    shapes = tf.nest.map_structure(lambda tensor: tf.TensorShape([None] * tensor.shape.rank), variables)
    return tf.while_loop(condition, body, variables, shapes, maximum_iterations=tf.reduce_max(limits))
