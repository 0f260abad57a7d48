"""The one sequence of every app: devices, data, model, train, evaluate, export, verify, report.

An app describes its task as a value, a `Task` of plain functions; the flags that all tasks share are defined here once.
The functions get the parsed flags as `options`, a namespace; nothing else reads flags.

The exported function is scored four times on the test part with the task's own metric: the trained model as it
computes, the same weights in float32, and both again from the artefact on disk. An artefact whose metric differs
from the trained model's by more than the task's margin isn't published.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import resource
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags, logging

import tfhalf
from apps import summary
from tfhalf import datasets, distribution, optimizer, precision, training

DIVERGED = 3  # the exit status of a run whose loss became non-finite
AUTO = "auto"
_NUM_SAMPLES, _SAMPLE_BYTES = 16, 2**22
_WARMUP_SHARE = 0.05
# Where things lie, how often they are saved and on how many devices doesn't change what a run is; the plan is compared
# by content.
_PATH_FLAGS = {"data_dir", "workdir", "saved_model_dir", "saved_model_name", "saved_model_version", "precision_plan"}
_MACHINE_FLAGS = {"keep", "checkpoint_seconds", "num_logical_devices", "monitor_every", "export", "explain"}

Call = Callable[..., dict[str, tf.Tensor]]
Decide = Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]]


class AppError(Exception):
    """Something that the user can mend; the message is all they need."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What a task's data set gives.

    Attributes:
        train: epoch (from 0) to its batches of (inputs, targets): a pure function of seed and epoch.
        steps_per_epoch: batches in one epoch.
        validation: batches of (inputs, targets) that epochs are compared on.
        test: batches of (named inputs of `serve`, labels).
        about: facts that build_model, serve and predict need, as class names; JSON values, written into the manifest.
        shown: what a task's `show` draws, where that isn't the first validation batch.
        resources: what `serve` uses beside the model, as a vocabulary's lookup tables: TensorFlow modules.
    """

    train: Callable[[int], tf.data.Dataset]
    steps_per_epoch: int
    validation: tf.data.Dataset
    test: tf.data.Dataset
    about: dict[str, Any]
    shown: tf.data.Dataset | None = None
    resources: tuple[tf.Module, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """A task as a value; `options` holds the parsed flags.

    Attributes:
        name: as "image_classification".
        define_flags: defines the task's own flags on a `flags.FlagValues`.
        defaults: values of the shared flags `dataset`, `batch_size`, `epochs` and `learning_rate`.
        load_data: options -> Data.
        build_model: options, data -> Keras model with float32 outputs; runs under the plan's scope.
        build_optimizer: options, number of steps in all -> Keras optimizer.
        build_loss: options -> Keras loss.
        build_metrics: options -> Keras metrics for training.
        monitor: the metric of validation that tells the best epoch, as "val_loss"; None: the last epoch is taken.
        serve: model, data -> (function of named inputs, its input signature).
        decide: model, data -> function of what `serve` returns that gives what clients get: the step after the last
            number, where a rounding may change sides, as suppressing boxes; several by what they add to the names of
            signatures, of which "" is scored; None where there is none.
        score: served function, data -> metrics over the test part; "total" is the number of what is right or wrong:
            pictures, objects, pixels.
        metric: the one of them that decides.
        margin: largest difference of that metric between the trained model and its artefact; 1 / total at least.
        describe: metrics -> the line that reports them.
        show: model, data -> PNG pictures and WAV sounds (bytes) and texts in Markdown (str) by tag, after each epoch.
        conclude: served function, data, folder -> the same at the end; writes examples for apps/predict.py.
        choose: options -> the task that they ask for, where an app has several; its defaults hold where a shared flag
            isn't given. None: this one.
        short: flags of a run of minutes that still learns, which apps/parity.py makes many of.
    """

    name: str
    define_flags: Callable[[flags.FlagValues], None]
    defaults: dict[str, Any]
    load_data: Callable[[types.SimpleNamespace], Data]
    build_model: Callable[[types.SimpleNamespace, Data], keras.Model]
    build_optimizer: Callable[[types.SimpleNamespace, int], keras.optimizers.Optimizer]
    build_loss: Callable[[types.SimpleNamespace], keras.losses.Loss]
    build_metrics: Callable[[types.SimpleNamespace], list[keras.metrics.Metric]]
    monitor: str | None
    serve: Callable[[keras.Model, Data], tuple[Call, dict[str, tf.TensorSpec]]]
    score: Callable[[Call, Data], dict[str, float]]
    metric: str
    margin: float
    describe: Callable[[dict[str, float]], str]
    show: Callable[[keras.Model, Data], dict[str, bytes | str]]
    conclude: Callable[[Call, Data, Path], dict[str, bytes | str]]
    decide: Callable[[keras.Model, Data], Decide | dict[str, Decide]] | None = None
    choose: Callable[[types.SimpleNamespace], "Task"] | None = None
    short: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def main(task: Task) -> None:
    """Runs an app: `if __name__ == "__main__": runner.main(TASK)`."""
    names: list[str] = []
    start(lambda values: names.extend(define_flags(task, values)), lambda values: run(task, options_of(values, names)))


def start(define_own: Callable[[flags.FlagValues], None], body: Callable[[flags.FlagValues], None]) -> None:
    """Runs a program of flags, and ends the process with its exit status.

    Args:
        define_own: defines its flags.
        body: is given the parsed flags.
    """
    define_own(flags.FLAGS)
    logging.set_verbosity(logging.WARNING)  # --verbosity=0 brings TFDS' own reports back

    def run_once(argv: list[str]) -> None:
        if len(argv) > 1:
            raise AppError(f"unexpected argument {argv[1]!r}: every setting is a --flag=value")
        body(flags.FLAGS)

    app.run(lambda argv: sys.exit(exit_code(run_once, argv)))


def define_flags(task: Task, values: flags.FlagValues) -> list[str]:
    """Defines the shared flags and the task's own; returns their names."""
    here, default, others = {"flag_values": values}, task.defaults, set(values)
    flags.DEFINE_string("dataset", default["dataset"], "Data set: a TFDS name, or one that a package carries.", **here)
    flags.DEFINE_string("data_dir", None, "Folder of data sets. Default: TFDS's, ~/tensorflow_datasets.", **here)
    policy_help = (
        "Keras dtype policy the model is built under. auto: the fastest one here, by a trial of about a minute, whose "
        "result is kept under ~/.cache/tfhalf; a run that is resumed keeps its own."
    )
    flags.DEFINE_enum("dtype_policy", "mixed_float16", [*precision.POLICIES, AUTO], policy_help, **here)
    flags.DEFINE_bool("explain", False, "With --dtype_policy=auto: print what the trial measured.", **here)
    flags.DEFINE_string(
        "precision_plan", None, "JSON file of a tfhalf.PrecisionPlan; instead of --dtype_policy.", **here
    )
    flags.DEFINE_float(
        "initial_scale",
        2.0**optimizer.FIRST_EXPONENT,
        f"First loss scale (float16), 2^{optimizer.LOWEST_EXPONENT} to 2^{optimizer.HIGHEST_EXPONENT}.",
        2.0**optimizer.LOWEST_EXPONENT,
        2.0**optimizer.HIGHEST_EXPONENT,
        **here,
    )
    growth_help = "Good steps in a row before the loss scale doubles (float16), 1 or more."
    flags.DEFINE_integer("dynamic_growth_steps", 2000, growth_help, 1, **here)
    flags.DEFINE_integer("batch_size", default["batch_size"], "Examples in a batch, 1 or more.", 1, **here)
    flags.DEFINE_integer("epochs", default["epochs"], "Passes over the training part, 1 or more.", 1, **here)
    flags.DEFINE_integer("steps_per_epoch", None, "Batches in an epoch, 1 or more. Default: all there are.", 1, **here)
    flags.DEFINE_float("learning_rate", default["learning_rate"], "Highest rate, above 0 to 10.", 1e-12, 10.0, **here)
    flags.DEFINE_integer("seed", 0, "Seed of weights, order and augmentation, 0 to 2^31-1.", 0, 2**31 - 1, **here)
    workdir_help = (
        "Folder of the run: checkpoints, TensorBoard, metrics.json. The same command resumes. Default: under runs/."
    )
    flags.DEFINE_string("workdir", None, workdir_help, **here)
    flags.DEFINE_string("saved_model_dir", "saved_models", "Folder that bundles are published in.", **here)
    flags.DEFINE_string("saved_model_name", None, "Name of the bundle. Default: <task>_<data set>.", **here)
    flags.DEFINE_integer("saved_model_version", None, "Version, 1 or more. Default: the next free one.", 1, **here)
    flags.DEFINE_integer("keep", 2, "Checkpoints that stay, 1 or more.", 1, **here)
    saving_help = "Seconds between checkpoints within an epoch, 0 or more; each epoch ends with one anyway."
    flags.DEFINE_float("checkpoint_seconds", 300.0, saving_help, 0.0, **here)
    accumulation_help = "Batches whose mean gradient makes one step, 1 or more."
    flags.DEFINE_integer("gradient_accumulation_steps", 1, accumulation_help, 1, **here)
    distribute_help = (
        "none: one device. mirrored: all GPUs of this machine. multi_worker: this process is one of the workers in the "
        "environment variable TF_CONFIG; python -m apps.launch starts some here. --batch_size is the sum of all parts."
    )
    flags.DEFINE_enum("distribute", "none", ["none", "mirrored", "multi_worker"], distribute_help, **here)
    logical_help = "Replicas on the CPU, 1 or more, to try --distribute=mirrored without GPUs."
    flags.DEFINE_integer("num_logical_devices", None, logical_help, 1, **here)
    flags.DEFINE_bool("deterministic", False, "The same numbers in every run, bit by bit; may be slower.", **here)
    accelerate_help = "Put tfhalf's kernels under the model: the same numbers within rounding, faster on a CPU."
    flags.DEFINE_bool("accelerate", True, accelerate_help, **here)
    monitor_help = (
        "Steps from one look at what half precision does in each layer to the next, for TensorBoard; and each skipped "
        "step is put down to the layer where it began. 0: none of it."
    )
    flags.DEFINE_integer("monitor_every", 0, monitor_help, 0, **here)
    export_help = "Export, verify and publish a bundle. --noexport: train and score only, without pictures too."
    flags.DEFINE_bool("export", True, export_help, **here)
    flags.DEFINE_bool("jit_compile", False, "Compile the training step with XLA; on one device.", **here)
    task.define_flags(values)
    names = sorted(set(values) - others)
    for name in names:  # so that --help shows them, though another module defined them
        values.register_key_flag_for_module(sys.argv[0], values[name])
    return names


