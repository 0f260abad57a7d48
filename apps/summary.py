"""What a person reads of a run: how it begins, and how it ends.

A `task` is an app's `runner.Task`, `options` its parsed flags, `measured` the model's `tfhalf.Coverage`.
"""

import math
import shlex
from collections.abc import Iterator
from pathlib import Path

import keras

import tfhalf

_COMPUTED_BY = {"trained": "the trained model", "trained, in float32": "the same weights in float32"}


def introduction(
    task, options, model: keras.Model, measured: tfhalf.workload.Coverage, num_replicas: int
) -> Iterator[str]:
    """Yields the lines that begin a run.

    Args:
        task, options, model, measured: of the run.
        num_replicas: that share a batch.
    """
    yield f"{task.name} on {options.dataset}, {options.plan.default}: {model.count_params():,} parameters"
    if measured.multiply_adds_in_half:
        islands = ", ".join(measured.islands) or "none"
        yield f"{measured.multiply_adds_in_half:.1%} of multiply-adds in half; float32 islands: {islands}"
    if options.accelerate and (left := tfhalf.left_alone(model)):
        yield "not accelerated: " + "; ".join(f"{path} ({why})" for path, why in left.items())
    if options.distribute != "none":
        share = options.batch_size // num_replicas
        yield f"{num_replicas} replicas, {share} of a batch's {options.batch_size} examples each"


def conclusion(
    task,
    options,
    workdir: Path,
    bundle: Path,
    manifest: tfhalf.Manifest,
    measured: tfhalf.workload.Coverage,
    progress,
    batches: int,
    model: keras.Model,
) -> str:
    """Returns what ends a run that published.

    Args:
        task, options, measured, model: of the run.
        workdir: its folder.
        bundle: the version folder that it published.
        manifest: of the bundle.
        progress: `training.Progress` of the run.
        batches: that were trained on in all.
    """
    metrics = manifest.metadata["metrics"]
    heads = " ".join(f"{name:>10}" for name in metrics["trained"])
    lines = ["", task.describe(metrics["trained"]), "", f"  {'computed by':34} {heads}"]
    for key, score in metrics.items():
        values = " ".join(
            f"{value:{max(10, len(name))}{'.4f' if isinstance(value, float) else ''}}" for name, value in score.items()
        )
        lines.append(f"  {_COMPUTED_BY.get(key, 'the artefact, ' + key):34} {values}")
    return "\n".join([*lines, "", *_facts(task, options, bundle, manifest, measured, progress, batches, model)]) + (
        "\n\n" + "\n".join(_commands(workdir, bundle))
    )


def _facts(task, options, bundle: Path, manifest, measured, progress, batches: int, model) -> Iterator[str]:
    scaled = model.optimizer
    if isinstance(scaled, tfhalf.LossScaleOptimizer):
        where = "; --monitor_every=50 tells where" if scaled.steps_skipped and not options.monitor_every else ""
        skipped = f"{scaled.steps_skipped} of {batches} steps skipped{where}"
        yield f"  loss scale      {scaled.scale:g} at the end; {skipped}"
    parameters = f"{measured.parameters_in_half:.1%} of parameters"
    yield f"  in half         {measured.multiply_adds_in_half:.1%} of multiply-adds, {parameters}"
    best = f"{task.monitor} {progress.best:.4f}" if task.monitor else "the last"
    yield f"  epoch taken     {progress.best_epoch} of {progress.epoch}, {best}"
    yield f"  artefact        {bundle}, verified in a fresh process"
    float32_bytes = sum(4 * math.prod(weight.shape) for weight in model.weights)
    yield f"  variables       {manifest.sizes['variables']:,} bytes; the weights in float32 are {float32_bytes:,}"
    yield f"  graph           {manifest.sizes['graph']:,} bytes"
    yield f"  kept in float32 {', '.join(manifest.kept) or 'nothing'}"
    errors = (
        f"{name} {max(signature['max_error'].values()):.1e} (at most {signature['tolerance']:g})"
        for name, signature in manifest.signatures.items()
        if signature["tolerance"] is not None
    )
    yield f"  largest error   {', '.join(errors)}"


def _commands(workdir: Path, bundle: Path) -> Iterator[str]:
    run, version, base = (shlex.quote(str(path)) for path in (workdir, bundle, bundle.parent.resolve()))
    yield f"  look            .venv/bin/tensorboard --logdir={run}/tensorboard"
    yield f"  predict         .venv/bin/python -m apps.predict --saved_model={version} {run}/examples"
    yield f"  serve           laid out for TensorFlow Serving: --model_base_path={base}"
