"""tfhalf: half-precision training and serving with Keras that is right, fast and proven."""

from tfhalf.acceleration import accelerate, accelerate_optimizer, decelerate, left_alone
from tfhalf.bundle import ExportError, Manifest, load_saved_model, verify
from tfhalf.bundle_watch import watch_saved_model
from tfhalf.choice import Choice, choose_precision
from tfhalf.clearance import range_clearance
from tfhalf.comparison import compare
from tfhalf.compilation import compile_model
from tfhalf.equivalence import Verdict, parity
from tfhalf.export import export_saved_model
from tfhalf.hardware import inspect_hardware
from tfhalf.hazards import Finding, audit
from tfhalf.numerics import Monitor
from tfhalf.optimizer import LossScaleOptimizer
from tfhalf.precision import PrecisionPlan
from tfhalf.scale_window import loss_scale_window
from tfhalf.search import search_precision
from tfhalf.training import StopWhenStalled
from tfhalf.workload import coverage

__version__ = "0.1.0"
__all__ = [
    "Choice",
    "ExportError",
    "Finding",
    "LossScaleOptimizer",
    "Manifest",
    "Monitor",
    "PrecisionPlan",
    "StopWhenStalled",
    "Verdict",
    "accelerate",
    "accelerate_optimizer",
    "audit",
    "choose_precision",
    "compare",
    "compile_model",
    "coverage",
    "decelerate",
    "export_saved_model",
    "inspect_hardware",
    "left_alone",
    "load_saved_model",
    "loss_scale_window",
    "parity",
    "range_clearance",
    "search_precision",
    "verify",
    "watch_saved_model",
]
