"""The command line, and what it prints."""

import json
import sys
import types
import zipfile

import keras
import pytest
from absl import flags

from apps import audit, runner
from tests.apps.test_any_app import options_for, tiny_task
from tests.conftest import run_module
from tfhalf.hazards import Finding

ERROR = Finding("half_output", "head", "error", "an output is float16", 'use PrecisionPlan({"head": "float32"})')
WARNING = Finding("sum_of_squares", "unit", "warning", "infinite from 256 on", "keep it in float32")
INFO = [Finding("tensor_cores", f"dense_{i}", "info", "7 units", f'say "dense_{i}"') for i in range(5)]


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> str:
    """A .keras file of a model whose output is half."""
    path = str(tmp_path_factory.mktemp("files") / "broken.keras")
    layers = [keras.layers.UnitNormalization(name="unit", dtype="mixed_float16")]
    layers += [keras.layers.Dense(8, name="head", dtype="mixed_float16")]
    keras.Sequential([keras.Input([8]), *layers]).save(path)
    return path


def values_of(*arguments) -> flags.FlagValues:
    values = flags.FlagValues()
    audit.define_flags(values)
    values(["audit", *arguments])
    return values


def test_file_with_a_defect_ends_in_1_with_json_alone(broken):
    result = run_module("apps.audit", f"--keras_file={broken}", "--format=json")
    assert result.returncode == 1, result.stderr
    told = json.loads(result.stdout)
    assert [(each["rule"], each["layer"], each["severity"]) for each in told["findings"]] == [
        ("half_output", "head", "error"),
        ("sum_of_squares", "unit", "warning"),
    ]
    assert told["counts"] == {"error": 1, "warning": 1, "info": 0}
    assert all(each["message"] and each["fix"] for each in told["findings"])


def test_what_cannot_be_audited_ends_in_2_with_one_line():
    result = run_module("apps.audit", "--keras_file=a.keras", "--dataset=mnist_5k")
    assert (result.returncode, result.stdout) == (2, "")
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert lines == ["error: Unknown command line flag 'dataset'"]


@pytest.mark.parametrize(("given", "app"), [([], False), (["--keras_file=x.keras"], True)])
def test_exactly_one_model_is_asked_for(given, app):
    with pytest.raises(runner.AppError, match="exactly one of --app=<name> and --keras_file"):
        audit.options_of(tiny_task() if app else None, values_of(*given), [])


def test_imports_belong_to_a_file():
    with pytest.raises(runner.AppError, match="--imports has no effect on --app"):
        audit.options_of(tiny_task(), values_of("--imports=json"), [])


def test_app_is_audited_on_its_first_batch(capsys):
    def build_model(options, data):
        print("loading")  # must not reach the JSON on stdout
        x = keras.Input([8])
        y = keras.layers.Rescaling(1e5, name="huge")(x)
        return keras.Model(x, keras.layers.Dense(2, dtype="float32", name="head")(y))

    task = tiny_task(build_model=build_model)
    found = audit.audited(task, options_for(task))
    assert ("forward_overflow", "huge", "error") in [(each.rule, each.layer, each.severity) for each in found]
    assert capsys.readouterr().out == ""
    sound = tiny_task()
    assert audit.audited(sound, options_for(sound)) == []


def test_missing_and_corrupt_files_are_one_clear_line(tmp_path, broken):
    with pytest.raises(runner.AppError, match=r"none\.keras: there is no such file"):
        audit.load_model(str(tmp_path / "none.keras"), [])
    (tmp_path / "text.keras").write_text("nothing")
    with pytest.raises(runner.AppError, match=r"is no \.keras file: File is not a zip file"):
        audit.load_model(str(tmp_path / "text.keras"), [])
    with zipfile.ZipFile(broken) as archive, zipfile.ZipFile(tmp_path / "cut.keras", "w") as cut:
        cut.writestr("config.json", archive.read("config.json"))
    with pytest.raises(runner.AppError, match="can't be loaded: ") as error:
        audit.load_model(str(tmp_path / "cut.keras"), [])
    assert len(str(error.value).splitlines()) == 1


