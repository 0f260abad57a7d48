"""A worker without Ray, the way to workers that die, and Ray that isn't there."""

import asyncio
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, predict_pb2

import tfhalf
from tfhalf import front, serving


@pytest.fixture(scope="module")
def worker(bundle):
    return serving.Worker(serving.Options(str(bundle.parents[1]), compute_dtype="float32", max_batch_size=8))


@pytest.fixture(scope="module")
def expected(bundle, samples):
    return tfhalf.load_saved_model(bundle, "serving_float32")(samples)["logits"]


def ask(worker, method, model="model", number=0, body=b"", seconds=20.0):
    async def one():
        return await worker.answer(method, model, number, body, seconds)

    return asyncio.run(one())


def predict_request(samples, **spec):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = spec.pop("name", "model")
    request.model_spec.signature_name = spec.pop("signature_name", "")
    request.model_spec.version.value = spec.pop("version", 0)
    request.inputs["picture"].CopyFrom(tf.make_tensor_proto(samples))
    return request


def test_predictions_by_both_protocols(worker, samples, expected):
    for version, signature in ((0, ""), (1, ""), (1, "serving_default"), (0, "serving_float32")):
        request = predict_request(samples, version=version, signature_name=signature)
        answer = ask(worker, "grpc/Predict", "", body=request.SerializeToString())
        response = predict_pb2.PredictResponse.FromString(answer.body)
        np.testing.assert_array_equal(tf.make_ndarray(response.outputs["logits"]), expected)
        assert response.model_spec.version.value == 1
        assert response.model_spec.signature_name == (signature or "serving_default")
    assert answer.about == {"model": "model", "version": 1, "signature": "serving_float32", "batch_rows": 6, "rows": 6}
    for key, body in (
        ("predictions", {"instances": samples.tolist()}),
        ("predictions", {"instances": [{"picture": picture} for picture in samples.tolist()]}),
        ("outputs", {"inputs": samples.tolist(), "signature_name": "serving_float32"}),
        ("outputs", {"inputs": {"picture": samples.tolist()}}),
    ):
        answer = ask(worker, "rest/predict", body=json.dumps(body).encode())
        np.testing.assert_allclose(json.loads(answer.body)[key], expected, rtol=1e-6)


def test_many_at_once_are_joined_and_not_mixed_up(worker, samples, expected):
    async def all_at_once():
        bodies = [json.dumps({"instances": [samples[n % 6].tolist()]}).encode() for n in range(60)]
        return await asyncio.gather(*(worker.answer("rest/predict", "model", 0, body, 20) for body in bodies))

    answers = asyncio.run(all_at_once())
    for number, answer in enumerate(answers):
        np.testing.assert_allclose(json.loads(answer.body)["predictions"][0], expected[number % 6], atol=1e-4)
    assert max(answer.about["batch_rows"] for answer in answers) > 1
    assert all(answer.about["batch_rows"] <= 8 for answer in answers)


def test_metadata_and_status(worker, bundle):
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "model"
    answer = ask(worker, "grpc/GetModelMetadata", "", body=request.SerializeToString())
    found = get_model_metadata_pb2.GetModelMetadataResponse.FromString(answer.body)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    found.metadata["signature_def"].Unpack(signatures)
    assert signatures.signature_def.keys() == {"serving_default", "serving_float32", "serving_bfloat16"}
    by_rest = json.loads(ask(worker, "rest/metadata").body)
    assert by_rest["model_spec"] == {"name": "model", "signature_name": "", "version": "1"}
    picture = by_rest["metadata"]["signature_def"]["signature_def"]["serving_default"]["inputs"]["picture"]
    assert [size["size"] for size in picture["tensor_shape"]["dim"]] == ["-1", "16", "16", "3"]
    asked = get_model_status_pb2.GetModelStatusRequest()
    asked.model_spec.name = "model"
    answer = ask(worker, "grpc/GetModelStatus", "", body=asked.SerializeToString())
    states = get_model_status_pb2.GetModelStatusResponse.FromString(answer.body).model_version_status
    assert [(one.version, one.state) for one in states] == [(1, 30)]
    assert json.loads(ask(worker, "rest/status").body)["model_version_status"][0]["state"] == "AVAILABLE"


