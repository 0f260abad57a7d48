"""Signs a bundle, so that whoever loads it can ask for the signature first.

    openssl ecparam -name prime256v1 -genkey -noout -out key.pem     # once; keep it to yourself
    openssl ec -in key.pem -pubout -out key.pub                      # for everyone who checks
    python -m apps.sign --saved_model=saved_models/image_classification_mnist_5k/1 --private_key=key.pem

The bundle is verified first, as `tfhalf.verify` does: what answers otherwise than its training model isn't signed. The
signature is `assets.extra/model.sig`. Who has the public key asks for it: `tfhalf.verify(folder,
require_signature="key.pub")`.

Training doesn't sign: a machine that trains needs no key, and who signs has looked at what was published.
"""

from absl import flags

import tfhalf
from apps import runner
from tfhalf import signing


def define_flags(values: flags.FlagValues) -> None:
    """Defines this program's flags."""
    here = {"flag_values": values, "required": True}
    flags.DEFINE_string("saved_model", None, "Version folder of the bundle.", **here)
    key_help = "File with the private key in PEM, not encrypted: an elliptic curve's, P-256, P-384 or P-521."
    flags.DEFINE_string("private_key", None, key_help, **here)


def main() -> None:
    """Runs the program."""
    runner.start(define_flags, _run)


def _run(values: flags.FlagValues) -> None:
    runner.say("verifying in a fresh process")
    tfhalf.verify(values.saved_model)
    runner.say(f"signed: {signing.sign(values.saved_model, values.private_key)}")


if __name__ == "__main__":
    main()
