"""Signatures of bundles: who published this? A bundle's hashes tell whether it is whole, and can be made by anybody.

`model-signing` signs all files of a version folder, the manifest among them, with a private key of an elliptic curve,
into `assets.extra/model.sig`: it travels with the folder, TensorFlow Serving never looks there, and the package's own
program reads it too:

    python -m model_signing verify key --public_key=key.pub --signature=1/assets.extra/model.sig 1

A signature says whose key signed these files. It doesn't say which model they are, nor that they are the newest.

Source: https://github.com/sigstore/model-transparency
"""

import os
import uuid
from pathlib import Path

from tfhalf.manifest import SIGNATURE, ExportError


def sign(directory: str | os.PathLike, private_key: str | os.PathLike) -> Path:
    """Signs a bundle as it is; check it first.

    Args:
        directory: the version folder. A signature that is there is replaced.
        private_key: file with an elliptic curve's private key in PEM (P-256, P-384 or P-521), not encrypted.

    Returns:
        The signature's file.

    Raises:
        ExportError: the key can't be used, or the folder can't be signed or written.
    """
    model_signing, directory = _library(), Path(directory).resolve()
    target = directory / SIGNATURE
    # Beside the folder and then moved, so that nobody ever sees half of it.
    beside = directory.parent / f".signature-{uuid.uuid4().hex[:8]}"
    try:
        if b"ENCRYPTED" in Path(private_key).read_bytes():
            raise ValueError(f"{private_key} is encrypted; model-signing takes keys without a password only")
        signing = model_signing.signing.Config().use_elliptic_key_signer(private_key=private_key)
        signing.set_hashing_config(_all_files(model_signing)).sign(directory, beside)
        os.replace(beside, target)
    except (OSError, ValueError) as error:
        raise ExportError(f"{directory} can't be signed: {error}") from error
    finally:
        beside.unlink(missing_ok=True)
    return target


def check_signature(directory: str | os.PathLike, public_key: str | os.PathLike) -> None:
    """Checks that the key's owner signed a bundle, and that no file was changed, added or removed since.

    Args:
        directory: the version folder.
        public_key: file with the public key in PEM.

    Raises:
        ExportError: there is no signature, it is another key's, or the files differ from what was signed.
    """
    model_signing, directory, public_key = _library(), Path(directory).resolve(), Path(public_key)
    if not public_key.is_file():
        raise ExportError(f"{public_key} is no file: a signature is checked with the public key's, in PEM")
    if not (directory / SIGNATURE).is_file():
        raise ExportError(f"{directory} isn't signed: it has no {SIGNATURE}; sign it, or get it from who did")
    try:
        checking = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        checking.set_hashing_config(_all_files(model_signing)).verify(directory, directory / SIGNATURE)
    except Exception as error:  # whatever is wrong with the key, the signature or a file: nobody vouches for the bundle
        reason = str(error) or type(error).__name__
        raise ExportError(f"{directory}: its signature doesn't hold for {public_key.name}: {reason}") from error


def _library():
    try:
        import model_signing
    except ImportError as error:
        raise ExportError(f"signatures need model-signing ({error}): pip install 'tfhalf[sign]'") from error
    return model_signing


def _all_files(model_signing):
    return model_signing.hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
