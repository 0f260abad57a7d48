"""tfhalf: half-precision training and serving with Keras that is right, fast and proven."""

from tfhalf.bundle import ExportError, Manifest, load_saved_model, verify
from tfhalf.compilation import compile_model
from tfhalf.export import export_saved_model
from tfhalf.optimizer import LossScaleOptimizer
from tfhalf.precision import PrecisionPlan, coverage
from tfhalf.training import StopWhenStalled

__version__ = "0.1.0"
__all__ = [
    "ExportError",
    "LossScaleOptimizer",
    "Manifest",
    "PrecisionPlan",
    "StopWhenStalled",
    "compile_model",
    "coverage",
    "export_saved_model",
    "load_saved_model",
    "verify",
]
