"""A bundle on disk: read by others, checked before it is loaded, and damage found."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tfhalf


def test_saved_model_cli_reads_it(bundle):
    tool = Path(sys.executable).with_name("saved_model_cli")
    command = [tool, "show", "--dir", bundle, "--tag_set", "serve", "--signature_def", "serving_default"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "dtype: DT_FLOAT" in shown
    assert "DT_HALF" not in shown


def test_runs_without_keras(bundle, samples, tmp_path):
    np.save(tmp_path / "x.npy", samples)
    code = (
        "import sys\n"
        "sys.modules['keras'] = sys.modules['tfhalf'] = None  # importing them would fail\n"
        "import numpy as np, tensorflow as tf\n"
        f"f = tf.saved_model.load({str(bundle)!r}).signatures['serving_default']\n"
        f"print(f(picture=tf.constant(np.load({str(tmp_path / 'x.npy')!r})))['logits'].shape)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout
    assert printed == "(6, 10)\n"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("flip a bit", r"variables\.data-00000-of-00001 isn't the file that was exported"),
        ("truncate", r"saved_model\.pb isn't the file that was exported"),
        ("remove", r"fingerprint\.pb is missing"),
        ("add", r"assets/more\.txt isn't in its manifest"),
        ("no manifest", "is no tfhalf bundle"),
        ("broken manifest", "is no tfhalf bundle"),
    ],
)
def test_damage_is_found_before_loading(copy, samples, damage, message):
    data = copy / "variables" / "variables.data-00000-of-00001"
    if damage == "flip a bit":
        content = bytearray(data.read_bytes())
        content[1000] ^= 1
        data.write_bytes(content)
    elif damage == "truncate":
        os.truncate(copy / "saved_model.pb", 100)
    elif damage == "remove":
        (copy / "fingerprint.pb").unlink()
    elif damage == "add":
        (copy / "assets" / "more.txt").write_text("x")
    elif damage == "no manifest":
        (copy / "assets.extra" / "manifest.json").unlink()
    else:
        (copy / "assets.extra" / "manifest.json").write_text('{"files": {')
    for check in (tfhalf.load_saved_model, tfhalf.verify):
        with pytest.raises(tfhalf.ExportError, match=message):
            check(copy)


def refused(folder: Path) -> str:
    """Loads a bundle; returns why not. It must be our check that says so: TensorFlow hasn't seen the folder yet."""
    with pytest.raises(tfhalf.ExportError) as caught:
        tfhalf.load_saved_model(folder)
    assert "check" in {entry.name for entry in caught.traceback}
    return str(caught.value)


def test_any_byte_that_was_changed_is_found(copy):
    random = np.random.default_rng(20)
    files = sorted(path for path in copy.rglob("*") if path.is_file() and path.stat().st_size)
    for _ in range(200):  # of each file as many: most bytes are the variables'
        path = files[random.integers(len(files))]
        content = path.read_bytes()
        at, bits = int(random.integers(len(content))), int(random.integers(1, 256))
        path.write_bytes(content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :])
        assert path.name in refused(copy) or path.suffix == ".sha256", (path, at, bits)
        path.write_bytes(content)
    tfhalf.bundle.check(copy)


def test_files_that_grew_shrank_or_were_swapped_are_found(copy):
    files = sorted(path for path in copy.rglob("*") if path.is_file() and path.stat().st_size)
    contents = [path.read_bytes() for path in files]
    for path, content, other in zip(files, contents, contents[1:] + contents[:1], strict=True):
        for changed in (content[:-1], content + b"\0", b"", other):
            path.write_bytes(changed)
            refused(copy)
        path.unlink()
        refused(copy)
        path.write_bytes(content)
    tfhalf.bundle.check(copy)


def test_a_fingerprint_or_samples_that_are_none_are_told(copy):
    for name, message, check in (
        ("fingerprint.pb", r"fingerprint\.pb", tfhalf.bundle.check),
        ("saved_model.pb", "is no SavedModel", tfhalf.bundle.check),
        ("assets.extra/sample_outputs.npz", r"sample_outputs\.npz can't be read as arrays", tfhalf.verify),
    ):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(b"\xff" * 20)
        manifest = tfhalf.Manifest.read(copy)
        manifest.files.update(tfhalf.bundle.hashes(copy))
        manifest.write(copy)
        with pytest.raises(tfhalf.ExportError, match=message):
            check(copy)
        (copy / name).write_bytes(content)


def test_verify_runs_the_signatures(copy):
    # A bundle whose hashes are right and whose answers are wrong.
    with np.load(copy / "assets.extra" / "sample_outputs.npz") as file:
        outputs = dict(file)
    outputs["serving_float32/logits"] = outputs["serving_float32/logits"] + 0.5
    np.savez(copy / "assets.extra" / "sample_outputs.npz", **outputs)
    manifest = tfhalf.Manifest.read(copy)
    manifest.files.update(tfhalf.bundle.hashes(copy))
    manifest.write(copy)
    with pytest.raises(tfhalf.ExportError, match="serving_float32: logits differs from the training model by"):
        tfhalf.verify(copy)


def test_wrong_inputs_are_named(bundle, samples):
    served = tfhalf.load_saved_model(bundle)
    for inputs in ({"pictures": samples}, {"picture": samples[..., :2]}, {"picture": np.array(["a"])}, {}):
        with pytest.raises(tfhalf.ExportError, match=r"picture.*float32"):
            served(inputs)
    with pytest.raises(tfhalf.ExportError, match="it has serving_default, serving_float32, serving_bfloat16"):
        tfhalf.load_saved_model(bundle, "serving_float8")
