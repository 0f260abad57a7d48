"""Hazards of half precision that can be seen before the first step.

`audit` looks at what a model is made of, at the operations of one traced forward pass, and, where a sample is given,
at the numbers of that pass. A rule decides mechanically or says nothing. Whether half precision is to blame is asked of
the same model in float32 (`precision.computing_in`): a constant that is 0, or a pass that fails or overflows, counts
only if it doesn't there. "error" is what is wrong or breaks in any case, "warning" what is wrong for some data or some
steps, "info" what costs time only.

| rule | what it sees | severity | by |
|---|---|---|---|
| half_output | an output of the model in half | error | trace |
| half_variables | weights that are trained in half: no master weights | error | layers |
| no_loss_scaling | compiled, float16 layers with trained weights, an optimizer that scales nothing | error | layers |
| keras_loss_scaling | Keras' LossScaleOptimizer; an error on several replicas | warning | layers |
| ignored_setting | clipping and the like, set on Keras' LossScaleOptimizer, which ignores it | error | layers |
| unguarded_statistics | moving statistics that a skipped step turns into NaN | warning | layers |
| half_loss | a half loss that a layer adds; an error once Keras compiled it | warning | trace |
| ignored_policy_map | a `DTypePolicyMap` names a layer, and the layer doesn't know | warning | layers |
| normalization_range | `Normalization` whose mean or variance half can't hold, or rounds | error, warning | layers |
| non_finite_weights | NaN or infinite weights | error, warning | weights |
| storage_overflow | weights over 65504; an error where the layer reads them in float16 | warning | weights |
| storage_underflow | a weight that float16 changes by over 10% of its norm | warning | weights |
| vanishing_constant | a constant that is 0 in half: a factor, or what guards a division or root | warning | trace |
| overflowing_constant | a constant that is infinite in half, as -1e9; an error times a mask | error, warning | trace |
| float_ids | indices that were half numbers, into a table with more rows than half counts | error | trace |
| rounded_positions | positions of which several are the same number in half | warning | trace |
| sum_of_squares | squares summed in float16, as by `UnitNormalization`: infinite from a norm of 256 | warning | trace |
| large_reduction | sums, average pooling, scalar products over many terms in half | warning | trace |
| attention_mask | `Attention` with a mask in float16: NaN where a row is masked as a whole | warning | trace |
| missing_kernel | an operation without a half kernel on this CPU; a warning where XLA runs it | error | trace |
| fails_in_half | a forward pass that raises in half and not in float32 | error | trace, sample |
| forward_overflow | non-finite numbers that are finite in float32; an error in the outputs | error, warning | sample |
| bfloat16_bias | a bias whose gradient a CPU sums over many rows in bfloat16 | warning | trace |
| ignored_policy | a half layer whose products run in float32 | info | trace |
| slow_on_cpu | float16 operations that a CPU is slow at, without kernels | info | trace |
| tensor_cores | units or filters that are no multiple of 8 | info | layers |

What it can't see: what a custom `train_step` does, how large numbers become later, whether half is as accurate as
float32 (that is measured, not audited), operations inside functions and loops that hold no layer.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf
from keras.dtype_policies import DTypePolicyMap

from tfhalf import bundle, compilation, kernels, precision
from tfhalf.evidence import (
    Evidence,
    accelerated,
    guarded_operation,
    half_source,
    is_half,
    is_mask,
    num_distinct,
    num_pooled_terms,
    num_terms,
    rounded,
)

SEVERITIES = ("error", "warning", "info")
_MAX = precision.FORMATS["float16"].largest
_EXACT = {dtype: precision.FORMATS[dtype].exact for dtype in precision.HALF_DTYPES}
# Half as many equal terms as after which one more changes nothing; measured on a CPU: 1024 terms of 1.3 lose 2%.
_MANY_TERMS = {dtype: exact // 2 for dtype, exact in _EXACT.items()}
# Share of a norm. Rounding changes it by 2^-11 at most; a bias that starts at 1e-6 by 2%, which does no harm.
_STORAGE_TOLERANCE = 0.1
# Of a standard deviation: the step between neighbouring numbers at a feature's mean.
_STEP_TOLERANCE = 0.1
_TENSOR_CORE = 8  # NVIDIA, "Deep Learning Performance: Matrix Multiplication", section 2.1
_PRODUCTS = ("MatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum", "Conv2D", "Conv3D", "DepthwiseConv2dNative")
# Measured forward and backward on a CPU (Zen 4, 2 cores): depthwise 1.5 to 2.5, pooling 1.8 to 3.2, 3x3 2.8 to 5.9.
_SLOW = ("Conv2D", "Conv3D", "DepthwiseConv2dNative", "Conv2DBackpropInput", "Conv3DBackpropInputV2", "MaxPool",
         "LeakyRelu", "Elu")  # fmt: skip
_WITHOUT_EFFECT = ("clipnorm", "global_clipnorm", "clipvalue", "weight_decay", "use_ema", "loss_scale_factor")
_COMPILE = "tfhalf.compile_model"
_WITH_UNITS = (keras.layers.Dense, keras.layers.EinsumDense)
_WITH_UNITS += (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)

# What tfhalf.accelerate mends, of what these rules see.
_WITH_KERNELS = (
    *_WITH_UNITS,
    keras.layers.GlobalAveragePooling1D,
    *(getattr(keras.layers, f"{kind}Pooling{rank}D") for kind in ("Average", "Max") for rank in (1, 2, 3)),
)

Row = tuple[str, str, str, str]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One hazard.

    Attributes:
        rule: its name, a key of `RULES`.
        layer: path of the layer (`precision.layers_by_path`); "" for the model as a whole.
        severity: "error", "warning" or "info".
        message: what happens.
        fix: what to do.
    """

    rule: str
    layer: str
    severity: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.rule}: {self.layer or 'the model'}: {self.message} Fix: {self.fix}"


