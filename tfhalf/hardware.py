"""What this machine computes natively, what TensorFlow uses of it, and what rates are reached, on one page.

    print(tfhalf.inspect_hardware())

What TensorFlow uses is not deduced but looked at: a graph of a product, a convolution and its filter gradient is run
once in each dtype, and the operations that TensorFlow made of it are read. Those that oneDNN computes are called
`_Mkl...`. Rates are measured in turn, round by round, within a bound on time: medians, of TensorFlow's own operations
and of tfhalf's kernels (`tfhalf.kernels`), which a model gets by `tfhalf.accelerate`.

It says what the machine can do; which policy is fastest for a model is `tfhalf.choose_precision`'s to measure.

Source for GPUs: tensor cores multiply float16 from compute capability 7.0 on, bfloat16 from 8.0 on (NVIDIA, CUDA C++
Programming Guide, "Compute Capabilities").
"""

import dataclasses
import functools
import os
import statistics
import textwrap
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfhalf import kernels, processor
from tfhalf.precision import HALF_DTYPES

DTYPES = ("float32", *HALF_DTYPES)
PRODUCT, CONVOLUTION, FILTER_GRADIENT, MEMORY = "matrix product", "3x3 convolution", "its filter gradient", "memory"
STOCK, OURS = "TensorFlow", "tfhalf"
# Compute capabilities from which tensor cores multiply a dtype.
_TENSOR_CORES = {"float16": (7, 0), "bfloat16": (8, 0)}
# Side of the matrices, and batch, side and channels of the pictures: enough work to hide a call's overhead.
_SIZES = {"CPU": (1024, (4, 56, 64)), "accelerator": (8192, (64, 56, 256))}
_NUMBERS = 2**24  # that are added in memory: twice 64 MiB in float32, more than most caches hold
_WIDTH = 110  # of the page
_FASTER = 1.1  # a rate this many times float32's is called faster


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A GPU or TPU.

    Attributes:
        kind: "GPU" or "TPU".
        name: as its driver calls it.
        compute_capability: of NVIDIA's GPUs, as (8, 0); None where it isn't known.
    """

    kind: str
    name: str
    compute_capability: tuple[int, int] | None = None

    def multiplies(self, dtype: str) -> bool | None:
        """Returns whether its matrix units multiply in a half dtype; None: not known."""
        if self.kind == "TPU":
            return dtype == "bfloat16"
        return None if self.compute_capability is None else self.compute_capability >= _TENSOR_CORES[dtype]


@dataclasses.dataclass(frozen=True)
class Rate:
    """What one operation reaches in one dtype.

    Attributes:
        operation: PRODUCT, CONVOLUTION, FILTER_GRADIENT or MEMORY.
        dtype: as "float16".
        by: STOCK or OURS.
        giga: GFLOP/s; of MEMORY GB/s.
        rounds: whose median it is.
    """

    operation: str
    dtype: str
    by: str
    giga: float
    rounds: int


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A machine as it was found; `str()` of it is a page for people.

    Attributes:
        processor: its CPU.
        accelerators: GPUs and TPUs that TensorFlow sees.
        tensorflow: facts of TensorFlow here, by name.
        onednn: dtype to the operations that oneDNN computes on the CPU.
        rates: as measured; empty where it was only looked at.
    """

    processor: processor.Processor
    accelerators: tuple[Accelerator, ...]
    tensorflow: dict[str, str]
    onednn: dict[str, tuple[str, ...]]
    rates: tuple[Rate, ...] = ()

    def rate(self, operation: str, dtype: str, by: str) -> float | None:
        """Returns a measured rate, or None."""
        found = [one.giga for one in self.rates if (one.operation, one.dtype, one.by) == (operation, dtype, by)]
        return found[0] if found else None

    @property
    def native(self) -> dict[str, str]:
        """Half dtype to what multiplies it here, in plain words; "" where nothing is known to."""
        told = {}
        for dtype in HALF_DTYPES:
            units = [one.name for one in self.accelerators if one.multiplies(dtype)]
            told[dtype] = ", ".join(units if self.accelerators else self.processor.multiplies(dtype))
        return told

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        cpu = self.processor
        lines = [f"CPU        {cpu.name}, {cpu.architecture}, {cpu.cores} cores for this process"]
        lines.append(f"           instructions: {', '.join(cpu.instructions) or 'none known'}")
        for one in self.accelerators:
            capability = one.compute_capability and ".".join(map(str, one.compute_capability))
            lines.append(f"{one.kind}        {one.name}, compute capability {capability or 'not known'}")
        if not self.accelerators:
            lines.append("GPU, TPU   none that TensorFlow sees")
        lines += [f"{name:10} {value}" for name, value in self.tensorflow.items()]
        used = [f"{dtype}: {', '.join(operations) or 'nothing'}" for dtype, operations in self.onednn.items()]
        told = "oneDNN     computes, on the CPU, " + "; ".join(used)
        lines += [textwrap.fill(told, _WIDTH, subsequent_indent=" " * 11), "", *self._table()]
        lines += [textwrap.fill(f"* {each}", _WIDTH, subsequent_indent="  ") for each in advise(self)]
        return "\n".join(lines)

    def _table(self) -> list[str]:
        if not self.rates:
            return []
        lines = [f"{'measured, GFLOP/s':30}" + "".join(f"{dtype:>10}" for dtype in DTYPES)]
        for operation in (PRODUCT, CONVOLUTION, FILTER_GRADIENT, MEMORY):
            for by in (STOCK, OURS):
                rates = [self.rate(operation, dtype, by) for dtype in DTYPES]
                if any(rate is not None for rate in rates):
                    name = "memory, GB/s" if operation == MEMORY else f"{operation}, {by}"
                    lines.append(f"{name:30}" + "".join("         -" if r is None else f"{r:10.1f}" for r in rates))
        return [*lines, ""]


