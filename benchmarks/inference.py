"""One forward pass of a reference network: tfhalf beside what a user would pick instead.

    python -m benchmarks.inference --network=resnet

Stock Keras in each policy, tfhalf in each, TensorFlow's own rewriting to bfloat16, PyTorch, and PyTorch compiled
(`pip install 'tfhalf[bench]'`); how is told in `benchmarks/comparison.py`. Run it on a quiet machine.
"""

import sys

from absl import app, flags

from benchmarks import comparison

if __name__ == "__main__":
    comparison.define_flags(flags.FLAGS)
    app.run(lambda argv: sys.exit(comparison.main("inference")))