def audit(model: keras.Model, inputs=None) -> list[Finding]:
    """Finds what half precision will break in a model, before the first step.

    Weights and settings stay as they are; a layer that draws numbers in inference, or keeps a state, moves on by a call
    or two where there are inputs. Of a float32 model only the weights and the optimizer can have findings.

    Args:
        model: a built model, compiled or not, accelerated or not.
        inputs: sample batch, array or structure of arrays as the model takes it. Without it the model's own input
            shapes are traced with a batch of one, and rules that need numbers or lengths decide nothing.

    Returns:
        Findings, errors first, then in the order of `RULES` and of the layers.

    Raises:
        ValueError: the model isn't built.

    Example:

    >>> with precision.PrecisionPlan("mixed_float16").scope():
    ...     model = keras.Sequential([keras.Input([8]), keras.layers.Dense(16, name="head")])
    >>> for finding in audit(model):
    ...     print(finding.severity, finding.rule, finding.layer)
    error half_output head
    """
    if not model.built:
        raise ValueError(f"audit: model {model.name!r} isn't built; call it on a batch, or give it an Input, first")
    evidence = Evidence(model, inputs)
    found = [Finding(name, *row) for name, rule in RULES.items() for row in rule(evidence)]
    found = list(dict.fromkeys(found))  # a layer that is used twice is one finding
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def _keep_in_float32(path: str) -> str:
    """The fix that always helps."""
    if not path:
        return 'compute it in float32: cast its operands, or put it into a layer with dtype="float32"'
    return f'keep it in float32: PrecisionPlan(layers={{"{path}": "float32"}}).apply(model)'


def _accelerate_or_keep(layer: keras.Layer, path: str) -> str:
    """The fix for what a kernel does right, where there is one."""
    known = any(isinstance(layer, kind) and type(layer).call is kind.call for kind in _WITH_KERNELS)
    return ("tfhalf.accelerate(model), or " if known else "") + _keep_in_float32(path)


# Rules: each yields (path of the layer, severity, what happens, what to do)


def _half_output(evidence: Evidence) -> Iterator[Row]:
    owners = {id(op): path for path, operations in evidence.trace.operations.items() for op in operations}
    for output in evidence.trace.outputs:
        if is_half(output):
            path = owners.get(id(output.op), "")
            message = f"a model output is {output.dtype.name}, and so is its loss: a wrong sample may have no gradient"
            yield path, "error", message, _keep_in_float32(path)


