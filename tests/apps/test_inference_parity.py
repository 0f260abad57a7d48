"""A bundle's dtypes, on a task of a few lines with the shared bundle; the real apps' in soak."""

import dataclasses
import json
import types

import numpy as np
import pytest
import tensorflow as tf

import tfhalf
from apps import any_app, inference_parity, parity, runner
from tests import test_manifest
from tests.apps.test_parity import parsed
from tests.conftest import run_module


def agreement(one, other):
    return inference_parity._agreement(one, other)


def test_agreement_is_the_share_of_equal_decisions():
    ids = [[np.array([1, 2, 3])], [np.array([4])]]
    assert agreement(ids, ids) == 1.0
    assert agreement(ids, [[np.array([1, 2, 0])], [np.array([4])]]) == 0.75
    assert agreement([[np.array([b"a", b"b"])]], [[np.array([b"a", b"c"])]]) == 0.5
    assert agreement([[np.array([1, 2])]], [[np.array([1, 2, 3])]]) == 0.0  # of another length: nothing is the same
    assert agreement([[]], [[]]) is None


def test_decisions_are_texts_and_numbers_or_else_the_likeliest_class():
    outputs = {"probabilities": np.array([[0.1, 0.9]]), "text": np.array([b"x"])}
    assert [array.tolist() for array in inference_parity._decisions(outputs)] == [[b"x"]]
    del outputs["text"]
    assert [array.tolist() for array in inference_parity._decisions(outputs)] == [[1]]
    assert inference_parity._decisions({"waveform": np.zeros([1, 4], "float32")}) == []


@pytest.mark.parametrize(
    ("difference", "agreement", "one_example", "alike"),
    [
        (0.661 - 0.660, 0.5, 0.001, True),  # one of a thousand, whatever else changed sides
        (-0.0011, 1.0, 0.0001, False),
        (0.0, 0.997, 0.01, False),  # as many right as before, but others
        (0.01, 0.999, 0.01, True),
        (0.01, None, 0.01, False),  # there are no decisions to go by
    ],
)
def test_margin_decides_unless_an_example_is_worth_more(difference, agreement, one_example, alike):
    assert inference_parity.is_alike(difference, 0.001, agreement, one_example) == alike


@pytest.fixture
def task(samples):
    """A task whose bundle is the shared one: it tells the class of six pictures, as the model in float32 does."""

    def score(call, data):
        found = [np.asarray(call(**inputs)["logits"]).argmax(-1) for inputs, _ in data.test]
        correct = int(np.sum(np.concatenate(found) == data.about["labels"]))
        return {"accuracy": correct / 6, "correct": correct, "total": 6}

    def load_data(options):
        test = tf.data.Dataset.from_tensor_slices(({"picture": samples}, np.zeros(6))).batch(4)
        return runner.Data(None, 1, test, test, {"labels": options.labels})

    empty = dict.fromkeys(field.name for field in dataclasses.fields(runner.Task))
    return runner.Task(**empty | {"name": "test", "load_data": load_data, "score": score, "metric": "accuracy"})


def test_each_signature_is_scored_beside_float32_computed_from_the_same_files(task, copy, samples):
    path = copy / "assets.extra" / "manifest.json"
    reference = np.asarray(tfhalf.load_saved_model(copy, "serving_float32")({"picture": samples})["logits"]).argmax(-1)
    manifest = json.loads(path.read_text())
    about = {"plan": {"default": "mixed_float16", "layers": {}}, "flags": {"seed": 7, "task": "test"}}
    manifest["metadata"] |= about | {"metrics": {"trained": {"accuracy": 1.0}}}
    test_manifest.rewrite(copy, json.dumps(manifest).encode())
    options = types.SimpleNamespace(
        seed=0, steps_per_epoch=None, labels=reference, batch_size=1, dataset="x", given=set()
    )
    found = inference_parity.compare(task, options, copy)
    assert found.reference == {"accuracy": 1.0, "correct": 6, "total": 6}
    assert [one.name for one in found.signatures] == ["serving_default", "serving_bfloat16"]
    page = found.to_markdown()
    assert "| serving_float32 | 1.0000 |" in page
    for one in found.signatures:
        seen = np.asarray(tfhalf.load_saved_model(copy, one.name)({"picture": samples})["logits"]).argmax(-1)
        assert one.scores["correct"] == np.sum(seen == reference)
        assert one.difference == one.scores["accuracy"] - 1.0
        assert one.agreement is None  # what it puts out are logits: nothing is decided
        assert one.equivalent == (one.scores["correct"] == 6)


def test_differences_are_from_float32_and_settings_are_those_of_the_run(task, copy, samples):
    """A metric that no two dtypes agree on, and a task that is chosen, whose default the run didn't keep."""

    def score(call, data):
        return {"sum": float(sum(np.asarray(call(**inputs)["logits"], "float64").sum() for inputs, _ in data.test))}

    seen = []

    def load_data(options):
        seen.append((options.batch_size, options.seed))
        return task.load_data(options)

    inner = dataclasses.replace(
        task, score=score, metric="sum", load_data=load_data, defaults={"batch_size": 1, "seed": 1}
    )
    outer = dataclasses.replace(inner, choose=lambda options: inner)
    path = copy / "assets.extra" / "manifest.json"
    manifest = json.loads(path.read_text())
    about = {"plan": {"default": "mixed_float16", "layers": {}}, "flags": {"batch_size": 5, "seed": 5}}
    manifest["metadata"] |= about | {"metrics": {"trained": {"sum": 0.0}}}
    test_manifest.rewrite(copy, json.dumps(manifest).encode())
    options = types.SimpleNamespace(seed=9, steps_per_epoch=None, labels=[], batch_size=9, dataset="x", given={"seed"})
    found = inference_parity.compare(outer, options, copy)
    assert seen == [(5, 9)]  # of the run where it isn't given
    data = task.load_data(options)  # the same batches: sums of others are rounded otherwise
    sums = {}
    for name in ("serving_float32", "serving_default", "serving_bfloat16"):
        served = tfhalf.load_saved_model(copy, name)
        sums[name] = score(lambda served=served, **inputs: served(inputs), data)
    assert found.margin == pytest.approx(0.01 * abs(sums["serving_float32"]["sum"]))
    for one in found.signatures:
        assert one.difference == sums[one.name]["sum"] - sums["serving_float32"]["sum"] != 0


def test_bundle_of_another_task_is_refused(bundle):
    task, values, names = parsed("--app=text.sentiment", f"--saved_model={bundle}")
    with pytest.raises(runner.AppError, match="is of test, and --app makes sentiment"):
        parity.run(task, values, names)


@pytest.mark.soak
def test_bundles_of_all_apps_by_the_real_command_line(app_bundles, data_dir, tmp_path):
    for name in any_app.names():
        task = any_app.task_of(name)
        (bundle,) = app_bundles.glob(f"{task.name}_*/1")
        arguments = [f"--app={name}", f"--saved_model={bundle}", f"--data_dir={data_dir}", f"--output={tmp_path}"]
        result = run_module("apps.parity", *arguments, timeout=3000)
        assert result.returncode in (0, 1), result.stderr
        found = json.loads((tmp_path / "inference.json").read_text())
        assert (result.returncode == 0) == all(one["equivalent"] for one in found["signatures"])
        assert f"{found['reference'][task.metric]:.4f}" in result.stdout
