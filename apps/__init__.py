"""Programs on top of tfhalf: `python -m apps.<area>.<task> --help`."""

import os

# TensorFlow's C++ side speaks of missing GPUs on every start; its errors still come as exceptions.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
