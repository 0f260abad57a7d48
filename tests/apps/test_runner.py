"""The one sequence, through the real command line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import flags

import tfhalf
from apps import runner
from apps.image import classification
from benchmarks import learning_curve
from tests.apps.test_any_app import options_for, tiny_task
from tests.conftest import ROOT, run_module
from tfhalf import checkpoint, training

APP = "apps.image.classification"


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_short_run_in_the_other_policies(policy, data_dir, tmp_path):
    arguments = [APP, f"--dtype_policy={policy}", f"--data_dir={data_dir}", "--epochs=1", "--steps_per_epoch=30"]
    result = run_module(
        *arguments, f"--workdir={tmp_path}/run", f"--saved_model_dir={tmp_path}/sm", "--saved_model_name=m"
    )
    assert result.returncode == 0, result.stderr
    manifest = tfhalf.verify(tmp_path / "sm" / "m" / "1")
    assert manifest.metadata["plan"] == {"default": policy, "layers": {}}
    assert "loss scale" not in result.stdout
    assert re.search(r"^Test loss: \d\.\d+ \| Accuracy: \d+\.\d\d% \(\d+/1000\)$", result.stdout, re.MULTILINE)
    assert ("serving_bfloat16" in manifest.signatures) is (policy == "mixed_bfloat16")


def test_run_says_and_leaves_what_it_should(trained):
    _, folder, printed = trained
    bundle = folder / "saved_models" / "image_classification_mnist_5k" / "1"
    manifest = tfhalf.Manifest.read(bundle)
    scores = manifest.metadata["metrics"]
    assert scores.keys() == {"trained", "trained, in float32", "serving_default", "serving_float32"}
    assert f"Accuracy: {100 * scores['trained']['accuracy']:.2f}% ({scores['trained']['correct']}/1000)" in printed
    assert scores["trained"]["accuracy"] > 0.6
    for words in (
        "loss scale      32768 at the end; 0 of 80 steps skipped",
        "verified in a fresh process",
        "--logdir=",
        "apps.predict",
    ):
        assert words in printed
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert metrics["results"]["scores"] == scores
    assert metrics["config"]["plan"] == {"default": "mixed_float16", "layers": {}}
    assert len(list((folder / "run" / "examples").glob("*.png"))) == 10
    assert manifest.sizes["variables"] < 0.52 * 4 * 496_138


def test_epochs_of_a_run_are_scored_again(trained, data_dir, tmp_path):
    _, folder, _ = trained
    program = ["benchmarks.learning_curve", f"--workdir={folder}/run", f"--data_dir={data_dir}"]
    result = run_module(*program, f"--app={APP}")
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^\| (\d)( \(taken\))? \| .* \| (0\.\d{4}) \| loss (\d\.\d{4}), ", result.stdout, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [1, 2]
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    (taken,) = [row for row in rows if row[1]]
    scores = metrics["results"]["scores"]["trained"]
    assert int(taken[0]) == metrics["best_epoch"]
    assert taken[2:] == (f"{scores['accuracy']:.4f}", f"{scores['loss']:.4f}")
    assert rows[0][2:] != rows[1][2:]
    result = run_module(*program, "--app=apps.image.detection")
    assert result.returncode == 1
    assert re.search("^error: .*holds a run of image_classification", result.stderr, re.MULTILINE), result.stderr
    assert "Traceback" not in result.stderr
    for name, place, message in (
        ("apps.image.nothing", folder / "run", r"--app=apps.image.nothing is no app \(No module .*write --app="),
        (APP, tmp_path, "holds no run of an app"),
    ):
        with pytest.raises(runner.AppError, match=message):
            learning_curve._run(types.SimpleNamespace(app=name, workdir=place, data_dir=data_dir, every=1))


def test_samples_are_of_one_shape_and_few_bytes():
    def samples(*sizes):
        test = tf.data.Dataset.from_generator(
            lambda: (({"image": np.full([size, size, 1], index, "float32")}, 0) for index, size in enumerate(sizes)),
            output_signature=({"image": tf.TensorSpec([None, None, 1])}, tf.TensorSpec([], tf.int32)),
        )
        found = runner._samples(runner.Data(None, 1, None, test.batch(1), {}))["image"]
        assert found[:, 0, 0, 0].tolist() == list(range(len(found)))
        return found.shape

    assert samples(*[4] * 20) == (16, 4, 4, 1)
    assert samples(4, 4, 5, 4) == (2, 4, 4, 1)
    assert samples(700, 700, 700) == (2, 700, 700, 1)  # a third would be over 4 MiB
    assert samples(2000) == (1, 2000, 2000, 1)


def test_pictures_of_many_sizes_share_their_graphs():
    traced = []

    def serve(image):
        traced.append(image.shape)
        return {"mean": tf.reduce_mean(image, [1, 2])}

    task = types.SimpleNamespace(serve=lambda model, data: (serve, None), decide=lambda model, data: lambda raw: raw)
    answer = runner.answering(task, None, None)
    for size in range(3, 12):
        assert answer(image=tf.fill([1, size, 2 * size, 3], float(size)))["mean"].numpy().tolist() == [[size] * 3]
    assert len(traced) <= 2


@pytest.mark.slow
def test_interrupted_run_goes_on_to_the_same_result(trained, tmp_path):
    arguments, folder, _ = trained
    command = [
        sys.executable,
        "-m",
        *arguments,
        f"--workdir={tmp_path}/run",
        f"--saved_model_dir={tmp_path}/saved_models",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("Epoch 1/2"):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "the same command goes on from here" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "saved_models" / "image_classification_mnist_5k" / "1").exists()

    result = run_module(*command[2:])
    assert result.returncode == 0, result.stderr
    assert f"resuming {tmp_path}/run after epoch 1, step" in result.stdout
    records = [json.loads(Path(base, "run", "metrics.json").read_text()) for base in (folder, tmp_path)]
    whole, resumed = (record["results"]["scores"] for record in records)
    assert resumed == whole  # bit by bit, and the augmentation's and dropout's random numbers too


def refuse(*arguments: str) -> str:
    """Runs the app with bad flags; returns its one line."""
    result = run_module(APP, *arguments)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith(("error: ", "FATAL Flags parsing error"))]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr[result.stderr.index(lines[0]) :]


@pytest.mark.slow
def test_bad_input_is_one_clear_line_and_leaves_nothing(trained, data_dir, tmp_path, capsys):
    """By the command line where a refusal ends what it began (devices, a thread of the input), else in this process."""

    def refuse_here(*arguments: str) -> str:
        options = parse(*arguments)
        assert runner.exit_code(lambda argv: runner.run(classification.TASK, options), []) == 1
        return capsys.readouterr().err

    arguments, folder, _ = trained
    (tmp_path / "file").write_text("{")
    tfhalf.PrecisionPlan("mixed_float16", {"dense.": "mixed_bfloat16"}).save(tmp_path / "plan.json")
    base = [f"--data_dir={data_dir}", f"--workdir={tmp_path}/run", f"--saved_model_dir={tmp_path}/sm"]
    for refuses, wrong, message in (
        (refuse_here, ["--dataset=imdb_reviews"], "text (Text)"),
        (
            refuse_here,
            [f"--workdir={tmp_path}/file/run", f"--precision_plan={tmp_path}/plan.json"],
            "can't be written: Not a directory",
        ),
        (
            refuse_here,
            [f"--saved_model_dir={folder}/saved_models", "--saved_model_version=1"],
            "1 exists; choose another version",
        ),
        (refuse, [*arguments[1:], f"--workdir={folder}/run", "--seed=4"], "seed: 3 there, 4 here"),
        (
            refuse_here,
            ["--distribute=multi_worker"],
            "--distribute: multi_worker needs the environment variable TF_CONFIG, which isn't set",
        ),
        (refuse_here, ["--num_logical_devices=2"], "--distribute: num_logical_devices has an effect with"),
        (
            refuse,
            ["--distribute=mirrored", "--num_logical_devices=2", "--batch_size=33"],
            "--batch_size=33 is shared out to 2 replicas",
        ),
    ):
        assert message in refuses(*base, *wrong)
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "plan.json", "sm"}
    assert not list(tmp_path.glob("sm/*/*"))


def parse(*arguments: str):
    values = flags.FlagValues()
    names = runner.define_flags(classification.TASK, values)
    values(["test", *arguments])
    return runner.options_of(values, names)


@pytest.mark.parametrize(
    "flag",
    [
        "--epochs=0",
        "--batch_size=-1",
        "--learning_rate=0",
        "--learning_rate=11",
        "--initial_scale=1e9",
        "--seed=-1",
        "--seed=x",
    ]
    + ["--depth=7", "--image_size=8", "--label_smoothing=0.9", "--steps_per_epoch=0", "--saved_model_version=0"]
    + ["--augment=twist", "--distribute=cluster", "--dynamic_growth_steps=0", "--num_logical_devices=0"]
    + ["--keep=0", "--checkpoint_seconds=-1", "--gradient_accumulation_steps=0"],
)
def test_values_out_of_range_are_refused(flag):
    with pytest.raises(flags.IllegalFlagValueError, match=flag.split("=")[0].strip("-")):
        parse(flag)


def test_flags_that_exclude_each_other_are_refused(tmp_path):
    tfhalf.PrecisionPlan("float32").save(tmp_path / "plan.json")
    (tmp_path / "broken.json").write_text("{")
    for arguments, message in (
        (["--dtype_policy=auto", "--distribute=mirrored"], "--dtype_policy=auto and --distribute=mirrored exclude"),
        (["--dtype_policy=auto", f"--precision_plan={tmp_path}/plan.json"], "exclude each other"),
        (["--explain"], "--explain has an effect with --dtype_policy=auto only"),
        (["--distribute=mirrored", "--jit_compile"], "--jit_compile and --distribute=mirrored exclude each other"),
        (["--learning_rate=nan"], "--learning_rate=nan must be a finite number"),
        (["--dtype_policy=float32", "--initial_scale=8"], "--initial_scale has no effect"),
        (["--noexport", "--saved_model_name=x"], "--saved_model_name has no effect beside --noexport"),
        (["--dtype_policy=float32", f"--precision_plan={tmp_path}/plan.json"], "exclude each other"),
        ([f"--precision_plan={tmp_path}/none.json"], "none.json"),
        ([f"--precision_plan={tmp_path}/broken.json"], "broken.json: PrecisionPlan: .* isn't JSON"),
    ):
        with pytest.raises(runner.AppError, match=message):
            parse(*arguments)
    assert parse(f"--precision_plan={tmp_path}/plan.json").plan == tfhalf.PrecisionPlan("float32")


def test_auto_leaves_the_plan_open_and_scaling_is_no_mistake():
    assert parse("--dtype_policy=auto", "--initial_scale=8", "--explain").plan is None


def drawing_task() -> runner.Task:
    """A task that needs no data set, and whose model draws random numbers."""

    def load_data(options):
        def train(epoch):
            random = np.random.default_rng([options.seed, epoch])
            x, y = random.normal(size=[24, 4, 8]), random.normal(size=[24, 4, 2])
            return tf.data.Dataset.from_tensor_slices((x.astype("float32"), y.astype("float32")))

        return runner.Data(train, 24, train(99), train(98), about={})

    def build_model(options, data):
        layers = [keras.layers.Dense(16, name="body"), keras.layers.Dropout(0.5, name="drop")]
        return keras.Sequential([keras.Input([8]), *layers, keras.layers.Dense(2, dtype="float32", name="head")])

    return tiny_task(load_data=load_data, build_model=build_model)


def test_nothing_is_built_before_a_policy_is_chosen():
    task = drawing_task()
    options = options_for(task, "--dtype_policy=auto")
    with pytest.raises(runner.AppError, match="--dtype_policy=auto isn't possible here: name a policy"):
        runner.build(task, options, runner.load(task, options))


def resolved(task, *arguments, workdir=None):
    options = options_for(task, *arguments, "--seed=4", "--epochs=2")
    data = runner.load(task, options)
    return runner.resolve(task, options, data, workdir), data


def train(task, options, data, workdir) -> list[np.ndarray]:
    model = runner.build(task, options, data)
    settings = {"epochs": 2, "steps_per_epoch": 24, "monitor": None, "config": runner._config(task, options)}
    training.fit(model, data.train, data.validation, workdir=workdir, **settings)
    return model.get_weights()


def test_auto_trains_as_the_policy_that_it_chose(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    task = drawing_task()
    chosen, data = resolved(task, "--dtype_policy=auto", "--explain")
    printed = capsys.readouterr().out
    assert "of float32 (95%)" in printed
    assert re.search(rf"^dtype_policy auto: {chosen.plan.default} \(measured \d+-\d\d-\d\d\)$", printed, re.MULTILINE)
    assert len(list((tmp_path / "cache" / "tfhalf").iterdir())) == 1
    named, same_data = resolved(task, f"--dtype_policy={chosen.plan.default}")
    assert (named.plan, runner._config(task, named)) == (chosen.plan, runner._config(task, chosen))
    auto = train(task, chosen, data, tmp_path / "auto")
    for one, other in zip(auto, train(task, named, same_data, tmp_path / "named"), strict=True):
        np.testing.assert_array_equal(one, other)
    again, _ = resolved(task, "--dtype_policy=auto")
    assert again.plan == chosen.plan
    printed = capsys.readouterr().out
    assert re.search(r"^dtype_policy auto: \w+ \(.*; cached, measured \d{4}-\d\d-\d\d\)$", printed, re.MULTILINE)
    assert "trying" not in printed


def test_auto_keeps_the_policy_of_a_run_that_is_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    task = drawing_task()
    for policy in ("mixed_float16", "mixed_bfloat16"):
        folder = tmp_path / policy
        options, data = resolved(task, f"--dtype_policy={policy}")
        weights = train(task, options, data, folder)
        auto, _ = resolved(task, "--dtype_policy=auto", workdir=folder)
        assert auto.plan.default == policy
        assert f"dtype_policy auto: {policy} (that of the run in {folder})" in capsys.readouterr().out
        for one, other in zip(weights, train(task, auto, data, folder), strict=True):  # it is complete
            np.testing.assert_array_equal(one, other)
    assert not (tmp_path / "cache").exists()


def test_the_same_auto_command_has_one_folder_whatever_is_chosen():
    options = parse("--dtype_policy=auto")
    config = runner._config(classification.TASK, options)
    assert re.fullmatch(r"runs/name-auto-[0-9a-f]{8}", runner._default_workdir("name", options, config))
    explained = runner._config(classification.TASK, parse("--dtype_policy=auto", "--explain"))
    assert explained == config


@pytest.mark.soak
def test_auto_through_the_command_line(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = [APP, f"--data_dir={data_dir}", "--epochs=1", "--steps_per_epoch=8", "--deterministic"]

    def run_in(name: str, *more: str):
        result = run_module(*arguments, *more, f"--workdir={tmp_path}/{name}", f"--saved_model_dir={tmp_path}/sm")
        assert result.returncode == 0, result.stderr
        return result.stdout, list(np.load(tmp_path / name / "best.npz").values())

    printed, auto = run_in("auto", "--dtype_policy=auto", "--explain")
    policy = re.search(r"^dtype_policy auto: (\w+) \(", printed, re.MULTILINE)[1]
    _, named = run_in("named", f"--dtype_policy={policy}")
    for one, other in zip(auto, named, strict=True):
        np.testing.assert_array_equal(one, other)
    printed, _ = run_in("auto", "--dtype_policy=auto")
    assert f"dtype_policy auto: {policy} (that of the run in {tmp_path}/auto)" in printed


def test_seed_decides_the_weights_whatever_was_drawn_before(data_dir):
    # Preparing a data set draws random numbers: the first run of a machine once differed from the next.
    import random

    import numpy as np

    options = parse(f"--data_dir={data_dir}", "--seed=5")
    data = classification.load_data(options)
    first = runner.build(classification.TASK, options, data).get_weights()
    random.random()
    np.random.rand()
    for old, new in zip(first, runner.build(classification.TASK, options, data).get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_place_for_bundles_is_checked_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(runner.AppError, match=r"--saved_model_dir: can't write .*/file/name: Not a directory"):
        runner._version_folder(parse(f"--saved_model_dir={tmp_path}/file"), "name")
    (tmp_path / "name" / "7").mkdir(parents=True)
    (tmp_path / "name" / ".staging-9-x").mkdir()
    options = parse(f"--saved_model_dir={tmp_path}")
    assert runner._version_folder(options, "name") == tmp_path / "name" / "8"
    with pytest.raises(runner.AppError, match=r"--saved_model_version=7: .*/7 exists"):
        runner._version_folder(parse(f"--saved_model_dir={tmp_path}", "--saved_model_version=7"), "name")


def test_a_run_without_export_is_scored_draws_nothing_and_can_be_exported_later(data_dir, tmp_path):
    arguments = [f"--data_dir={data_dir}", f"--workdir={tmp_path}/run", "--epochs=1", "--steps_per_epoch=2"]
    assert runner.run(classification.TASK, parse(*arguments, "--noexport")) is None
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())["results"]
    assert results["scores"]["trained"]["total"] == 1000
    assert 2**26 < results["peak_memory_bytes"] < 2**36
    assert os.listdir(tmp_path) == ["run"]
    assert not (tmp_path / "run" / "examples").exists()
    assert runner._config(classification.TASK, parse(*arguments)) == runner._config(
        classification.TASK, parse(*arguments, "--noexport")
    )


def test_a_run_that_diverged_has_an_exit_status_of_its_own(capsys):
    def diverge(argv):
        raise training.DivergedError("training stopped at step 3: loss is nan")

    assert runner.exit_code(diverge, []) == runner.DIVERGED == 3
    assert capsys.readouterr().err == "error: training stopped at step 3: loss is nan\n"


def test_jit_compile_that_keras_would_ignore_is_refused(data_dir):
    options = parse("--jit_compile", f"--data_dir={data_dir}")
    with pytest.raises(runner.AppError, match="--jit_compile: XLA can't compile"):
        runner.build(classification.TASK, options, classification.load_data(options))


def test_plan_that_does_not_fit_the_model_lists_its_layers(tmp_path, data_dir):
    tfhalf.PrecisionPlan("mixed_float16", {"conv9": "float32"}).save(tmp_path / "plan.json")
    options = parse(f"--precision_plan={tmp_path}/plan.json", f"--data_dir={data_dir}")
    with pytest.raises(runner.AppError, match=r"conv9.*matches no layer.*conv1"):
        runner.build(classification.TASK, options, classification.load_data(options))
    assert runner._config(classification.TASK, options)["plan"]["layers"] == {"conv9": "float32"}


@pytest.mark.soak
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_short_run_on_two_replicas_that_accumulates(policy, data_dir, tmp_path):
    arguments = [APP, f"--dtype_policy={policy}", f"--data_dir={data_dir}", "--epochs=1", "--steps_per_epoch=54"]
    arguments += ["--distribute=mirrored", "--num_logical_devices=2", "--gradient_accumulation_steps=3", "--keep=1"]
    result = run_module(*arguments, f"--workdir={tmp_path}/run", f"--saved_model_dir={tmp_path}/sm")
    assert result.returncode == 0, result.stderr
    assert "2 replicas, 32 of a batch's 64 examples each" in result.stdout
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["results"]["scores"]["trained"]["total"] == 1000
    (state,) = (tmp_path / "run" / "checkpoints").iterdir()
    with np.load(state) as file:
        counts = [int(file[name]) for name in file if name.endswith("/iteration")]
    assert 18 in counts, "54 batches are 18 steps"
    # A run goes on with another number of replicas, but not without any.
    again = [*arguments[:-1], "--keep=2", "--num_logical_devices=4", f"--workdir={tmp_path}/run"]
    result = run_module(*again, f"--saved_model_dir={tmp_path}/sm")
    assert result.returncode == 0, result.stderr
    assert "after epoch 1, step 0" in result.stdout


@pytest.mark.soak
def test_thirty_kills_at_random_moments_lose_nothing(data_dir, tmp_path):
    flags = ["--epochs=3", "--steps_per_epoch=20", "--deterministic", "--checkpoint_seconds=0", "--augment=shift_flip"]

    def command(name: str) -> list[str]:
        folders = [f"--workdir={tmp_path}/{name}", f"--saved_model_dir={tmp_path}/{name}_models"]
        return [sys.executable, "-m", APP, f"--data_dir={data_dir}", *flags, *folders]

    begin = time.monotonic()
    subprocess.run(command("whole"), cwd=ROOT, check=True, capture_output=True)
    seconds = time.monotonic() - begin
    random, kills, resumed, folders = np.random.default_rng(), 0, 0, 0
    while kills < 30:  # a folder is used until its run has ended by itself
        name, ended = f"killed{folders}", False
        folders += 1
        while not ended:
            process = subprocess.Popen(
                command(name), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            try:
                printed, _ = process.communicate(timeout=random.uniform(0.2, 0.6) * seconds)
                ended = True
                assert process.returncode == 0, printed
            except subprocess.TimeoutExpired:
                process.kill()
                printed, _ = process.communicate()
                kills += 1
            assert "damaged" not in printed
            resumed += "resuming" in printed
        states = [
            checkpoint.Checkpoints(tmp_path / each / "checkpoints", 2, print, False).newest()[0]
            for each in ("whole", name)
        ]
        for (path, one), two in zip(states[0].items(), states[1].values(), strict=True):
            np.testing.assert_array_equal(one, two, err_msg=f"{name}: {path}")
        assert (tmp_path / "whole" / "best.npz").read_bytes() == (tmp_path / name / "best.npz").read_bytes()
        for bundle in tmp_path.glob(f"{name}_models/*/[0-9]*"):
            tfhalf.verify(bundle)
    print(f"{kills} kills in {folders} runs, {resumed} times a run went on from a checkpoint")
    assert resumed > 10, "the kills came too early to show anything"