def _half_variables(evidence: Evidence) -> Iterator[Row]:
    halves = [row for row in evidence.weights if row[2].trainable and row[2].dtype in precision.HALF_DTYPES]
    for path, (_, _, weight) in {row[0]: row for row in reversed(halves)}.items():
        step = 0.5 / _EXACT[weight.dtype]
        message = f"{weight.name} is stored in {weight.dtype}: training loses steps below {step:.1g} of a weight"
        yield path, "error", message, f'build the model under PrecisionPlan("mixed_{weight.dtype}").scope()'


def _no_loss_scaling(evidence: Evidence) -> Iterator[Row]:
    optimizer = evidence.optimizer
    if optimizer is None or isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or optimizer.loss_scale_factor:
        return
    if type(evidence.model).train_step is not keras.Model.train_step:
        return  # it may scale by itself
    for path, layer, weight in evidence.weights:
        if weight.trainable and layer.compute_dtype == "float16" and layer.autocast:
            who = path or weight.name
            message = f"{who} computes in float16 and nothing scales the loss: gradients below 2^-24 are 0"
            yield "", "error", message, f"compile with {_COMPILE}, or wrap the optimizer in tfhalf.LossScaleOptimizer"
            return


def _keras_loss_scaling(evidence: Evidence) -> Iterator[Row]:
    if not evidence.stock_scaling:
        return
    fix = f"give the optimizer inside it to {_COMPILE}"
    if (replicas := evidence.model.distribute_strategy.num_replicas_in_sync) > 1:
        message = f"it checks one of {replicas} replicas: an overflow in another one makes every weight NaN"
        yield "", "error", f"Keras' LossScaleOptimizer: {message}", fix
    else:
        message = "its scale has no bounds (from 0 weights become NaN, infinity never heals), and nothing tells of it"
        yield "", "warning", f"Keras' LossScaleOptimizer: {message}", fix


def _ignored_setting(evidence: Evidence) -> Iterator[Row]:
    optimizer = evidence.stock_scaling
    for name in _WITHOUT_EFFECT if optimizer else ():
        if value := getattr(optimizer, name, None):
            message = f"{name}={value} is set on Keras' LossScaleOptimizer, where it has no effect"
            yield "", "error", message, f"set {name} on the optimizer inside it"


def _unguarded_statistics(evidence: Evidence) -> Iterator[Row]:
    model = evidence.model
    own_step = "train_step" in vars(model) and not compilation.compiled_by_us(model)
    if own_step or type(model).train_step is not keras.Model.train_step:
        return  # it may take it back by itself
    if not isinstance(evidence.optimizer, keras.optimizers.LossScaleOptimizer) or compilation.takes_back(model):
        return
    for path, layer in evidence.halves("float16"):
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable:
            message = "a batch that overflows is skipped for the weights, but makes its moving statistics NaN"
            yield path, "warning", message, f"compile with {_COMPILE}, which takes that back"


def _half_loss(evidence: Evidence) -> Iterator[Row]:
    if compilation.compiled_by_us(evidence.model):
        return
    for path, dtype in evidence.trace.half_losses.items():
        message = f"it adds a {dtype} loss, which Keras can't add to the float32 one: fit ends in a TypeError"
        fix = f"compile with {_COMPILE}, or cast the added loss to float32"
        yield path, "error" if evidence.optimizer else "warning", message, fix


def _ignored_policy_map(evidence: Evidence) -> Iterator[Row]:
    paths = {layer.path for layer in evidence.layers.values()}
    for path, layer in evidence.layers.items():
        if not isinstance(policies := layer.dtype_policy, DTypePolicyMap) or not path:
            continue
        names = {path, f"{evidence.model.name}/{path}"}
        for key, policy in policies.items():
            taken = any(re.fullmatch(key, known) for known in paths if known)
            meant = names if taken else names | {layer.name}
            if policy.compute_dtype != layer.compute_dtype and any(re.fullmatch(key, name) for name in meant):
                told = f"the DTypePolicyMap says {policy.name} by {key!r}"
                message = f"{told}, the layer computes in {layer.compute_dtype}"
                fix = f'set it after building: PrecisionPlan(layers={{"{path}": "{policy.name}"}}).apply(model)'
                yield path, "warning", message, fix