def test_unknown_classes_are_named_with_the_remedy(tmp_path, monkeypatch):
    source = """
import keras

@keras.saving.register_keras_serializable("audited")
class Twice(keras.layers.Layer):
    def call(self, x):
        return 2 * x
"""
    (tmp_path / "twice_layer.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import twice_layer

    path = str(tmp_path / "custom.keras")
    keras.Sequential([keras.Input([8]), twice_layer.Twice(name="twice")]).save(path)
    keras.saving.get_custom_objects().pop("audited>Twice")
    sys.modules.pop("twice_layer")
    with pytest.raises(runner.AppError, match=r"aren't known: audited>Twice; .*register_keras_serializable.*--imports"):
        audit.load_model(path, [])
    with pytest.raises(runner.AppError, match="--imports=twice_layers: No module named"):
        audit.load_model(path, ["twice_layers"])
    assert audit.load_model(path, ["twice_layer"]).layers[0].name == "twice"


def test_classes_of_keras_hub_are_known(tmp_path):
    import keras_hub

    path = str(tmp_path / "hub.keras")
    settings = {"vocabulary_size": 9, "num_layers": 1, "num_heads": 1, "hidden_dim": 8, "intermediate_dim": 8}
    keras_hub.models.RobertaBackbone(**settings, max_sequence_length=4).save(path)
    assert audit.load_model(path, []).count_params() > 0


@pytest.mark.parametrize(
    ("found", "fail_on", "status"),
    [
        ([], "warning", 0),
        (INFO, "warning", 0),
        ([WARNING], "error", 0),
        ([WARNING], "warning", 1),
        ([ERROR], "error", 1),
        ([ERROR, WARNING], "warning", 1),
    ],
)
def test_exit_status(found, fail_on, status):
    assert audit.exit_status(found, fail_on) == status


def test_text_groups_by_severity_and_joins_layers():
    assert (
        audit.as_text([ERROR, WARNING, *INFO])
        == """\
error:
  half_output     head
                  an output is float16
                  fix: use PrecisionPlan({"head": "float32"})

warning:
  sum_of_squares  unit
                  infinite from 256 on
                  fix: keep it in float32

info:
  tensor_cores    dense_0, dense_1, dense_2 and 2 more
                  7 units
                  fix: say "<layer>"

1 error, 1 warning, 5 infos"""
    )
    assert audit.as_text([]) == "0 errors, 0 warnings, 0 infos"


def test_json_has_every_finding():
    told = json.loads(audit.as_json([ERROR, *INFO]))
    assert [Finding(**each) for each in told["findings"]] == [ERROR, *INFO]
    assert told["counts"] == {"error": 1, "warning": 0, "info": 5}


def test_options_carry_both_kinds_of_flags():
    options = audit.options_of(None, values_of("--keras_file=a.keras", "--imports=b,c"), [])
    expected = {"keras_file": "a.keras", "imports": ["b", "c"], "tolerance": 0.05, "plot": "runs/audit/comparison.png"}
    assert options == types.SimpleNamespace(**expected)


class Naive(keras.layers.Layer):
    """Keeps 2048 plus a little, which float16 rounds away."""

    def call(self, x):
        return x + 2048.0 - 2048.0


def test_comparison_names_where_half_parts_and_draws_it(tmp_path):
    def build_model(options, data):
        x = keras.Input([8])
        y = Naive(name="naive")(keras.layers.Dense(8, name="body")(x) / 64.0)
        return keras.Model(x, keras.layers.Dense(2, dtype="float32", name="head")(y))

    options = {"tolerance": 0.05, "plot": str(tmp_path / "new" / "plot.png")}
    for changes, layer in (({"build_model": build_model}, "naive"), ({}, None)):
        task = tiny_task(**changes)
        given = types.SimpleNamespace(**vars(options_for(task)) | options)
        compared = audit.compared_with_float32(task, given)
        assert (compared.forward and compared.forward.layer) == layer
        assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")
    given.plot = str(tmp_path / "new" / "plot.png" / "more.png")
    with pytest.raises(runner.AppError, match=r"--plot=.*choose another file"):
        audit.compared_with_float32(task, given)
    given = types.SimpleNamespace(**vars(options_for(task, "--dtype_policy=float32")) | options)
    with pytest.raises(runner.AppError, match="nothing to measure; choose another --dtype_policy"):
        audit.compared_with_float32(task, given)


@pytest.mark.parametrize(
    ("app", "given", "message"),
    [
        (False, ["--keras_file=a.keras", "--compare"], "--compare needs a loss and a batch: give --app"),
        (True, ["--tolerance=0.1"], "--tolerance has no effect without --compare"),
        (True, ["--plot=a.png"], "--plot has no effect without --compare"),
    ],
)
def test_what_only_a_comparison_needs(app, given, message):
    with pytest.raises(runner.AppError, match=message):
        audit.options_of(tiny_task() if app else None, values_of(*given), [])
