"""Order of batches and what is in them."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from apps import batches, runner
from apps.text import classification
from tests.conftest import options_for


def options(*arguments: str):
    return options_for(classification.TASK, *arguments)


def lengths_of(num: int, seed: int = 0) -> np.ndarray:
    """Many short texts and a few long ones, as everywhere."""
    return np.random.default_rng(seed).geometric(0.05, num)


def padding(batches: np.ndarray, lengths: np.ndarray) -> float:
    """The share of a batch's positions that hold no token."""
    rows = lengths[batches]
    return 1 - rows.sum() / (rows.max(axis=1) * rows.shape[1]).sum()


@settings(max_examples=40, deadline=None)
@given(num=st.integers(1, 400), size=st.integers(1, 9), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 10**6))
def test_every_epoch_has_the_same_number_of_batches_and_no_row_twice(num, size, seed, epoch):
    flags = options(f"--batch_size={min(num, size)}", f"--seed={seed}")
    order, steps = batches.training_order(flags, lengths_of(num))
    assert steps == num // flags.batch_size
    for each in (0, epoch):
        rows = order(each)
        assert rows.shape == (steps, flags.batch_size)
        assert len(np.unique(rows)) == rows.size
        assert 0 <= rows.min() <= rows.max() < num


def test_order_is_a_pure_function_of_seed_and_epoch():
    flags, lengths = options("--batch_size=8", "--seed=5"), lengths_of(1000)
    order, _ = batches.training_order(flags, lengths)
    first = [order(epoch) for epoch in range(4)]
    np.random.seed(123)  # whatever was drawn meanwhile, and in another order of epochs
    again, _ = batches.training_order(flags, lengths.copy())
    for epoch in (3, 0, 2, 1):
        np.testing.assert_array_equal(again(epoch), first[epoch])
    other, _ = batches.training_order(options("--batch_size=8", "--seed=6"), lengths)
    different = [*first, *(other(epoch) for epoch in range(4))]
    assert len({rows.tobytes() for rows in different}) == 8
    # Not the same batches in another order either.
    assert not {frozenset(row) for row in first[0]} & {frozenset(row) for row in first[1]}


def test_what_an_epoch_leaves_out_is_another_each_time():
    order, steps = batches.training_order(options("--batch_size=8"), lengths_of(15))
    assert steps == 1
    assert {row for epoch in range(40) for row in order(epoch).ravel()} == set(range(15))


def test_rows_of_a_batch_have_similar_lengths():
    lengths = lengths_of(4000)
    order, steps = batches.training_order(options("--batch_size=16"), lengths)
    drawn = np.random.default_rng(0).permutation(4000).reshape([steps, 16])
    assert padding(drawn, lengths) > 0.6
    for epoch in range(3):
        rows = order(epoch)
        assert padding(rows, lengths) < 0.1
        # But short batches don't come first, or last.
        assert abs(stats.spearmanr(np.arange(steps), lengths[rows].mean(axis=1)).statistic) < 0.2


def test_batch_larger_than_the_part_is_refused():
    message = "--batch_size=8 is more than the 7 training examples; lower it"
    with pytest.raises(runner.AppError, match=message):
        batches.training_order(options("--batch_size=8"), lengths_of(7))


def test_batches():
    squares = np.arange(20) ** 2

    def make(rows):
        return tf.gather(squares, rows), -rows

    validation = list(batches.in_batches(np.array([4, 2, 9, 11, 0]), make, 2).as_numpy_iterator())
    assert [batch[0].tolist() for batch in validation] == [[16, 4], [81, 121], [0]]
    assert [batch[1].tolist() for batch in validation] == [[-4, -2], [-9, -11], [0]]
    training = batches.in_batches(np.array([[4, 2], [9, 11]]), make, 2)
    assert [batch[0].tolist() for batch in training.as_numpy_iterator()] == [[16, 4], [81, 121]]
    assert training.element_spec[0].shape == [2]