def options_of(values: flags.FlagValues, names: list[str]) -> types.SimpleNamespace:
    """Returns the parsed flags as a namespace, with the plan in place of the two flags that say it.

    With --dtype_policy=auto the plan is None, until `resolve` has the data to choose it with.

    Raises:
        AppError: flags exclude each other, have no effect, or name a plan that can't be read.
    """
    options = types.SimpleNamespace(**{name: values[name].value for name in names})
    options.given = {name for name in names if values[name].present}
    for name in names:
        if isinstance(values[name].value, float) and not math.isfinite(values[name].value):
            raise AppError(f"--{name}={values[name].value} must be a finite number")
    if options.distribute != "none" and options.jit_compile:
        raise AppError(f"--jit_compile and --distribute={options.distribute} exclude each other; leave one out")
    is_auto = options.dtype_policy == AUTO
    if is_auto and options.distribute != "none":
        raise AppError(
            f"--dtype_policy=auto and --distribute={options.distribute} exclude each other: the trial is made on one "
            "device; try it with --distribute=none --explain, then name the policy"
        )
    if options.explain and not is_auto:
        raise AppError("--explain has an effect with --dtype_policy=auto only; leave it out")
    options.plan = None if is_auto else tfhalf.PrecisionPlan(options.dtype_policy)
    if options.precision_plan is not None:
        if values["dtype_policy"].present:
            raise AppError("--precision_plan and --dtype_policy exclude each other: the plan says the policy")
        try:
            options.plan = tfhalf.PrecisionPlan.load(options.precision_plan)
        except (OSError, ValueError) as error:
            raise AppError(f"--precision_plan={options.precision_plan}: {error}") from error
    ignored = sorted(options.given & {"initial_scale", "dynamic_growth_steps"})
    if ignored and not is_auto and not options.plan.needs_loss_scaling:
        raise AppError(f"--{ignored[0]} has no effect: nothing computes in float16; leave it out")
    unused = sorted(options.given & {"saved_model_dir", "saved_model_name", "saved_model_version"})
    if unused and not options.export:
        raise AppError(f"--{unused[0]} has no effect beside --noexport: nothing is published; leave one of the two out")
    return options


