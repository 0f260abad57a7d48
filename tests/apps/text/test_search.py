"""Both searches against exhaustive search and against beam search in plain Python, on a small model of four tokens."""

import itertools
import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.text import search

PAD, START, END = 0, 2, 3
TOKENS = {"start": START, "end": END, "pad": PAD}
SIZE = 6


class Chain:
    """A second-order Markov chain for each text: the next token depends on the last two, and on where they are.

    The state is what a decoder's cache is: one row more for each token. It must follow the beams to be right.
    """

    def __init__(self, seed: int, batch: int, sharpness: float = 2.0):
        random = np.random.default_rng(seed)
        logits = sharpness * random.normal(size=[batch, 12, SIZE, SIZE, SIZE])
        self.log_probs = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype("float32")
        self.calls = []

    def step(self, token_ids, index, state):
        history, texts = state["history"], state["text"]
        before = tf.concat([tf.zeros_like(token_ids)[:, tf.newaxis], history], axis=1)[:, -1]
        history = tf.concat([history, token_ids[:, tf.newaxis]], axis=1)
        rows = tf.stack([texts, tf.fill(tf.shape(texts), index), before, token_ids], axis=1)
        return tf.gather_nd(tf.constant(self.log_probs), rows), {"history": history, "text": texts}

    def state(self):
        batch = len(self.log_probs)
        return {"history": tf.zeros([batch, 0], tf.int32), "text": tf.range(batch)}

    def next(self, text: int, sequence) -> np.ndarray:
        """Log-probabilities of the token behind a sequence (without START)."""
        whole = [0, START, *sequence]
        return self.log_probs[text, len(sequence), whole[-2], whole[-1]].astype("float64")

    def total(self, text: int, sequence) -> float:
        return sum(self.next(text, sequence[:index])[token] for index, token in enumerate(sequence))


def penalized(total: float, length: int, alpha: float) -> float:
    return total / ((5 + length) / 6) ** alpha


def exhaustive(chain: Chain, text: int, limit: int, alpha: float):
    """The best of all sequences that end with END, up to the limit."""
    others = [token for token in range(SIZE) if token != END]
    every = ([*body, END] for length in range(limit) for body in itertools.product(others, repeat=length))
    return max(((penalized(chain.total(text, each), len(each), alpha), each) for each in every), key=lambda x: x[0])


def plain_beam(chain: Chain, text: int, limit: int, alpha: float, beam_size: int):
    """Beam search that never stops early, in float64 and lists."""
    alive, best = [(0.0, [])], (-math.inf, [])
    for length in range(1, limit + 1):
        longer = [
            (total + log_prob, [*sequence, token])
            for total, sequence in alive
            for token, log_prob in enumerate(chain.next(text, sequence))
        ]
        longer.sort(key=lambda x: -x[0])
        for rank, (total, sequence) in enumerate(longer):
            if sequence[-1] == END and (rank < beam_size or length == limit):
                best = max(best, (penalized(total, length, alpha), sequence), key=lambda x: x[0])
        alive = [candidate for candidate in longer if candidate[1][-1] != END][:beam_size]
    return best


def without_pad(row) -> list[int]:
    """A sequence up to END; behind it there is nothing but PAD."""
    row = list(map(int, row))
    end = row.index(END)
    assert row[end + 1 :] == [PAD] * (len(row) - end - 1)
    return row[: end + 1]


def run(find, chain: Chain, limits, traced: bool = True, **settings):
    def search_all(limits):
        return find(chain.step, chain.state(), limits, **TOKENS, **settings)

    function = tf.function(search_all, autograph=False) if traced else search_all
    token_ids, scores = function(tf.constant(limits))
    assert token_ids.dtype == tf.int32
    assert scores.dtype == tf.float32
    return [without_pad(row) for row in token_ids], scores.numpy()