def _normalization_range(evidence: Evidence) -> Iterator[Row]:
    fix = 'make the layer with dtype="float32": a policy that is set later leaves it these numbers'
    for path, layer in evidence.layers.items():
        if not isinstance(layer, keras.layers.Normalization) or layer.mean is None:
            continue
        given = (
            [layer.adapt_mean, layer.adapt_variance]
            if layer.input_mean is None
            else [layer.input_mean, layer.input_variance]
        )
        mean, variance = (np.asarray(each, "float32").ravel() for each in given)
        held = [rounded(each, layer.compute_dtype).ravel() for each in (layer.mean, layer.variance)]
        for name, value, kept in zip(("mean", "variance"), (mean, variance), held, strict=True):
            lost = np.isfinite(value) & (~np.isfinite(kept) | ((kept == 0) & (value != 0) & (name == "variance")))
            if lost.any():
                message = f"a feature's {name} of {value[lost][0]:.3g} became {kept[lost][0]:g}: its values are lost"
                yield path, "error", message, fix
        step = np.abs(mean) * 2 / _EXACT.get(layer.compute_dtype, math.inf) / np.sqrt(np.maximum(variance, 1e-14))
        if step.max(initial=0) > _STEP_TOLERANCE and np.isfinite(held).all():
            message = f"near its mean a feature is rounded to steps of {step.max():.2g} standard deviations"
            yield path, "warning", message, fix


def _non_finite_weights(evidence: Evidence) -> Iterator[Row]:
    for path, layer, weight, array in evidence.arrays:
        if count := int(np.sum(~np.isfinite(array))):
            certain = weight.trainable or isinstance(layer, keras.layers.BatchNormalization)
            message = f"{count:,} of {array.size:,} numbers in {weight.name} are NaN or infinite"
            yield path, "error" if certain else "warning", message, "load a checkpoint from before, and train again"


def _storage_overflow(evidence: Evidence) -> Iterator[Row]:
    for path, layer, weight, array in evidence.arrays:
        largest = float(np.max(np.abs(array), where=np.isfinite(array), initial=0))
        if np.isfinite(rounded(largest, "float16")):
            continue
        if layer.compute_dtype == "float16" and layer.autocast and not isinstance(layer, precision.NORMALIZATIONS):
            message = f"{weight.name} has {largest:.3g}, which is infinite where the layer reads it in float16"
            yield path, "error", message, _keep_in_float32(path)
        else:
            message = f"{weight.name} has {largest:.3g}: a file of float16 weights would hold infinity (over 65504)"
            yield path, "warning", message, "export with tfhalf.export_saved_model, which keeps it in float32"


def _storage_underflow(evidence: Evidence) -> Iterator[Row]:
    for path, _, weight, array in evidence.arrays:
        kept = rounded(array, "float16").astype("float64")
        norm = np.linalg.norm(array.astype("float64"))
        if np.isfinite(kept).all() and np.linalg.norm(kept - array) > _STORAGE_TOLERANCE * norm:
            zeros = f"{np.mean(kept[array != 0] == 0):.0%} of it would be stored as 0"
            message = f"{weight.name} is about as small as float16's step of 6e-8: {zeros}"
            yield path, "warning", message, "store it in float32, or scale the weight up and its output down"


def _vanishing_constant(evidence: Evidence) -> Iterator[Row]:
    for path, operation, value, other in evidence.constants:
        if value.any() or not other.all():
            continue
        dtype, what = operation.outputs[0].dtype.name, ""
        if operation.type == "Mul":
            what = "everything it multiplies is 0"
        elif operation.type in ("AddV2", "Maximum") and (kind := guarded_operation(operation.outputs[0])):
            what = f"it no longer keeps 0 away from {kind}"
        elif operation.type == "RealDiv" and operation.inputs[1].op.type == "Const":
            what = "everything it divides is infinite or NaN"
        if what:
            fix = f"use a larger constant (1e-3), or {_keep_in_float32(path)}"
            yield path, "warning", f"the constant {other.flat[0]:.3g} is 0 in {dtype}: {what}", fix


