"""Loss, searches and alignment against every path there is, against float64 in numpy, and in an exported graph."""

import functools
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfhalf
from apps.audio import ctc

BLANK = 0


def normalised(logits) -> np.ndarray:
    logits = np.asarray(logits, "float64")
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def collapse(path) -> tuple[int, ...]:
    return tuple(label for label, _ in itertools.groupby(path) if label != BLANK)


@functools.cache
def paths(frames: int, classes: int) -> list[tuple[int, ...]]:
    return list(itertools.product(range(classes), repeat=frames))


def score(log_probs, path) -> float:
    return sum(log_probs[frame, label] for frame, label in enumerate(path))


def every_labelling(log_probs) -> dict[tuple[int, ...], float]:
    found = {}
    for path in paths(*log_probs.shape):
        found.setdefault(collapse(path), []).append(score(log_probs, path))
    return {labels: np.logaddexp.reduce(scores) for labels, scores in found.items()}


def forward(log_probs, labels):
    """Log-probabilities of the states in each frame, float64; Graves et al. 2006, section 4.1."""
    states = [BLANK]
    for label in labels:
        states += [label, BLANK]
    totals = np.full([len(log_probs), len(states)], -np.inf)
    totals[0, :2] = log_probs[0, states[:2]]
    for frame in range(1, len(log_probs)):
        for state, label in enumerate(states):
            ways = totals[frame - 1, max(0, state - 1) : state + 1]
            if label != BLANK and state > 2 and label != states[state - 2]:
                ways = np.append(ways, totals[frame - 1, state - 2])
            totals[frame, state] = np.logaddexp.reduce(ways) + log_probs[frame, label]
    return totals, states


def loss_and_gradient(logits, labels):
    """Minus the log-probability and its gradient, float64, by the forward-backward algorithm."""
    log_probs = normalised(logits)
    ahead, states = forward(log_probs, labels)
    back = forward(log_probs[::-1], labels[::-1])[0][::-1, ::-1]
    total = np.logaddexp.reduce(ahead[-1, -2:])
    share = np.exp(ahead + back - log_probs[:, states] - total)
    gradient = np.exp(log_probs)
    for state, label in enumerate(states):
        gradient[:, label] -= share[:, state]
    return -total, gradient


def rows(*labels) -> np.ndarray:
    longest = max(map(len, labels), default=0)
    return np.array([[*row, *[BLANK] * (longest - len(row))] for row in labels], "int32").reshape(len(labels), longest)


def random_logits(seed: int, *shape: int, sharpness: float = 2.0) -> np.ndarray:
    return (sharpness * np.random.default_rng(seed).normal(size=shape)).astype("float32")


def found_loss(logits, lengths, labels):
    """The loss of each row, and the gradient of their sum."""
    logits = tf.constant(logits)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = ctc.CTC(reduction=None)(ctc.pack(tf.constant(lengths), tf.constant(labels)), logits)
    return loss.numpy(), tape.gradient(loss, logits).numpy()


# Loss


def test_loss_is_that_of_all_paths():
    logits = random_logits(0, 1, 5, 3)
    every = every_labelling(normalised(logits[0]))
    labellings = list(every)
    assert () in labellings
    assert (1, 1, 2) in labellings
    labels, many = rows(*labellings), np.repeat(logits, len(labellings), axis=0)
    log_probs = ctc.log_probability(tf.constant(many), tf.fill([len(labellings)], 5), tf.constant(labels))
    assert log_probs.dtype == tf.float32
    np.testing.assert_allclose(log_probs, list(every.values()), rtol=1e-5)
    assert np.logaddexp.reduce(log_probs) == pytest.approx(0, abs=1e-5)


def test_gradient_is_that_of_all_paths():
    logits = random_logits(1, 4, 5, 3)
    labels = rows((1, 2), (2, 2), (), (1,))
    _, gradient = found_loss(logits, [5, 5, 4, 1], labels)
    for row, length in enumerate([5, 5, 4, 1]):
        log_probs, wanted = normalised(logits[row, :length]), tuple(labels[row][labels[row] != BLANK])
        mine = [path for path in paths(length, 3) if collapse(path) == wanted]
        weights = np.exp([score(log_probs, path) for path in mine])
        expected = np.zeros([5, 3])
        expected[:length] = np.exp(log_probs)
        for path, weight in zip(mine, weights / weights.sum(), strict=True):
            expected[range(length), path] -= weight
        np.testing.assert_allclose(gradient[row], expected, atol=1e-5)


