"""KerasHub's architectures and the bundles of all apps in every format: what they answer there, or why they can't.

It takes long: `python -m pytest -m soak -n0 -s tests/test_runtimes_campaign.py`. A row is printed for each.
"""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import tfhalf
from tests.test_hazards import HUB, hub_model
from tfhalf import convert, latency

pytestmark = pytest.mark.soak

# What short runs of the apps were converted to; the others' reasons are printed.
AT_LEAST = {
    "image_classification_mnist_5k": {*convert.FORMATS},
    "semantic_segmentation_blue_marble": {*convert.FORMATS},
    "object_detection_deepforest": {"onnx"},
    "keyword_spotting_gcin_tones": {"openvino"},
}


def converted(directory: Path, output: Path) -> tuple[dict[str, convert.Converted], dict[str, str]]:
    """Converts a bundle to every format; returns what was published, and why the others were refused."""
    published, refused = {}, {}
    for format in convert.FORMATS:
        try:
            one = published[format] = convert.convert(directory, format, output)
        except tfhalf.ExportError as error:
            refused[format] = str(error)
            told = f"refused: {error}"
            assert "\n" not in told
            assert not (output / format).exists()
        else:
            shapes = [about["shape"] for about in one.inputs.values()]
            batch = f", for {shapes} only" if one.batch else ""
            told = f"ok: difference {max(one.max_error.values()):.2g}, {one.sizes['files']:,} bytes{batch}"
        print(f"| {directory.parent.name} | {format} | {told} |", flush=True)
    return published, refused


@pytest.mark.parametrize("kind", HUB)
def test_architectures_of_keras_hub(kind, tmp_path):
    model, inputs = hub_model(kind, HUB[kind][0]), HUB[kind][1]
    directory = tmp_path / kind / "1"
    tfhalf.export_saved_model(model, directory, inputs=inputs)
    published, refused = converted(directory, tmp_path / "out")
    assert refused == {}
    # The oracle is Keras in float32 with its own weights, on other examples than the samples.
    given = inputs if isinstance(inputs, dict) else {model.inputs[0].name: inputs}
    others = {name: array[[1, 0, 1]] for name, array in given.items()}
    with tfhalf.precision.computing_in(model, "float32"):
        outputs = model(others if isinstance(inputs, dict) else inputs[[1, 0, 1]], training=False)
    names = tfhalf.precision.output_names(model, outputs)
    expected = {name: tensor.numpy() for name, tensor in zip(names, tf.nest.flatten(outputs), strict=True)}
    for format, one in published.items():
        about = convert.FORMATS[format]
        with latency.Runtime(about.kind, tmp_path / "out" / format / about.file, {"others": others}) as runtime:
            seen = runtime.outputs["others"]
        assert seen.keys() == expected.keys()
        for name, array in expected.items():
            largest = max(1, np.max(np.abs(array)))
            np.testing.assert_allclose(seen[name], array, rtol=0, atol=2 * one.tolerance * largest, err_msg=format)


def test_bundles_of_apps(app_bundles, tmp_path):
    for directory in sorted(app_bundles.glob("*/1")):
        published, refused = converted(directory, tmp_path / directory.parent.name)
        assert published.keys() | refused.keys() == convert.FORMATS.keys()
        assert published.keys() >= AT_LEAST.get(directory.parent.name, set())