def _overflowing_constant(evidence: Evidence) -> Iterator[Row]:
    for path, operation, value, other in evidence.constants:
        rows = ~np.isfinite(value) & np.isfinite(other)
        # A clip to infinity clips nothing, as the number itself didn't; a row of a mask with a finite place is sound.
        if not np.all(rows, axis=-1).any() or operation.type in ("Maximum", "Minimum"):
            continue
        certain, what = False, "what it meets becomes infinite or NaN"
        if operation.type == "Mul" and rows.all() and any(map(is_mask, operation.inputs)):
            certain, what = True, "0 times that is NaN"
        elif operation.type == "RealDiv" and operation.inputs[1].op.type == "Const":
            what = "everything it divides is 0"
        elif "SelectV2" in (operation.type, *(each.type for each in operation.outputs[0].consumers())):
            what = "a row that is masked as a whole is NaN"
        dtype = operation.outputs[0].dtype.name
        message = f"the constant {other[rows].flat[0]:.3g} is {value[rows].flat[0]:g} in {dtype}"
        fix = f"use -3e4 for a mask, or {_keep_in_float32(path)}"
        yield path, "error" if certain else "warning", f"{message}: {what}", fix


def _float_ids(evidence: Evidence) -> Iterator[Row]:
    for path, operation in evidence.traced():
        if operation.type != "GatherV2" or not is_half(source := half_source(operation.inputs[1])):
            continue
        exact, axis = _EXACT[source.dtype.name], int(tf.get_static_value(operation.inputs[2]))
        rows = operation.inputs[0].shape[axis] or 0
        if rows > exact + 1:
            message = f"indices into {rows:,} rows come in {source.dtype.name}, which counts to {exact}: wrong rows"
            yield path, "error", message, "pass ids as int32, and past layers that compute in half"


def _rounded_positions(evidence: Evidence) -> Iterator[Row]:
    for path, operation in evidence.traced():
        if operation.type not in ("Cast", "Range") or not is_half(operation.outputs[0]):
            continue
        value = tf.get_static_value(operation.outputs[0])
        if operation.type == "Cast" and not operation.inputs[0].dtype.is_floating:
            count = num_distinct(tf.get_static_value(operation.inputs[0]))
        else:
            count = 0 if value is None or operation.type == "Cast" else value.size
        if count and value is not None and (kept := num_distinct(value)) < count:
            message = f"of {count:,} positions only {kept:,} differ in {value.dtype}"
            yield path, "warning", message, "compute positions in float32, and cast what is computed of them"


def _sum_of_squares(evidence: Evidence) -> Iterator[Row]:
    for path, operation in evidence.traced():
        squares = operation.inputs[0].op if operation.type == "Sum" else None
        if squares is None or not is_half(operation.inputs[0], "float16"):
            continue
        if squares.type == "Square" or (squares.type == "Mul" and squares.inputs[0] is squares.inputs[1]):
            message = "squares are summed in float16: infinite from a norm of 256 on (the root of 65504)"
            yield path, "warning", message, _keep_in_float32(path)


def _large_reduction(evidence: Evidence) -> Iterator[Row]:
    for path, operation in evidence.traced():
        dtype, terms = operation.outputs[0].dtype.name if operation.outputs else "", 0
        if operation.type == "Sum" and dtype == "float16" and operation.inputs[0].shape.rank is not None:
            axes = tf.get_static_value(operation.inputs[1])
            terms = 0 if axes is None else num_terms(operation.inputs[0], axes)
        elif operation.type in ("AvgPool", "AvgPool3D", "Einsum") and not kernels.on_accelerator():
            terms = num_pooled_terms(operation)
        if terms >= _MANY_TERMS.get(dtype, math.inf):
            message = f"{operation.type} adds {terms:,} terms in {dtype}: digits are lost"
            message += f", and it is infinite from a mean of {_MAX / terms:.0f} on" if dtype == "float16" else ""
            yield path, "warning", message, _accelerate_or_keep(evidence.layers[path], path)


def _attention_mask(evidence: Evidence) -> Iterator[Row]:
    for path, layer in evidence.halves("float16"):
        if not isinstance(layer, keras.layers.Attention):  # AdditiveAttention is one
            continue
        for arguments in evidence.trace.arguments.get(path, []):
            mask = arguments.get("mask")
            if isinstance(mask, list | tuple) and len(mask) > 1 and mask[1] is not None:
                what = "scores below -16 become -infinity (less 65504): NaN, or a NaN gradient"
                yield path, "warning", f"where all keys are masked, {what}", _keep_in_float32(path)