def inspect_hardware(seconds: float = 5.0) -> Hardware:
    """Looks at this machine, and measures its rates.

    Args:
        seconds: bound on the time for measuring, about; 0: nothing is measured. Each rate gets one round anyway.

    Returns:
        A `Hardware`, whose `str()` is one page.

    Raises:
        ValueError: `seconds` is negative.
    """
    if not seconds >= 0:
        raise ValueError(f"inspect_hardware: seconds must be 0 or more, got {seconds}")
    found = Hardware(processor.this(), _accelerators(), _tensorflow(), _onednn())
    return dataclasses.replace(found, rates=_rates(seconds)) if seconds else found


def advise(found: Hardware) -> list[str]:
    """Returns what follows for half precision, in plain words."""
    lines = [_about_accelerator(one) for one in found.accelerators] or _about_processor(found)
    for dtype in HALF_DTYPES:
        told = []
        for operation in (PRODUCT, CONVOLUTION, FILTER_GRADIENT):
            half, full = found.rate(operation, dtype, OURS), found.rate(operation, "float32", STOCK)
            told += [f"{operation} {half / full:.2f}"] if half and full else []
        if told:
            lines.append(f"Measured with tfhalf's kernels, {dtype} reaches of float32's rate: {', '.join(told)}.")
        stock, ours = (found.rate(FILTER_GRADIENT, dtype, by) for by in (STOCK, OURS))
        if stock and ours and ours > 1.5 * stock:
            lines.append(
                f"TensorFlow's own {dtype} filter gradient reaches {stock:.0f} GFLOP/s, tfhalf's {ours:.0f}: use "
                "tfhalf.accelerate (the apps do) wherever half precision is trained here."
            )
    lines.append("Which policy is fastest for a model is measured by tfhalf.choose_precision, or --dtype_policy=auto.")
    return lines


