"""The program that signs, as a user runs it."""

import shutil
import subprocess

import pytest

import tfhalf
from tests.conftest import run_module


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl isn't installed")
def test_keys_by_openssl_sign_and_check(copy, tmp_path):
    key, public = tmp_path / "key.pem", tmp_path / "key.pub"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key], check=True)
    subprocess.run(["openssl", "ec", "-in", key, "-pubout", "-out", public], check=True, capture_output=True)
    result = run_module("apps.sign", f"--saved_model={copy}", f"--private_key={key}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(f"signed: {copy}/assets.extra/model.sig\n")
    tfhalf.bundle.check(copy, public)
    (copy / "fingerprint.pb").write_bytes(b"")
    result = run_module("apps.sign", f"--saved_model={copy}", f"--private_key={key}")
    assert result.returncode == 1
    assert "fingerprint.pb isn't the file that was exported" in result.stderr
    assert "Traceback" not in result.stderr
