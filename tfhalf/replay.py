"""Runs every signature of a SavedModel on sample inputs, in a process that has TensorFlow and nothing of ours.

`tfhalf.export` starts this file by its path: what comes out is what any server would answer.

    python replay.py SAVED_MODEL_FOLDER INPUTS.npz OUTPUTS.npz

INPUTS holds an array "inputs/<name>" for each input of any signature; OUTPUTS gets an array "<signature>/<name>" for
each output. Strings are byte strings of a fixed width, because pickles aren't loaded.
"""

import sys

import numpy as np


def main(folder: str, inputs_path: str, outputs_path: str) -> None:
    """Loads, runs, writes."""
    sys.modules["keras"] = None  # no server has it, and TensorFlow imports it where it is: half the time of its start
    import tensorflow as tf

    loaded = tf.saved_model.load(folder)
    with np.load(inputs_path, allow_pickle=False) as file:
        inputs = {name.removeprefix("inputs/"): tf.constant(array) for name, array in file.items()}
    outputs = {
        f"{signature}/{name}": tensor.numpy().astype("S") if tensor.dtype == tf.string else tensor.numpy()
        for signature, function in loaded.signatures.items()
        for name, tensor in function(**{name: inputs[name] for name in function.structured_input_signature[1]}).items()
    }
    np.savez(outputs_path, **outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