def exit_code(body: Callable[[list[str]], None], argv: list[str]) -> int:
    """Runs a program's body; turns what the user can mend into one line on stderr and an exit status."""
    try:
        body(argv)
    except training.DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return DIVERGED
    except (AppError, datasets.DatasetError, training.TrainingError, tfhalf.ExportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except distribution.DistributionError as error:
        print(f"error: --distribute: {error}", file=sys.stderr)
        return 1
    except tf.errors.OpError as error:
        print(f"error: TensorFlow stopped: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except training.InterruptedRun as error:
        print(error, file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("interrupted; nothing is half-published, the same command goes on", file=sys.stderr)
        return 130
    return 0


def run(task: Task, options: types.SimpleNamespace) -> tfhalf.Manifest | None:
    """The sequence. Returns the manifest of the bundle that it published, or None where it published none."""
    task, options = chosen(task, options)
    strategy = distribution.make_strategy(options.distribute, options.num_logical_devices)
    workers = distribution.Workers(strategy)
    if options.deterministic:
        tf.config.experimental.enable_op_determinism()
    config = _config(task, options)
    workers.check_same(config, "the flags")  # now: with other models they would wait for each other's variables
    name = options.saved_model_name or f"{task.name}_{options.dataset.replace('/', '_').replace(':', '_')}"
    workdir = Path(options.workdir or _default_workdir(name, options, config))
    data = load(task, options, workers.num_replicas)
    options = resolve(task, options, data, workdir)
    config = _config(task, options)
    with strategy.scope():
        model = build(task, options, data)
    measured = tfhalf.coverage(model, inputs=next(iter(data.train(0)))[0])  # a model's shapes may be open
    if workers.is_chief:
        if options.export:
            _version_folder(options, name)  # to be told now, not after hours of training
        for line in summary.introduction(task, options, model, measured, workers.num_replicas):
            say(line)
        say(f"workdir {workdir}")

    callbacks = []
    with contextlib.ExitStack() as closing:
        if options.monitor_every:
            callbacks.append(tfhalf.Monitor(workdir / "tensorboard" / "half_precision", options.monitor_every, say))
            closing.callback(callbacks[0].close)  # after an error too: it says where steps were skipped
        progress = training.fit(
            model,
            data.train,
            data.validation,
            workdir=workdir,
            epochs=options.epochs,
            steps_per_epoch=data.steps_per_epoch,
            monitor=task.monitor,
            config=config,
            keep=options.keep,
            checkpoint_seconds=options.checkpoint_seconds,
            show=(lambda model: task.show(model, data)) if options.export else None,
            report=say,
            callbacks=callbacks,
        )
    manifest = None
    if workers.is_chief:
        manifest = _conclude(task, options, name, config, workdir, data, model, measured, progress)
    workers.wait_for_all()  # a worker that leaves earlier would look like one that died
    return manifest


def chosen(task: Task, options: types.SimpleNamespace) -> tuple[Task, types.SimpleNamespace]:
    """Returns the task that the flags ask for, and the flags with its defaults."""
    if task.choose is None:
        return task, options
    task = task.choose(options)
    defaults = {name: value for name, value in task.defaults.items() if name not in options.given}
    return task, types.SimpleNamespace(**vars(options) | defaults)


def resolve(
    task: Task, options: types.SimpleNamespace, data: Data, workdir: Path | None = None
) -> types.SimpleNamespace:
    """Returns the flags with a plan, where --dtype_policy=auto leaves it open; says which, and why.

    It is the plan of the run in `workdir` where that has begun: today's choice could be another one.

    Raises:
        AppError: the model can be used in no policy.
        TrainingError: the run's checkpoints are all damaged.
    """
    if options.plan is not None:
        return options
    begun = training.settings_of(workdir) if workdir is not None else None
    if begun is not None and "plan" in begun:
        plan = tfhalf.PrecisionPlan.from_json(begun["plan"])
        say(f"dtype_policy auto: {plan.default} (that of the run in {workdir})")
        return types.SimpleNamespace(**vars(options) | {"plan": plan})

    def build_model() -> keras.Model:  # under the policy that is tried
        plan = tfhalf.PrecisionPlan(keras.config.dtype_policy().name)
        return build(task, types.SimpleNamespace(**vars(options) | {"plan": plan}), data)

    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "tfhalf"
    if options.deterministic:  # other kernels, other times
        folder /= "deterministic"
    try:
        choice = tfhalf.choose_precision(
            build_model, data.train(0), cache=folder, report=lambda line: say(f"dtype_policy auto: {line}")
        )
    except ValueError as error:
        raise AppError(f"--dtype_policy=auto: {error}") from error
    if options.explain:
        say(str(choice))
    because = "" if options.explain else f"{choice.reason}; "  # the table ends with it
    when = f"{'cached, ' if choice.is_cached else ''}measured {choice.measurements['created'][:10]}"
    say(f"dtype_policy auto: {choice.policy} ({because}{when})")
    return types.SimpleNamespace(**vars(options) | {"plan": tfhalf.PrecisionPlan(choice.policy)})


def load(task: Task, options: types.SimpleNamespace, num_replicas: int = 1) -> Data:
    """Loads a task's data, with as many steps an epoch as the flags say.

    Raises:
        AppError: a batch can't be shared out to the replicas, or there are fewer batches than asked for.
    """
    if options.batch_size % num_replicas:
        raise AppError(
            f"--batch_size={options.batch_size} is shared out to {num_replicas} replicas: it must be a multiple"
        )
    data = task.load_data(options)
    if options.steps_per_epoch is None:
        return data
    if options.steps_per_epoch > data.steps_per_epoch:
        raise AppError(
            f"--steps_per_epoch={options.steps_per_epoch} is more than the {data.steps_per_epoch} batches of "
            f"{options.dataset}; lower it or --batch_size"
        )
    return dataclasses.replace(data, steps_per_epoch=options.steps_per_epoch)


def _conclude(task, options, name, config, workdir, data, trained, measured, progress) -> tfhalf.Manifest | None:
    """Evaluates, exports, verifies and reports; or evaluates only."""
    model = trained
    if options.distribute != "none":
        # Scored and exported as on one device: a mirrored variable asks the other replicas, or workers, for its value.
        model = build(task, options, data)
        model.set_weights(trained.get_weights())
    serve, signature = task.serve(model, data)
    answer = answering(task, model, data)
    scores = {"trained": task.score(answer, data)}
    if not options.export:
        training.write_results(workdir, progress, config, _results(scores), {}, progress.epoch * data.steps_per_epoch)
        say(task.describe(scores["trained"]))
        return None
    if measured.multiply_adds_in_half:
        with precision.computing_in(model, "float32"):
            scores["trained, in float32"] = task.score(answering(task, model, data), data)
    say("exporting, and verifying in a fresh process")
    bundle = _version_folder(options, name)  # again: another run may have published meanwhile
    manifest = tfhalf.export_saved_model(
        model,
        bundle,
        inputs=_samples(data),
        serve=serve,
        input_signature=signature,
        decide=task.decide and task.decide(model, data),
        resources=data.resources,
        metadata=lambda stage: _metadata(task, options, config, data, progress, scores, stage),
    )
    say(f"published {bundle}")
    _record(task, workdir, config, progress, scores, answer, bundle, data)
    batches = progress.epoch * data.steps_per_epoch
    say(summary.conclusion(task, options, workdir, bundle, manifest, measured, progress, batches, trained))
    return manifest


def answering(task: Task, model: keras.Model, data: Data) -> Call:
    """Returns what clients get of the model, as a function that is traced when it is first called."""
    serve, _ = task.serve(model, data)
    decide = task.decide(model, data) if task.decide else lambda raw: raw
    if isinstance(decide, dict):
        decide = decide[""]
    # Pictures of a hundred sizes shall not be a hundred graphs.
    return tf.function(lambda **inputs: decide(serve(**inputs)), autograph=False, reduce_retracing=True)


def build(task: Task, options: types.SimpleNamespace, data: Data) -> keras.Model:
    """Builds the model under the seed and the plan, and compiles it.

    Raises:
        AppError: there is no plan yet, or it doesn't fit the model, or an output isn't float32.
    """
    if options.plan is None:
        raise AppError("--dtype_policy=auto isn't possible here: name a policy")
    # Here and not earlier: preparing a data set draws random numbers, and the first run would differ from the next.
    keras.utils.set_random_seed(options.seed)
    try:
        with options.plan.scope():
            model = task.build_model(options, data)
        options.plan.apply(model)
        steps = options.epochs * data.steps_per_epoch // options.gradient_accumulation_steps
        optimizer = task.build_optimizer(options, steps)
        if options.accelerate:
            tfhalf.accelerate(model)
            tfhalf.accelerate_optimizer(optimizer)
        training.compile_model(
            model,
            optimizer,
            loss=task.build_loss(options),
            metrics=task.build_metrics(options),
            jit_compile=options.jit_compile,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            initial_scale=options.initial_scale,
            dynamic_growth_steps=options.dynamic_growth_steps,
        )
    except ValueError as error:  # Keras puts its remedy into the first line, and our errors have only one
        raise AppError(str(error).splitlines()[0]) from error
    if options.jit_compile and not model.jit_compile:
        raise AppError("--jit_compile: XLA can't compile a layer of this model, as random augmentation; leave it out")
    return model


def adamw(learning_rate: float, num_steps: int, weight_decay: float) -> keras.optimizers.Optimizer:
    """AdamW; its rate rises in a line over 5% of the steps, then falls along a cosine to 0."""
    warmup = max(1, round(_WARMUP_SHARE * num_steps))
    schedule = keras.optimizers.schedules.CosineDecay(
        learning_rate / warmup,  # not 0, or the first step would do nothing
        decay_steps=max(1, num_steps - warmup),
        warmup_target=learning_rate,
        warmup_steps=warmup,
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=weight_decay)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


def say(line: str) -> None:
    """Prints a line at once, in order with the rest also where stdout is a file."""
    print(line, flush=True)


def _version_folder(options: types.SimpleNamespace, name: str) -> Path:
    """The free version folder to publish."""
    base, version = Path(options.saved_model_dir) / name, options.saved_model_version
    try:
        base.mkdir(parents=True, exist_ok=True)
        probe = base / f".staging-probe-{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
        taken = [int(entry.name) for entry in base.iterdir() if entry.name.isdigit()]
    except OSError as error:
        raise AppError(f"--saved_model_dir: can't write {base}: {error.strerror}; choose another folder") from error
    if version is not None and version in taken:
        raise AppError(
            f"--saved_model_version={version}: {base / str(version)} exists; choose another version or leave it out"
        )
    return base / str(version or max(taken, default=0) + 1)


def _config(task: Task, options: types.SimpleNamespace) -> dict[str, Any]:
    """What makes a run what it is."""
    left_out = _PATH_FLAGS | _MACHINE_FLAGS | {"plan", "given", "dtype_policy"}
    plain = {name: value for name, value in vars(options).items() if name not in left_out}
    plan = options.plan.to_json() if options.plan else AUTO
    return {"task": task.name, "plan": plan} | dict(sorted(plain.items()))


def _default_workdir(name: str, options: types.SimpleNamespace, config: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    return f"runs/{name}-{options.plan.default if options.plan else AUTO}-{digest}"


def _samples(data: Data) -> dict[str, np.ndarray]:
    """The first test examples of one shape, as many as fit: no training and no choice of epoch has seen them."""
    rows: list[dict[str, np.ndarray]] = []
    for inputs, _ in data.test.unbatch().take(_NUM_SAMPLES):
        row = {name: np.asarray(tensor) for name, tensor in inputs.items()}
        size = sum(array.nbytes for array in row.values())
        alike = all(row[name].shape == array.shape for name, array in rows[0].items()) if rows else True
        if rows and (not alike or (len(rows) + 1) * size > _SAMPLE_BYTES):
            break
        rows.append(row)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _metadata(task: Task, options, config, data: Data, progress, scores, stage: Path) -> dict[str, Any]:
    """Scores the artefact from disk, and refuses one that lost the metric."""
    margin = max(task.margin, 1 / scores["trained"]["total"])
    for signature, twin in (("serving_default", "trained"), ("serving_float32", "trained, in float32")):
        if twin not in scores:
            continue
        served = tfhalf.load_saved_model(stage, signature)
        scores[signature] = task.score(lambda served=served, **inputs: served(inputs), data)
        expected, seen = scores[twin][task.metric], scores[signature][task.metric]
        if not abs(expected - seen) <= margin + 1e-9:  # 0.661 - 0.659 is more than 0.002 in binary
            raise tfhalf.ExportError(
                f"{signature}: {task.metric} is {seen:.4f} from the artefact, {expected:.4f} from the trained model; "
                f"they may differ by {margin:g}; nothing was published"
            )
    return {
        "task": task.name,
        "dataset": options.dataset,
        "plan": options.plan.to_json(),
        "flags": config,
        "about": data.about,
        "metrics": scores,
        "margin": {task.metric: margin},
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,
    }


def _record(task: Task, workdir: Path, config, progress, scores, answer, bundle: Path, data: Data) -> None:
    """Adds the test's result to metrics.json and TensorBoard."""
    step = progress.epoch * data.steps_per_epoch
    try:
        examples = workdir / "examples"
        examples.mkdir(exist_ok=True)
        shown = task.conclude(answer, data, examples)
        results = _results(scores) | {"bundle": str(bundle)}
        training.write_results(workdir, progress, config, results, shown, step)
    except OSError as error:  # the bundle is out; a full disk doesn't take it back
        say(f"the test's result couldn't be written to {workdir}: {error}; the bundle has it in its manifest")


def _results(scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What `metrics.json` says of a finished run."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"scores": scores, "peak_memory_bytes": peak}