def _missing_kernel(evidence: Evidence) -> Iterator[Row]:
    in_xla = evidence.optimizer is not None and evidence.model.jit_compile
    for path, operation in evidence.without_kernel:
        message = f"{operation.type} has no half kernel on a CPU: the model doesn't run"
        fix = _accelerate_or_keep(evidence.layers[path], path)
        yield path, "warning" if in_xla else "error", message + (" without XLA" if in_xla else ""), fix


def _fails_in_half(evidence: Evidence) -> Iterator[Row]:
    for seen in (evidence.trace, evidence.run):
        if seen.error:
            path, error = seen.error
            message = f"the forward pass fails in half, not in float32: {bundle.first_line(error)}"
            yield path, "error", message, _keep_in_float32(path)
            return


def _forward_overflow(evidence: Evidence) -> Iterator[Row]:
    if not evidence.run.bad:
        return
    sound = set(evidence.run_twin.bad)  # -infinity may be meant
    for place in evidence.run.bad:
        if place not in sound:
            path, _, side = place
            spoilt = ("", 0, "output") in set(evidence.run.bad) - sound
            what = "gets numbers" if side == "input" else "computes numbers"
            message = f"it is the first that {what} that aren't finite in half and are in float32"
            message += "; the model's output isn't finite either" if spoilt else "; the model's output is finite"
            fix = f"scale what goes into it, or {_keep_in_float32(path)}"
            yield path, "error" if spoilt else "warning", message, fix
            return


def _bfloat16_bias(evidence: Evidence) -> Iterator[Row]:
    for path, operation in evidence.traced():
        if operation.type != "BiasAdd" or not is_half(operation.outputs[0], "bfloat16") or kernels.on_accelerator():
            continue
        rows = num_terms(operation.outputs[0], range(operation.outputs[0].shape.rank - 1))
        layer = evidence.layers[path]
        if rows > _EXACT["bfloat16"] and layer.trainable and not accelerated(layer):
            message = f"a CPU adds the bias gradient's {rows:,} rows in bfloat16: from 256 on they are lost"
            yield path, "warning", message, _accelerate_or_keep(layer, path)


def _ignored_policy(evidence: Evidence) -> Iterator[Row]:
    for path, layer in evidence.halves():
        operations = [each for each in evidence.trace.operations.get(path, []) if each.type in _PRODUCTS]
        dtypes = {each.outputs[0].dtype.name for each in operations}
        if dtypes == {"float32"} and not accelerated(layer):
            message = f"its products run in float32, although its policy is {layer.dtype_policy.name}"
            yield path, "info", message, "cast to self.compute_dtype in its call, or give it float32 to say so"


def _slow_on_cpu(evidence: Evidence) -> Iterator[Row]:
    for path, operation in evidence.traced():
        if operation.type in _SLOW and is_half(operation.outputs[0], "float16") and not kernels.on_accelerator():
            message = "a CPU without float16 arithmetic takes 1.5 to 6 times as long for it as in float32"
            yield path, "info", message, 'tfhalf.accelerate(model), or PrecisionPlan("mixed_bfloat16")'


def _tensor_cores(evidence: Evidence) -> Iterator[Row]:
    for path, layer in evidence.halves():
        if isinstance(layer, _WITH_UNITS) and (units := layer.kernel.shape[-1]) % _TENSOR_CORE:
            what = "no multiple of 8: a GPU's tensor cores are used badly or not at all"
            fix = f"use {math.ceil(units / _TENSOR_CORE) * _TENSOR_CORE}"
            yield path, "info", f"{units} units or filters are {what}", fix


RULES: dict[str, Callable[[Evidence], Iterator[Row]]] = {
    rule.__name__[1:]: rule
    for rule in (
        _half_output, _half_variables, _no_loss_scaling, _keras_loss_scaling, _ignored_setting, _unguarded_statistics,
        _half_loss, _ignored_policy_map, _normalization_range, _non_finite_weights, _storage_overflow,
        _storage_underflow, _vanishing_constant, _overflowing_constant, _float_ids, _rounded_positions,
        _sum_of_squares, _large_reduction, _attention_mask, _missing_kernel, _fails_in_half, _forward_overflow,
        _bfloat16_bias, _ignored_policy, _slow_on_cpu, _tensor_cores,
    )
}  # fmt: skip