def test_what_cannot_be_answered_has_a_code(worker, samples):
    good = predict_request(samples).SerializeToString()
    for method, model, number, body, seconds, code in (
        ("rest/predict", "other", 0, b"{}", 20, "NOT_FOUND"),
        ("rest/predict", "../model", 0, b"{}", 20, "NOT_FOUND"),
        ("rest/predict", "model", 9, b"{}", 20, "NOT_FOUND"),
        ("rest/status", "model", 9, b"", 20, "NOT_FOUND"),
        ("rest/metadata", "other", 0, b"", 20, "NOT_FOUND"),
        ("rest/predict", "model", 0, b"{}", 20, "INVALID_ARGUMENT"),
        ("rest/predict", "model", 0, b'{"instances": [1]}', 20, "INVALID_ARGUMENT"),
        ("grpc/Predict", "", 0, b"\xff", 20, "INVALID_ARGUMENT"),
        ("grpc/Predict", "", 0, predict_request(samples[:, :8]).SerializeToString(), 20, "INVALID_ARGUMENT"),
        ("grpc/Predict", "", 0, predict_request(samples, name="x").SerializeToString(), 20, "NOT_FOUND"),
        ("grpc/Predict", "", 0, predict_request(samples, signature_name="x").SerializeToString(), 20,
         "INVALID_ARGUMENT"),
        ("grpc/Predict", "", 0, good, 0.0, "DEADLINE_EXCEEDED"),
    ):  # fmt: skip
        answer = ask(worker, method, model, number, body, seconds)
        assert (answer.code, method) == (code, method), answer.body
        assert answer.body.decode()


def test_version_that_another_worker_told_of_is_looked_for(bundle, tmp_path, samples):
    shutil.copytree(bundle, tmp_path / "model" / "1")
    worker = serving.Worker(serving.Options(str(tmp_path), compute_dtype="float32", poll_seconds=3600))

    async def body():
        shutil.copytree(bundle, tmp_path / "part")
        (tmp_path / "part").rename(tmp_path / "model" / "2")
        request = json.dumps({"instances": samples.tolist()}).encode()
        answers = [await worker.answer("rest/predict", "model", number, request, 20) for number in (2, 0, 1, 3)]
        return answers, await worker.describe()

    answers, about = asyncio.run(body())
    assert [answer.about.get("version") for answer in answers] == [2, 2, 1, None]
    assert [answer.code for answer in answers] == ["OK"] * 3 + ["NOT_FOUND"]
    assert [key for key, *_ in about["events"]] == ["model version 1: loaded", "model version 2: loaded"]
    assert about["models"]["model"][2]["example"] == {"picture": (0.0, [16, 16, 3])}


class Handle:
    """Ray Serve's handle: each answer is a value, or an error to raise."""

    def __init__(self, *answers):
        self.answers, self.cancelled = list(answers), 0
        self.answer = self

    def remote(self, *_):
        handle, answer = self, self.answers.pop(0)

        class Response:
            def __await__(self):
                if answer is None:
                    yield from asyncio.sleep(60).__await__()
                if isinstance(answer, Exception):
                    raise answer
                return answer
                yield

            def cancel(self):
                handle.cancelled += 1

        return Response()


def test_dead_worker_is_no_answer():
    exceptions = pytest.importorskip("ray.exceptions")
    died = exceptions.ActorDiedError()
    handle = Handle(died, died, "well")
    assert asyncio.run(serving.Workers(handle).ask("answer", seconds=20)) == "well"
    with pytest.raises(front.NoWorkerError, match="3 workers died"):  # a request that kills must not kill them all
        asyncio.run(serving.Workers(Handle(*[died] * 9)).ask("answer", seconds=20))
    with pytest.raises(ValueError, match="a mistake"):
        asyncio.run(serving.Workers(Handle(ValueError("a mistake"))).ask("answer", seconds=20))


def test_worker_that_is_away_for_a_moment_is_asked_again(monkeypatch):
    exceptions = pytest.importorskip("ray.exceptions")
    monkeypatch.setattr(serving, "_RETRY_SECONDS", 0.001)
    away = exceptions.ActorUnavailableError("away", None)
    assert asyncio.run(serving.Workers(Handle(*[away] * 6, "well")).ask("answer", seconds=20)) == "well"


def test_deadline_ends_asking():
    pytest.importorskip("ray.exceptions")
    handle = Handle(None)
    with pytest.raises(TimeoutError):
        asyncio.run(serving.Workers(handle).ask("answer", seconds=0.1))
    assert handle.cancelled == 1


def test_ray_is_imported_only_when_it_is_needed():
    code = (
        "import sys\n"
        "import tfhalf, tfhalf.serving, tfhalf.front\n"
        "assert not {'ray', 'uvicorn'} & sys.modules.keys()\n"
        "sys.modules['ray'] = None  # importing it fails\n"
        "try:\n"
        "    with tfhalf.serving.running(tfhalf.serving.Options('x'), print): pass\n"
        "except tfhalf.serving.ServingError as error:\n"
        "    print(error)\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'tfhalf[serve]'" in printed
