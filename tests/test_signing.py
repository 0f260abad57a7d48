"""Signatures: whose key, of which files, before anything is loaded; model-signing's own program is the other side."""

import base64
import json
import subprocess
import sys

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

import tfhalf
from tfhalf import manifest, signing


def write_keys(folder, name: str, password: bytes | None = None):
    """A pair of keys as openssl writes them: (private, public)."""
    key = ec.generate_private_key(ec.SECP256R1())
    hiding = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    pem = serialization.Encoding.PEM
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, hiding))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return write_keys(tmp_path_factory.mktemp("keys"), "ours")


@pytest.fixture
def signed(copy, keys):
    assert signing.sign(copy, keys[0]) == copy / "assets.extra" / "model.sig"
    return copy


def model_signing(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_both_sides_know_each_others_signatures(copy, keys, samples):
    with pytest.raises(tfhalf.ExportError, match=r"isn't signed: it has no assets\.extra/model\.sig"):
        tfhalf.load_saved_model(copy, require_signature=keys[1])
    signature = signing.sign(copy, keys[0])
    told = model_signing("verify", "key", "--signature", signature, "--public_key", keys[1], copy)
    assert told.returncode == 0, told.stderr
    # A signature changes nothing for those who don't ask for it; nor does another name of the folder.
    renamed = copy.rename(copy.with_name("2"))
    expected = tfhalf.load_saved_model(renamed)(samples)["logits"]
    served = tfhalf.load_saved_model(renamed, require_signature=keys[1])
    np.testing.assert_array_equal(served(samples)["logits"], expected)
    # The other way round.
    signature = renamed / "assets.extra" / "model.sig"
    signature.unlink()
    told = model_signing("sign", "key", "--signature", signature, "--private_key", keys[0], renamed)
    assert told.returncode == 0, told.stderr
    tfhalf.bundle.check(renamed, keys[1])
    (renamed.parent / "current").symlink_to("2")
    tfhalf.bundle.check(renamed.parent / "current", keys[1])
    assert [path.name for path in renamed.parent.iterdir() if path.name.startswith(".")] == []


def refused(folder, key, message: str) -> None:
    for check in (tfhalf.load_saved_model, tfhalf.verify, tfhalf.bundle.check):
        with pytest.raises(tfhalf.ExportError, match=message):
            check(folder, require_signature=key)


def test_who_rewrites_the_manifest_too_has_no_key(signed, keys, tmp_path):
    with np.load(signed / tfhalf.bundle.OUTPUTS) as file:
        outputs = dict(file)
    np.savez_compressed(signed / tfhalf.bundle.OUTPUTS, **outputs)
    told = tfhalf.Manifest.read(signed)
    told.files.update(tfhalf.bundle.hashes(signed))
    told.write(signed)
    tfhalf.bundle.check(signed)  # every hash agrees
    refused(signed, keys[1], r"signature doesn't hold for ours\.pub: .*sample_outputs\.npz")
    theirs = write_keys(tmp_path, "theirs")
    signing.sign(signed, theirs[0])
    refused(signed, keys[1], "Key mismatch")


@pytest.mark.parametrize("name", ["variables/variables.index", manifest.MANIFEST, manifest.CHECKSUM])
def test_changed_and_added_files_are_refused(signed, keys, name):
    content = (signed / name).read_bytes()
    (signed / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    refused(signed, keys[1], f"signature doesn't hold .*{name}")
    (signed / name).write_bytes(content)
    (signed / ".gitattributes").write_text("x")
    refused(signed, keys[1], "signature doesn't hold .*gitattributes")


def test_damaged_signatures_are_refused(signed, keys):
    path = signed / manifest.SIGNATURE
    whole = json.loads(path.read_text())
    envelope = whole["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"])
    variants = [b"", b"{}", b"[]", b"\xff", path.read_bytes()[:-100]]
    changed = payload.replace(b"sha256", b"sha255", 1)
    for replaced in (
        {"payload": base64.b64encode(changed).decode()},
        {"signatures": []},
        {"signatures": [{"sig": "AAAA", "keyid": ""}]},
        {"payloadType": "text/plain"},
    ):
        variants.append(json.dumps(whole | {"dsseEnvelope": envelope | replaced}).encode())
    for content in variants:
        path.write_bytes(content)
        with pytest.raises(tfhalf.ExportError, match="signature doesn't hold"):
            tfhalf.bundle.check(signed, keys[1])
        tfhalf.bundle.check(signed)


def test_keys_that_are_none(copy, keys, tmp_path):
    (tmp_path / "empty").write_text("")
    encrypted, _ = write_keys(tmp_path, "encrypted", b"secret")
    before = sorted(copy.rglob("*"))
    for key, message in (
        (tmp_path / "missing", "No such file"),
        (tmp_path / "empty", "can't be signed"),
        (keys[1], "can't be signed"),
        (encrypted, "is encrypted"),
    ):
        with pytest.raises(tfhalf.ExportError, match=message):
            signing.sign(copy, key)
    assert sorted(copy.rglob("*")) == before
    signing.sign(copy, keys[0])
    refused(copy, tmp_path / "missing", "is no file")
    refused(copy, tmp_path / "empty", "signature doesn't hold")
    refused(copy, keys[0], "signature doesn't hold")


def test_without_the_package_the_extra_is_named(copy):
    code = (
        "import sys; sys.modules['model_signing'] = None\n"
        "import tfhalf\n"
        f"try: tfhalf.bundle.check({str(copy)!r}, require_signature='key.pub')\n"
        "except tfhalf.ExportError as error: print(error)\n"
        f"tfhalf.bundle.check({str(copy)!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'tfhalf[sign]'" in result.stdout
