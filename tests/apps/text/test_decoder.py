"""The decoder token by token against the whole one."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from apps import runner
from apps.text import decoder, lexicon, pieces, translation
from tests.conftest import options_for

POLICIES = ["float32", "mixed_float16", "mixed_bfloat16"]
# Log-probabilities of about 6 after some sixty roundings, which are random: unit roundoff * 6 * 8.
ATOL = {"float32": 1e-5, "mixed_float16": 2**-11 * 48, "mixed_bfloat16": 2**-8 * 48}


def data_for(size: int = 50) -> runner.Data:
    """Data of `size` target tokens, and 10 source tokens less."""
    random = np.random.default_rng(2)
    shares = random.dirichlet(np.ones(4), size - 10)[:, :3]
    known = lexicon.Lexicon(random.integers(4, size, shares.shape), shares, size)
    about = {"vocabulary_sizes": [size - 10, size], "beam_size": 2}
    return runner.Data(None, 10, None, None, about, resources=(None, None, known))


def build(policy: str, size: int = 50, *more: str) -> keras.Model:
    options = options_for(translation.TASK, f"--dtype_policy={policy}", "--width=64", "--depth=1", *more)
    return runner.build(translation.TASK, options, data_for(size))


def ids(shape, size: int = 50, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, size, shape).astype("int32")


def test_no_token_sees_what_comes():
    model = build("float32")
    batch = {"source_ids": ids([2, 9], 40), "target_ids": ids([2, 6])}
    before = model(batch).numpy()
    batch["target_ids"] = batch["target_ids"].copy()
    batch["target_ids"][:, 3] = 4 + (batch["target_ids"][:, 3] - 3) % 46
    after = model(batch).numpy()
    np.testing.assert_array_equal(after[:, :3], before[:, :3])
    assert np.abs(after[:, 3:] - before[:, 3:]).max(axis=-1).min() > 1e-3


@pytest.mark.parametrize("policy", POLICIES)
def test_decoding_by_cache_is_the_whole_decoder(policy):
    model = build(policy, 50, "--depth=2")
    source_ids, beams = ids([2, 9], 40), ids([2, 3, 7], seed=1)  # three sequences of each text
    source_ids[1, 5:] = pieces.PAD
    rows = beams.reshape([6, 7])
    whole = tf.nn.log_softmax(model({"source_ids": np.repeat(source_ids, 3, axis=0), "target_ids": rows}))
    encoder = keras.Model(model.input["source_ids"], model.get_layer("encoder_norm").output)
    step, caches = decoder.token_by_token(model, tf.cast(encoder(source_ids), tf.float32), source_ids)
    caches = [tf.repeat(cache, 3, axis=0) for cache in caches]
    for index in range(7):
        if index == 4:  # the search reorders a text's sequences
            moved = np.array([2, 0, 0, 3, 5, 4])
            caches, rows, whole = [tf.gather(cache, moved) for cache in caches], rows[moved], tf.gather(whole, moved)
        log_probs, caches = step(tf.constant(rows[:, index]), tf.constant(index), caches)
        assert log_probs.dtype == tf.float32
        assert {cache.dtype.name for cache in caches} == {model.get_layer("decoder0").compute_dtype}
        np.testing.assert_allclose(log_probs, whole[:, index], atol=ATOL[policy])