def test_wide_beam_finds_the_best_of_all_sequences():
    chain = Chain(0, batch=4)
    for alpha in (0.0, 0.6, 2.0):
        sequences, scores = run(search.beam, chain, [4, 4, 3, 1], beam_size=SIZE**4, alpha=alpha)
        for text, limit in enumerate([4, 4, 3, 1]):
            score, sequence = exhaustive(chain, text, limit, alpha)
            assert sequences[text] == sequence
            assert scores[text] == pytest.approx(score, rel=1e-5)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    beam_size=st.integers(1, 5),
    alpha=st.sampled_from([0.0, 0.6, 1.0, 3.0]),
    limits=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    sharpness=st.sampled_from([0.3, 1.0, 3.0]),
)
def test_beam_is_plain_beam_search_though_it_stops_early(seed, beam_size, alpha, limits, sharpness):
    chain = Chain(seed, len(limits), sharpness)
    sequences, scores = run(search.beam, chain, limits, beam_size=beam_size, alpha=alpha)
    for text, limit in enumerate(limits):
        score, sequence = plain_beam(chain, text, limit, alpha, beam_size)
        assert sequences[text] == sequence
        assert scores[text] == pytest.approx(score, rel=1e-5)
        assert len(sequence) <= limit


def test_an_unlikely_end_does_not_win():
    # END is the fifth of six tokens until the limit, and the best of all sequences by its score.
    chain = Chain(0, batch=1)
    chain.log_probs[:] = np.log([0.01, 0.5, 0.1, 0.04, 0.3, 0.05])
    chain.log_probs[:, 11:] = np.log([0.001, 0.001, 0.001, 0.995, 0.001, 0.001])
    sequences, scores = run(search.beam, chain, [12], beam_size=2, alpha=0.6)
    assert sequences == [[1] * 11 + [END]]
    assert scores[0] < penalized(math.log(0.04), 1, 0.6)


def test_greedy_takes_the_likeliest_token():
    chain = Chain(5, batch=8)
    limits = [12, 12, 12, 12, 12, 12, 2, 1]
    sequences, scores = run(search.greedy, chain, limits, alpha=0.6)
    for text, limit in enumerate(limits):
        sequence = []
        while END not in sequence:
            likeliest = int(chain.next(text, sequence).argmax())
            sequence.append(likeliest if len(sequence) + 1 < limit else END)
        assert sequences[text] == sequence
        assert scores[text] == pytest.approx(penalized(chain.total(text, sequence), len(sequence), 0.6), rel=1e-5)


@pytest.mark.parametrize("find", [search.greedy, search.beam])
def test_rows_do_not_depend_on_each_other(find):
    chain, limits = Chain(6, batch=6), [12, 1, 5, 9, 2, 12]
    wanted = {"alpha": 0.6} | ({"beam_size": 3} if find is search.beam else {})
    sequences, scores = run(find, chain, limits, **wanted)
    for text, limit in enumerate(limits):
        alone = Chain(6, batch=6)
        alone.log_probs = chain.log_probs[text : text + 1]
        sequence, score = run(find, alone, [limit], **wanted)
        assert sequence == [sequences[text]]
        assert score[0] == scores[text]


def test_it_stops_when_all_are_decided():
    chain = Chain(7, batch=2)
    chain.log_probs[:] = np.log([1e-3 / 5] * END + [1 - 1e-3] + [1e-3 / 5] * 2)  # END is nearly certain
    for find, wanted in ((search.greedy, {}), (search.beam, {"beam_size": 3})):
        steps = []
        step = chain.step
        chain.step = lambda token_ids, index, state, step=step, steps=steps: (
            steps.append(int(index)) or step(token_ids, index, state)
        )
        sequences, _ = run(find, chain, [12, 12], traced=False, alpha=0.6, **wanted)
        assert sequences == [[END], [END]]
        assert steps == [0]


def test_numbers_that_are_not_finite_end_too():
    chain = Chain(8, batch=2)
    chain.log_probs[:] = np.nan
    for find, wanted in ((search.greedy, {}), (search.beam, {"beam_size": 2})):
        token_ids, _ = find(chain.step, chain.state(), tf.constant([5, 3]), alpha=0.6, **TOKENS, **wanted)
        assert token_ids.shape[1] <= 5


def test_length_penalty_by_hand():
    np.testing.assert_allclose(search.length_penalty(tf.constant([1, 7, 19]), 1.0), [1, 2, 4], rtol=1e-6)
    np.testing.assert_allclose(search.length_penalty(tf.constant([1, 7, 19]), 0.5), [1, 2**0.5, 2], rtol=1e-6)
    np.testing.assert_allclose(search.length_penalty(tf.constant([1, 7, 19]), 0.0), [1, 1, 1])