def test_loss_of_longer_rows_is_float64s_and_keras():
    lengths, labels = [40, 31, 12, 40], rows((1, 2, 3, 3, 3, 1, 4), (5,) * 9, (2, 5, 2, 2), (4,))
    logits = random_logits(2, 4, 40, 6)
    loss, gradient = found_loss(logits, lengths, labels)
    for row, length in enumerate(lengths):
        expected, slope = loss_and_gradient(logits[row, :length], labels[row][labels[row] > 0].tolist())
        assert loss[row] == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(gradient[row, :length], slope, atol=1e-4)
        assert not gradient[row, length:].any()
    counts = np.count_nonzero(labels, axis=1)
    theirs = keras.ops.ctc_loss(labels, logits, counts, lengths, mask_index=BLANK)
    np.testing.assert_allclose(loss, theirs, rtol=1e-5)


def test_loss_of_a_long_row():
    logits = random_logits(3, 1, 1000, 8)
    logits[..., BLANK] += 3
    labels = np.random.default_rng(3).integers(1, 8, [1, 60]).astype("int32")
    loss, gradient = found_loss(logits, [1000], labels)
    expected, slope = loss_and_gradient(logits[0], labels[0].tolist())
    assert loss[0] == pytest.approx(expected, rel=1e-5)
    # A sum of a thousand logarithms of some units in float32: 1000 * 2 * 2^-24, and its exponential.
    np.testing.assert_allclose(gradient[0], slope, atol=2e-3)


def test_impossible_labellings_count_nothing():
    lengths = tf.constant([3, 2, 1, 0, 2, 3, 1])
    labels = tf.constant(rows((1, 1), (1, 1), (1, 2), (1,), (1, 2), (2, 1, 2, 1), ()))
    wanted = [True, False, False, False, True, False, True]
    np.testing.assert_array_equal(ctc.fits(lengths, labels), wanted)
    logits = random_logits(4, 7, 4, 3)
    loss, gradient = found_loss(logits, lengths, labels)
    log_probs = ctc.log_probability(tf.constant(logits), lengths, labels).numpy()
    np.testing.assert_array_equal(np.isneginf(log_probs), ~np.array(wanted))
    np.testing.assert_array_equal(loss > 0, wanted)
    np.testing.assert_array_equal(gradient.any(axis=(1, 2)), wanted)
    assert np.isfinite(gradient).all()
    y_true = ctc.pack(lengths, labels)
    np.testing.assert_array_equal(ctc.left_out(y_true, logits), 1.0 - np.array(wanted))


@pytest.mark.parametrize("size", [100.0, 1e4])
def test_a_label_that_nearly_cannot_be_costs_80_and_has_a_gradient(size):
    logits = np.zeros([1, 2, 3], "float32")
    logits[0, :, 1] = size  # certain, and wrong
    loss, gradient = found_loss(logits, [2], rows((2,)))
    assert 80 < loss[0] <= 161
    # Three paths, each as likely: the label is in two of three.
    np.testing.assert_allclose(gradient, [[[-1 / 3, 1, -2 / 3]] * 2], atol=1e-4)


def test_no_frames_and_no_rows():
    loss, gradient = found_loss(np.zeros([2, 0, 3], "float32"), [0, 0], rows((), (1,)))
    assert loss.tolist() == [0, 0]
    assert gradient.shape == (2, 0, 3)
    loss, gradient = found_loss(np.zeros([0, 4, 3], "float32"), np.zeros(0, "int32"), np.zeros([0, 2], "int32"))
    assert (loss.shape, gradient.shape) == ((0,), (0, 4, 3))
    loss, _ = found_loss(random_logits(0, 2, 4, 3), [4, 0], np.zeros([2, 0], "int32"))
    assert loss[0] == pytest.approx(-normalised(random_logits(0, 2, 4, 3))[0, :, BLANK].sum(), rel=1e-5)
    assert loss[1] == 0


def test_what_the_libraries_lack():
    # When one of these fails the module may be shorter.
    logits, lengths = tf.constant(random_logits(5, 2, 1, 4)), tf.constant([2])  # frames first, blank last
    twice = tf.sparse.from_dense([[1, 1]])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = tf.compat.v1.nn.ctc_loss(twice, logits, lengths, ignore_longer_outputs_than_inputs=True)
    assert np.isinf(loss)
    assert np.abs(tape.gradient(loss, logits)).max() > 0.1
    with pytest.raises(tf.errors.InvalidArgumentError, match="Labels length is zero"):
        tf.compat.v1.nn.ctc_loss(tf.sparse.from_dense([[0]]), logits, lengths)
    with pytest.raises(tf.errors.InvalidArgumentError, match="must not be empty"):
        tf.nn.ctc_beam_search_decoder(logits[:0], tf.constant([0]))
    loss = tf.compat.v1.nn.ctc_loss(tf.sparse.from_dense([[1]]), [[[200.0, 0, 0]]], [1])
    assert np.isinf(loss)
    impossible = keras.ops.ctc_loss([[1, 1]], random_logits(5, 1, 2, 4), [2], [2], mask_index=BLANK)
    assert np.isfinite(impossible)


