"""Programs on top of tfhalf: `python -m apps.<area>.<task> --help`."""

import os

# TensorFlow reports a missing GPU as an error on every start; what really fails still raises an exception.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
