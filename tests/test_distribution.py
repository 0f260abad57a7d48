"""Strategies, bad settings, and what workers agree on."""

import json

import pytest
import tensorflow as tf

from tests.test_optimizer import replicas
from tfhalf import distribution


def test_none_is_one_device():
    strategy = distribution.make_strategy("none")
    workers = distribution.Workers(strategy)
    assert not tf.distribute.has_strategy()
    assert (workers.num_replicas, workers.is_chief, workers.several) == (1, True, False)
    assert workers.any(True, False) == [True, False]
    workers.check_same({"any": "thing"}, "it")
    workers.wait_for_all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tpu",), 'distribute is \'tpu\'; it must be "none", "mirrored" or "multi_worker"'),
        (("none", 2), "num_logical_devices has an effect with"),
        (("mirrored", 2), "TensorFlow is in use already"),
    ],
)
def test_what_cannot_be_had_is_told(arguments, message):
    tf.constant(1)
    with pytest.raises(distribution.DistributionError, match=message):
        distribution.make_strategy(*arguments)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "TF_CONFIG, which isn't set; .* looks like .*python -m apps.launch sets it"),
        ("{", r"TF_CONFIG, which is '{'"),
        ({"cluster": {}}, "TF_CONFIG, which is"),
        ({"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}, "index must be one of theirs"),
        # KERAS.md row 17.
        (
            {"cluster": {"worker": ["a:1"], "ps": ["b:1"]}, "task": {"type": "worker", "index": 0}},
            "only workers are supported, no chief, parameter server",
        ),
        ({"cluster": {"worker": ["a:1"]}, "task": {"type": "evaluator", "index": 0}}, "only workers are supported"),
    ],
)
def test_bad_tf_config_is_explained(monkeypatch, config, message):
    if config is None:
        monkeypatch.delenv("TF_CONFIG", raising=False)
    else:
        monkeypatch.setenv("TF_CONFIG", config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(distribution.DistributionError, match=message):
        distribution.make_strategy("multi_worker")


def test_batch_that_cannot_be_divided_evenly_is_refused():
    batches = tf.data.Dataset.from_tensor_slices((tf.range(9), tf.range(9))).batch(4)
    assert len(list(distribution.even(batches, 1))) == 3
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"does not divide evenly among 2 replicas.*drop_remainder"
    ):
        list(distribution.even(batches, 2))


@pytest.mark.slow
def test_workers_agree_and_share_out_each_batch():
    results = sorted(replicas("agree", "multi_worker"), key=lambda result: result["index"])
    assert len(results) == 2
    for result in results:
        assert result["any"] == [True, False, True]
        assert result["several"]
        assert f"the workers don't agree on the flags (seed is {result['index']} here); give all" in result["told"]
    # The global batch 0 1 2 3 is 0 1 here and 2 3 there, as one device would see it.
    assert results[0]["parts"] == [[[0, 1]], [[4, 5]], [[8, 9]]]
    assert results[1]["parts"] == [[[2, 3]], [[6, 7]], [[10, 11]]]


@pytest.mark.slow
def test_replicas_share_out_each_batch():
    (result,) = replicas("agree", "mirrored")
    assert result["parts"] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]
    assert result["num_replicas"] == 2


@pytest.mark.gpu
@pytest.mark.skipif(not tf.config.list_physical_devices("GPU"), reason="needs a GPU")
def test_every_gpu_is_a_replica():
    assert distribution.make_strategy("mirrored").num_replicas_in_sync == len(tf.config.list_physical_devices("GPU"))
