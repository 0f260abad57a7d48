"""What a manifest may say, and what may lie in a bundle's folder."""

import contextlib
import hashlib
import json
import os
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tfhalf
from tfhalf import manifest

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def rewrite(folder, content: bytes) -> None:
    """A manifest whose checksum is right, as whoever can write the folder would make it."""
    (folder / manifest.MANIFEST).write_bytes(content)
    checksum = f"{hashlib.sha256(content).hexdigest()}  manifest.json\n"
    (folder / manifest.CHECKSUM).write_text(checksum)


def test_sha256sum_knows_the_checksum(bundle):
    result = subprocess.run(
        ["sha256sum", "--check", "--strict", "manifest.sha256"], cwd=bundle / "assets.extra", capture_output=True
    )
    assert result.returncode == 0, result.stderr


def places(value, path=()):
    """The paths of all values inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(data=st.data())
def test_any_other_value_is_refused_or_harmless(copy, bundle, data):
    told = json.loads((bundle / manifest.MANIFEST).read_text())
    path = data.draw(st.sampled_from(sorted(places(told), key=str)))
    new = data.draw(JSON | st.sampled_from(["../x", "/etc/hostname", "a\0b", "\ud800"]))
    rewrite(copy, json.dumps(changed(told, path, new)).encode())
    # What isn't checked against anything is told as it is, and of the right kind.
    with contextlib.suppress(tfhalf.ExportError):
        tfhalf.bundle.check(copy)
        assert not path or path[0] not in ("files", "fingerprint") or changed(told, path, new) == told
        assert isinstance(tfhalf.Manifest.read(copy), tfhalf.Manifest)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(content=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_other_content_is_refused(copy, content):
    rewrite(copy, content)
    with pytest.raises(tfhalf.ExportError, match="is no tfhalf bundle"):
        tfhalf.bundle.check(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: told["files"].update({"../x": told["files"]["saved_model.pb"]}), r"names \.\./x, .*outside"),
        (lambda told: told["files"].update({"/etc/hostname": {"bytes": 1, "sha256": ""}}), "outside of the bundle"),
        (lambda told: told["files"].pop("saved_model.pb"), r"saved_model\.pb isn't in its manifest"),
        (lambda told: told.pop("sizes"), "all of it should be an object of created, versions"),
        (lambda told: told.update(signatures=[]), "signatures should be another type"),
        (
            lambda told: told["signatures"]["serving_default"].pop("tolerance"),
            "signatures/serving_default should be an",
        ),
        (
            lambda told: told["files"]["saved_model.pb"].update(bytes=True),
            r"files/saved_model\.pb/bytes should be anoth",
        ),
        (lambda told: told.update(fingerprint="1"), r"fingerprint\.pb is of another model"),
        (lambda told: told["signatures"].pop("serving_float32"), "the signature serving_float32 isn't in both"),
        (
            lambda told: told["signatures"]["serving_default"]["inputs"]["picture"].update(dtype="uint8"),
            "serving_default isn't in both its graph and its manifest, or differs",
        ),
    ],
)
def test_wrong_manifests_are_told(copy, change, message):
    told = json.loads((copy / manifest.MANIFEST).read_text())
    change(told)
    rewrite(copy, json.dumps(told).encode())
    for check in (tfhalf.load_saved_model, tfhalf.verify):
        with pytest.raises(tfhalf.ExportError, match=message):
            check(copy)


def test_deep_json_is_refused(copy):
    rewrite(copy, b"[" * 100_000)
    with pytest.raises(tfhalf.ExportError, match="is no tfhalf bundle"):
        tfhalf.load_saved_model(copy)


def test_links_and_devices_are_refused(copy, tmp_path):
    for make in (
        lambda path: path.symlink_to("/etc/hostname"),
        lambda path: path.symlink_to("/etc"),
        lambda path: path.symlink_to("nothing"),
        os.mkfifo,
    ):
        path = copy / "assets" / "more"
        make(path)
        with pytest.raises(tfhalf.ExportError, match="assets/more is a link or a device"):
            tfhalf.load_saved_model(copy)
        path.unlink()
    # The same bytes behind a link are somebody else's to change.
    data = copy / "variables" / "variables.index"
    data.rename(tmp_path / "index")
    data.symlink_to(tmp_path / "index")
    with pytest.raises(tfhalf.ExportError, match=r"variables/variables\.index is a link"):
        tfhalf.load_saved_model(copy)


def test_no_other_graph_may_lie_beside(copy):
    for name in ("saved_model.pbtxt", "saved_model.cpb"):
        (copy / name).write_bytes(b"")
        told = tfhalf.Manifest.read(copy)
        told.files.clear()
        told.files.update(tfhalf.bundle.hashes(copy))
        told.write(copy)
        with pytest.raises(tfhalf.ExportError, match=f"{name} could be loaded instead"):
            tfhalf.load_saved_model(copy)
        (copy / name).unlink()
