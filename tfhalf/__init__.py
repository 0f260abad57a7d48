"""tfhalf: half-precision training and serving with Keras that is right, fast and proven."""

from tfhalf.acceleration import accelerate, accelerate_optimizer, decelerate, left_alone
from tfhalf.bundle import ExportError, Manifest, load_saved_model, verify
from tfhalf.bundle_watch import watch_saved_model
from tfhalf.comparison import compare
from tfhalf.compilation import compile_model
from tfhalf.export import export_saved_model
from tfhalf.hazards import Finding, audit
from tfhalf.numerics import Monitor
from tfhalf.optimizer import LossScaleOptimizer
from tfhalf.precision import PrecisionPlan
from tfhalf.scale_window import loss_scale_window
from tfhalf.training import StopWhenStalled
from tfhalf.workload import coverage

__version__ = "0.1.0"
__all__ = [
    "ExportError",
    "Finding",
    "LossScaleOptimizer",
    "Manifest",
    "Monitor",
    "PrecisionPlan",
    "StopWhenStalled",
    "accelerate",
    "accelerate_optimizer",
    "audit",
    "compare",
    "compile_model",
    "coverage",
    "decelerate",
    "export_saved_model",
    "left_alone",
    "load_saved_model",
    "loss_scale_window",
    "verify",
    "watch_saved_model",
]