def _about_accelerator(one: Accelerator) -> str:
    half, brain = one.multiplies("float16"), one.multiplies("bfloat16")
    if one.kind == "TPU":
        return f"{one.name}: its matrix units compute in bfloat16: use mixed_bfloat16."
    if half is None:
        return f"{one.name}: its compute capability isn't known; measure before you choose."
    if not half:
        return f"{one.name} has no tensor cores: half precision saves memory, but is hardly faster."
    both = "float16 and bfloat16" if brain else "float16, but not bfloat16: use mixed_float16"
    return f"{one.name}: tensor cores multiply {both}; they are full at sizes that are multiples of 8."


def _about_processor(found: Hardware) -> list[str]:
    cpu, lines = found.processor, []
    native = [dtype for dtype in HALF_DTYPES if cpu.multiplies(dtype)]
    reached = [dtype for dtype in HALF_DTYPES if _is_faster(found, dtype)]
    if not native and not reached:
        converts = " (it converts float16 in hardware, F16C)" if "f16c" in cpu.instructions else ""
        lines.append(
            f"This CPU has no half arithmetic{converts}: mixed_float16 saves memory and debugs a GPU's numerics, but "
            "isn't faster than float32; nor is mixed_bfloat16."
        )
    for dtype in native:
        used = found.onednn.get(dtype, ())
        how = "TensorFlow uses them by oneDNN" if used else "but TensorFlow doesn't use them by oneDNN"
        lines.append(f"This CPU multiplies {dtype} ({', '.join(cpu.multiplies(dtype))}), {how}.")
    if "float16" not in native and native:
        lines.append("float16 is computed in float32 here and rounded: it debugs a GPU's numerics, but isn't faster.")
    if not found.onednn.get("float32"):
        lines.append(
            "TensorFlow doesn't use oneDNN here, which may be faster: set the environment variable "
            "TF_ENABLE_ONEDNN_OPTS=1, and measure again. Left alone it is off on some CPUs."
        )
    return lines


def _is_faster(found: Hardware, dtype: str) -> bool:
    pairs = [(found.rate(kind, dtype, OURS), found.rate(kind, "float32", STOCK)) for kind in (PRODUCT, CONVOLUTION)]
    return any(half and full and half > _FASTER * full for half, full in pairs)


def _accelerators() -> tuple[Accelerator, ...]:
    found = []
    for device in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(device)
        found.append(Accelerator("GPU", details.get("device_name", device.name), details.get("compute_capability")))
    return (*found, *(Accelerator("TPU", device.name) for device in tf.config.list_logical_devices("TPU")))


def _tensorflow() -> dict[str, str]:
    build = tf.sysconfig.get_build_info()
    cuda = f"CUDA {build.get('cuda_version')}" if build.get("is_cuda_build") else "no CUDA"
    setting = os.environ.get("TF_ENABLE_ONEDNN_OPTS")
    threading = tf.config.threading
    threads = threading.get_intra_op_parallelism_threads(), threading.get_inter_op_parallelism_threads()
    within, among = (str(number or "one for each core") for number in threads)
    return {
        "TensorFlow": f"{tf.__version__}, built for {cuda}; TF_ENABLE_ONEDNN_OPTS {setting or 'not set'}",
        "threads": f"{within} within an operation, {among} among operations",
    }


@functools.cache
def _onednn() -> dict[str, tuple[str, ...]]:
    """Runs three operations in each dtype on the CPU, and reads what TensorFlow made of them."""
    names = {"product": PRODUCT, "convolution": CONVOLUTION, "gradient": FILTER_GRADIENT}
    found = {}
    for dtype in DTYPES:
        with tf.Graph().as_default(), tf.device("CPU:0"):
            a = tf.compat.v1.placeholder(dtype, [64, 64])
            x, kernel = tf.reshape(a, [1, 16, 16, 16]), tf.reshape(a[:36], [3, 3, 16, 16])
            settings = {"strides": [1, 1, 1, 1], "padding": "SAME"}
            product = tf.raw_ops.MatMul(a=a, b=a, name="product")
            convolved = tf.raw_ops.Conv2D(input=x, filter=kernel, **settings, name="convolution")
            gradient = tf.raw_ops.Conv2DBackpropFilter(
                input=x, filter_sizes=[3, 3, 16, 16], out_backprop=convolved, **settings, name="gradient"
            )
            made = tf.compat.v1.RunMetadata()
            with tf.compat.v1.Session(config=tf.compat.v1.ConfigProto(device_count={"GPU": 0})) as session:
                options = tf.compat.v1.RunOptions(output_partition_graphs=True)
                session.run([product, convolved, gradient], {a: np.ones([64, 64])}, options=options, run_metadata=made)
        kinds = {node.name: node.op for graph in made.partition_graphs for node in graph.node}
        found[dtype] = tuple(told for name, told in names.items() if kinds.get(name, "").startswith("_Mkl"))
    return found


