"""Rings of records, and what tells batches apart; test_numerics.py records real steps."""

import numpy as np
import tensorflow as tf

from tfhalf import recorder


def test_ring_gives_new_records_once_and_counts_those_that_it_lost():
    ring = recorder._Ring(3, value=([2], tf.float32), number=([], tf.int64))
    strategy = tf.distribute.get_strategy()

    @tf.function
    def write(number):
        ring.put(value=tf.fill([2], tf.cast(number, tf.float32)))
        ring.put(number=number)
        ring.close()

    def numbers():
        (records,), lost = ring.read(strategy)
        assert all(record["value"].tolist() == [record["number"]] * 2 for record in records)
        return [int(record["number"]) for record in records], lost

    assert numbers() == ([], 0)
    for number in (1, 2):
        write(tf.constant(number, tf.int64))
    assert numbers() == ([1, 2], 0)
    assert numbers() == ([], 0)
    for number in range(3, 8):
        write(tf.constant(number, tf.int64))
    assert numbers() == ([5, 6, 7], 2)


def test_fingerprint_tells_batches_apart():
    x = np.arange(24, dtype="float32").reshape(6, 4)
    prints = {
        recorder.fingerprint(batch)
        for batch in [(x, x), (x, x + 1), (x[::-1], x), (x.T, x), (x.astype("float16"), x), (x.astype("int64"),), (x,)]
    }
    assert len(prints) == 7
    assert recorder.fingerprint((x, x)) == recorder.fingerprint((tf.constant(x), tf.constant(x)))