def test_a_model_trains_with_it():
    keras.utils.set_random_seed(0)
    plan = tfhalf.PrecisionPlan("mixed_float16")
    with plan.scope():
        inputs = keras.Input([None, 4], name="features")
        x = keras.layers.Dense(8, activation="relu", name="hidden")(inputs)
        model = keras.Model(inputs, keras.layers.Dense(3, dtype="float32", name="logits")(x))
    tfhalf.compile_model(model, keras.optimizers.Adam(0.03), loss=ctc.CTC(), metrics=[ctc.left_out])
    frames = [[0, 1, 2, 3, 0, 0], [1, 1, 0, 0, 2, 3], [2, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0]]
    features = np.eye(4, dtype="float32")[frames]
    lengths, labels = tf.constant([6, 6, 2, 0]), tf.constant(rows((1, 2), (1, 1, 2), (1, 1), ()))
    y_true = ctc.pack(lengths, labels)
    before = model.evaluate(features, y_true, verbose=0, return_dict=True)
    log_probs = ctc.log_probability(model(features), lengths, labels).numpy()
    assert before["loss"] == pytest.approx(-log_probs[:2].sum() / 4, rel=1e-3)
    assert before["left_out"] == 0.25
    history = model.fit(features, y_true, epochs=20, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert history["loss"][-1] < 0.8 * history["loss"][0]
    restored = keras.losses.deserialize(keras.losses.serialize(ctc.CTC()), {"CTC": ctc.CTC})
    assert (restored.name, restored.dtype) == ("ctc", "float32")


# Search


def prefix_beam(log_probs, beam_size: int) -> tuple[int, ...]:
    """Hannun et al. 2014, algorithm 1, without a language model; in dictionaries and float64."""
    alive = {(): (0.0, -np.inf)}  # ending with a blank, ending with the last label
    for frame in log_probs:
        longer = {}

        def add(prefix, place, value, longer=longer):
            pair = longer.setdefault(prefix, [-np.inf, -np.inf])
            pair[place] = np.logaddexp(pair[place], value)

        for prefix, (blank, label) in alive.items():
            both = np.logaddexp(blank, label)
            add(prefix, 0, both + frame[BLANK])
            for new in range(1, len(frame)):
                if prefix and new == prefix[-1]:
                    add(prefix, 1, label + frame[new])
                    add((*prefix, new), 1, blank + frame[new])
                else:
                    add((*prefix, new), 1, both + frame[new])
        likeliest = sorted(longer, key=lambda prefix, longer=longer: -np.logaddexp(*longer[prefix]))
        alive = {prefix: longer[prefix] for prefix in likeliest[:beam_size]}
    return max(alive, key=lambda prefix: np.logaddexp(*alive[prefix]))


def search(find, logits, lengths, **arguments):
    labels, scores = find(tf.constant(logits), tf.constant(lengths, tf.int32), **arguments)
    assert (labels.dtype, scores.dtype) == (tf.int32, tf.float32)
    found = [tuple(int(label) for label in row if label != BLANK) for row in labels]
    np.testing.assert_array_equal(labels, rows(*found) if len(found) else labels)
    return found, scores.numpy()


def test_wide_beam_finds_the_likeliest_labelling():
    logits, lengths = random_logits(6, 6, 5, 4), [5, 5, 5, 4, 2, 0]
    found, scores = search(ctc.beam, logits, lengths, beam_size=400)
    by_path, _ = search(ctc.greedy, logits, lengths)
    assert found != by_path
    for row, length in enumerate(lengths[:-1]):
        every = every_labelling(normalised(logits[row, :length]))
        assert found[row] == max(every, key=every.get)
        assert scores[row] == pytest.approx(every[found[row]], rel=1e-5)
    assert (found[-1], scores[-1]) == ((), 0)


@pytest.mark.parametrize("beam_size", [1, 2, 3, 6])
def test_beam_is_prefix_beam_search_but_for_a_few(beam_size):
    # TensorFlow's drops a beginning now and then that the textbook's keeps; one answer of a hundred differs on noise.
    lengths = [*range(13)] * 5
    logits = np.stack([random_logits(seed, 14, 5, sharpness=(0.5, 1.0, 3.0)[seed % 3]) for seed in range(len(lengths))])
    found, scores = search(ctc.beam, logits, lengths, beam_size=beam_size)
    wanted = [prefix_beam(normalised(row[:length]), beam_size) for row, length in zip(logits, lengths, strict=True)]
    different = sum(mine != theirs for mine, theirs in zip(found, wanted, strict=True))
    assert different <= 2, different
    for row, length in enumerate(lengths):
        if length:
            assert scores[row] == pytest.approx(-loss_and_gradient(logits[row, :length], list(found[row]))[0], rel=1e-4)


def test_greedy_is_the_likeliest_path_merged():
    logits, lengths = random_logits(7, 8, 9, 3), [9, 9, 9, 9, 9, 4, 1, 0]
    found, scores = search(ctc.greedy, logits, lengths)
    for row, length in enumerate(lengths):
        assert found[row] == collapse(logits[row, :length].argmax(axis=1))
        if length:
            assert scores[row] == pytest.approx(-loss_and_gradient(logits[row, :length], list(found[row]))[0], rel=1e-5)


@pytest.mark.parametrize(("find", "arguments"), [(ctc.greedy, {}), (ctc.beam, {"beam_size": 4})])
def test_repeats_by_hand_and_hostile_numbers(find, arguments):
    path = [0, 1, 1, 0, 1, 2, 2, 0, 0]
    certain = 20 * np.eye(3, dtype="float32")[None, path]
    found, scores = search(find, certain, [9], **arguments)
    assert found == [(1, 1, 2)]
    assert scores[0] == pytest.approx(0, abs=1e-6)
    # Half logits are raised to float32 first, then normalised.
    half = find(tf.constant(certain, tf.float16), tf.constant([9]), **arguments)
    assert half[1].dtype == tf.float32
    assert half[1].numpy() == scores
    for hostile in (1e30, -1e30):
        found, scores = search(find, np.full([2, 3, 3], hostile, "float32"), [3, 1], **arguments)
        assert np.isfinite(scores).all()
    find(tf.fill([2, 3, 3], np.nan), tf.constant([3, 3]), **arguments)  # it ends
    for empty, lengths in ((np.zeros([2, 0, 3], "float32"), [0, 0]), (np.zeros([0, 4, 3], "float32"), [])):
        found, scores = search(find, empty, lengths, **arguments)
        assert found == [()] * len(lengths)
        assert scores.tolist() == [0] * len(lengths)


@pytest.mark.parametrize(("find", "arguments"), [(ctc.greedy, {}), (ctc.beam, {"beam_size": 3})])
def test_rows_do_not_depend_on_each_other(find, arguments):
    logits, lengths = random_logits(8, 5, 9, 4), [9, 1, 0, 5, 9]
    found, scores = search(find, logits, lengths, **arguments)
    for row, length in enumerate(lengths):
        alone, score = search(find, logits[row : row + 1, :length], [length], **arguments)
        assert alone == [found[row]]
        assert score[0] == pytest.approx(scores[row], rel=1e-6)


def test_an_exported_graph_answers_the_same(tmp_path):
    form = [tf.TensorSpec([None, None, 4]), tf.TensorSpec([None], tf.int32)]

    @tf.function(input_signature=form, autograph=False)
    def serve(logits, lengths):
        labels, scores = ctc.beam(logits, lengths, beam_size=4)
        by_path, of_path = ctc.greedy(logits, lengths)
        aligned = ctc.align(logits, lengths, labels)
        return {"labels": labels, "scores": scores, "by_path": by_path, "of_path": of_path,
                "durations": aligned.durations}  # fmt: skip

    module = tf.Module()
    tf.saved_model.save(module, tmp_path, signatures=serve)
    served = tf.saved_model.load(tmp_path).signatures["serving_default"]
    for seed, (batch, frames) in enumerate([(3, 7), (1, 1), (2, 0), (0, 3)]):
        logits, lengths = random_logits(seed, batch, frames, 4), tf.constant([frames, frames // 2, 0][:batch], tf.int32)
        answer = served(logits=tf.constant(logits), lengths=lengths)
        labels, scores = ctc.beam(tf.constant(logits), lengths, beam_size=4)
        np.testing.assert_array_equal(answer["labels"], labels)
        np.testing.assert_array_equal(answer["scores"], scores)
        np.testing.assert_array_equal(answer["by_path"], ctc.greedy(tf.constant(logits), lengths)[0])
        has_labels = tf.reduce_any(labels != BLANK, axis=1)
        np.testing.assert_array_equal(tf.reduce_sum(answer["durations"], axis=1), tf.where(has_labels, lengths, 0))


# Alignment


def run_align(logits, lengths, labels):
    aligned = tf.function(ctc.align, autograph=False)(
        tf.constant(logits), tf.constant(lengths, tf.int32), tf.constant(labels)
    )
    assert [tensor.dtype for tensor in aligned] == [tf.int32, tf.int32, tf.float32]
    return [tensor.numpy() for tensor in aligned]


def states_of(path) -> list[int]:
    states, last, label = [], BLANK, -1
    for each in path:
        label += each not in (BLANK, last)
        states.append(2 * label + 1 if each != BLANK else 2 * label + 2)
        last = each
    return states


def durations_of(path, count: int) -> list[int]:
    """By hand: each run of blanks is cut in the middle."""
    owners = [(state - 1) // 2 if state % 2 else None for state in states_of(path)]
    for is_blank, group in itertools.groupby(range(len(path)), lambda frame: owners[frame] is None):
        run = list(group)
        if is_blank:
            former = owners[run[0] - 1] if run[0] else 0
            latter = owners[run[-1] + 1] if run[-1] + 1 < len(path) else count - 1
            half = len(run) if former == latter else -(-len(run) // 2)
            for place, frame in enumerate(run):
                owners[frame] = former if place < half else latter
    return [owners.count(label) for label in range(count)]


def test_durations_by_hand():
    path = [0, 0, 1, 1, 0, 0, 0, 1, 2, 0, 0, 2, 0]
    logits = 5 * np.eye(3, dtype="float32")[None, path]
    states, durations, _ = run_align(logits, [13], rows((1, 1, 2, 2)))
    assert states.tolist() == [[0, 0, 1, 1, 2, 2, 2, 3, 5, 6, 6, 7, 8]]
    assert durations.tolist() == [[6, 2, 2, 3]]
    assert durations.tolist() == [durations_of(path, 4)]


def test_alignment_is_the_likeliest_of_all_paths():
    lengths = [6, 6, 6, 6, 4, 3, 1, 2, 0, 5]
    wanted = [(1, 2), (1, 1), (2, 1, 2, 1), (1,), (1, 1, 1), (2, 2), (2,), (1, 2), (), ()]
    logits, labels = random_logits(9, 10, 6, 3), rows(*wanted)
    states, durations, scores = run_align(logits, lengths, labels)
    for row, (length, mine) in enumerate(zip(lengths, wanted, strict=True)):
        log_probs = normalised(logits[row, :length])
        possible = [path for path in paths(length, 3) if collapse(path) == mine]
        assert states[row, length:].tolist() == [-1] * (6 - length)
        assert not durations[row, len(mine) :].any()
        if not possible:
            assert not ctc.fits(tf.constant([length]), labels[row : row + 1])[0]
            assert np.isneginf(scores[row])
            assert np.all(states[row] == -1)
            assert not durations[row].any()
            continue
        best = max(possible, key=lambda path, log_probs=log_probs: score(log_probs, path))
        assert scores[row] == pytest.approx(score(log_probs, best), rel=1e-5)
        assert states[row, :length].tolist() == states_of(best)
        if mine:
            assert durations[row, : len(mine)].tolist() == durations_of(best, len(mine))
            assert durations[row].sum() == length
            assert durations[row, : len(mine)].min() >= 1
    assert np.isneginf(scores).tolist() == [False] * 4 + [True] + [False] * 5


def test_rows_are_aligned_as_if_alone_and_may_have_no_frames():
    logits, lengths, labels = random_logits(10, 3, 300, 5), [300, 41, 7], rows((1, 2, 3, 3) * 20, (4, 4, 1), (2,))
    states, durations, scores = run_align(logits, lengths, labels)
    assert durations.sum(axis=1).tolist() == lengths
    for row, length in enumerate(lengths):
        count = np.count_nonzero(labels[row])
        alone = run_align(logits[row : row + 1, :length], [length], labels[row : row + 1, :count])
        np.testing.assert_array_equal(alone[0][0], states[row, :length])
        np.testing.assert_array_equal(alone[1][0], durations[row, :count])
        assert alone[2][0] == pytest.approx(scores[row], rel=1e-6)
    _, durations, scores = run_align(np.zeros([2, 0, 3], "float32"), [0, 0], rows((), (1,)))
    assert (durations.tolist(), scores.tolist()) == ([[0], [0]], [0, -np.inf])
