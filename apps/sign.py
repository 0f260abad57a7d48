"""Signs a bundle, so that a server can ask for the signature before it loads one.

    openssl ecparam -name prime256v1 -genkey -noout -out key.pem     # once; keep it to yourself
    openssl ec -in key.pem -pubout -out key.pub                      # for everyone who checks
    python -m apps.sign --saved_model=saved_models/image_classification_mnist_5k/1 --private_key=key.pem

The bundle is verified first, as `tfhalf.verify` does: what answers otherwise than its training model isn't signed. The
signature is `assets.extra/model.sig`. Who has the public key asks for it: `tfhalf.verify(folder,
require_signature="key.pub")`.

Training doesn't sign: a machine that trains needs no key, and who signs has looked at what was published.
"""

import sys

from absl import app, flags, logging

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
    define_flags(flags.FLAGS)
    logging.set_verbosity(logging.WARNING)
    app.run(lambda argv: sys.exit(runner.exit_code(_run, argv)))


def _run(argv: list[str]) -> None:
    if len(argv) > 1:
        raise runner.AppError(f"unexpected argument {argv[1]!r}: every setting is a --flag=value")
    values = flags.FLAGS
    runner.say("verifying in a fresh process")
    tfhalf.verify(values.saved_model)
    runner.say(f"signed: {signing.sign(values.saved_model, values.private_key)}")


if __name__ == "__main__":
    main()