def _rates(seconds: float) -> tuple[Rate, ...]:
    """Measures every operation in every dtype, in turn, until the time is over."""
    todo = _operations()
    taken: dict[tuple, list[float]] = {key: [] for key in todo}
    for run, _ in todo.values():
        run()  # traces
    end = time.perf_counter() + seconds
    turn = 0
    while turn == 0 or time.perf_counter() < end:
        order = list(todo) if turn % 2 == 0 else list(todo)[::-1]
        for key in order:
            # The slow ones make way for the others: each gets an equal share of the time, and one round at least.
            if taken[key] and sum(taken[key]) > 2 * seconds / len(todo):
                continue
            start = time.perf_counter()
            todo[key][0]()
            taken[key].append(time.perf_counter() - start)
        turn += 1
    return tuple(Rate(*key, todo[key][1] / statistics.median(times) / 1e9, len(times)) for key, times in taken.items())


def _operations() -> dict[tuple[str, str, str], tuple[Callable[[], None], float]]:
    """(operation, dtype, by) to a function that runs it once and waits, and its work in FLOP or bytes."""
    side, (batch, pixels, channels) = _SIZES["accelerator" if kernels.on_accelerator() else "CPU"]
    random = np.random.default_rng(0)
    todo = {}

    def add(key: tuple[str, str, str], function: Callable[..., tf.Tensor], work: float, *tensors: tf.Tensor) -> None:
        specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tensors]
        traced = tf.function(function, autograph=False).get_concrete_function(*specs)

        def run():
            traced(*tensors)
            tf.test.experimental.sync_devices()

        todo[key] = run, work

    def same(x, kernel):
        return tf.nn.conv2d(x, kernel, 1, "SAME")

    def gradient_of(convolve):
        def gradient(x, kernel, upstream):
            with tf.GradientTape() as tape:
                tape.watch(kernel)
                result = convolve(x, kernel)
            return tape.gradient(result, kernel, upstream)

        return gradient

    def adding_to(total):  # in place: fresh memory would be measured as the operating system's work
        def accumulate(more):
            total.assign_add(more)

        return accumulate

    for dtype in DTYPES:

        def some(*shape, dtype=dtype):
            return tf.cast(random.normal(size=shape).astype("float32"), dtype)

        a, x, kernel = some(side, side), some(batch, pixels, pixels, channels), some(3, 3, channels, channels)
        flop = 2.0 * 9 * batch * pixels**2 * channels**2
        ours = functools.partial(kernels.convolution, same, same=True)
        for by, multiply, convolve in ((STOCK, tf.matmul, same), (OURS, kernels.matmul, ours)):
            if by == OURS and dtype == "float32":
                continue  # the same operations
            add((PRODUCT, dtype, by), multiply, 2.0 * side**3, a, a)
            add((CONVOLUTION, dtype, by), convolve, flop, x, kernel)
            add((FILTER_GRADIENT, dtype, by), gradient_of(convolve), flop, x, kernel, x)
        more = tf.zeros([_NUMBERS], dtype)
        add((MEMORY, dtype, STOCK), adding_to(tf.Variable(more)), 3.0 * _NUMBERS * more.dtype.size, more)
    return todo
