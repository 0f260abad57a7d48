"""Rules of the house, enforced: which way imports run, what the README's tree says, that tests mirror the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("tfhalf/**/*.py"), *ROOT.glob("apps/**/*.py"), *ROOT.glob("benchmarks/**/*.py")])

# What each module may import of ours; a package's name stands for all inside it.
LAYERS = [
    {"tfhalf.manifest", "tfhalf.converters", "tfhalf.runtimes", "tfhalf.lowering", "tfhalf.folding"},
    {"tfhalf.operations", "tfhalf.signing", "tfhalf.publishing", "tfhalf.equivalence"},
    {"tfhalf.precision", "tfhalf.processor", "tfhalf.replay", "tfhalf.bundle", "tfhalf.distribution"},
    {"tfhalf.kernels", "tfhalf.optimizer", "tfhalf.checkpoint", "tfhalf.freezing", "tfhalf.latency"}
    | {"tfhalf.versions", "tfhalf.batching", "tfhalf.rest", "tfhalf.cast_once"},
    {
        "tfhalf.recurrent",
        "tfhalf.reporting",
        "tfhalf.compilation",
        "tfhalf.evidence",
        "tfhalf.taps",
        "tfhalf.exponents",
        "tfhalf.workload",
        "tfhalf.hardware",
        "tfhalf.fastest",
        "tfhalf.rpc",
        "tfhalf.engine",
        "tfhalf.front",
    },
    {"tfhalf.acceleration", "tfhalf.training", "tfhalf.export", "tfhalf.datasets"}
    | {"tfhalf.footprint", "tfhalf.hazards", "tfhalf.board", "tfhalf.twins", "tfhalf.bundle_watch", "tfhalf.serving"},
    {
        "tfhalf.trial",
        "tfhalf.remembered",
        "tfhalf.recorder",
        "tfhalf.scale_window",
        "tfhalf.comparison",
        "tfhalf.importing",
        "tfhalf.convert",
        "tfhalf.sensitivity",
        "tfhalf.islands",
        "tfhalf.metrics",
    },
    {"tfhalf.numerics", "tfhalf.choice", "tfhalf.search", "tfhalf.clearance"},
    {"tfhalf"},
    {"apps.summary"},
    {"apps.runner", "apps.figures", "apps.drawing", "apps.scores", "apps.audio.waveforms", "apps.processes"},
    {"apps.sets", "apps.presets", "apps.optimizers", "apps.any_app", "apps.paired_runs"},
    {"apps.batches", "apps.parity_report"},
    {"apps.inference_parity"},
    {"apps"},
    {"benchmarks"},
]
# Modules of one layer don't know each other; only the files of one folder do.


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(name: str) -> int:
    while True:
        for index, layer in enumerate(LAYERS):
            if name in layer:
                return index
        name = name.rpartition(".")[0]


def own_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                place = ROOT / name.replace(".", "/")
                found.add(name if place.is_dir() or place.with_suffix(".py").exists() else node.module)
    return {name for name in found if name.split(".")[0] in ("tfhalf", "apps", "benchmarks", "tests")}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_run_one_way(path):
    name = module_name(path)
    for imported in own_imports(path):
        assert imported.split(".")[0] != "tests"
        folder = path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        inside = folder not in ("tfhalf", "apps") and imported.startswith(folder)
        assert layer_of(imported) < layer_of(name) or inside, imported


# What may use private Keras, and what else is private and has no public way.
PRIVATE_KERAS = {"tfhalf.precision", "tfhalf.optimizer", "tfhalf.acceleration", "tfhalf.compilation"}
PRIVATE = {"tfhalf.workload": {"_get_function"}, "tfhalf.datasets.bible_en_es": {"_decompressed_text"}}


def private_names(path: Path) -> set[str]:
    """Attributes that begin with an underscore, and that the file itself doesn't define."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    used = [node for node in nodes if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr)]
    on_self = [node for node in used if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")]
    own |= {node.attr for node in on_self}
    return {node.attr for node in used} - own


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_private_names_stay_where_they_may_be(path):
    name = module_name(path)
    if name not in PRIVATE_KERAS:
        assert private_names(path) <= PRIVATE.get(name, set())


def test_flags_live_in_programs_only():
    for path in ROOT.glob("tfhalf/**/*.py"):
        assert "absl" not in path.read_text(), path


def test_library_does_not_print():
    for path in ROOT.glob("tfhalf/**/*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"], path


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} says not what it is for"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name}"


def test_files_have_a_test_that_mirrors_them():
    places = {"tfhalf": ROOT / "tests", "apps": ROOT / "tests" / "apps"}
    covered_elsewhere = {
        "tfhalf/__init__.py",
        "apps/__init__.py",
        "apps/audio/__init__.py",
        "apps/image/__init__.py",
        "apps/text/__init__.py",
        # Programs: the tests of what starts them run them.
        "tfhalf/replay.py",
        "tfhalf/converters.py",
        "tfhalf/runtimes.py",
    }
    for path in SOURCES:
        relative = path.relative_to(ROOT)
        if str(relative) in covered_elsewhere or relative.parts[0] not in places:
            continue
        name = relative.parts[-2] if relative.name == "__init__.py" else relative.stem
        expected = places[relative.parts[0]].joinpath(*relative.parts[1:-1], f"test_{name}.py")
        assert expected.exists(), f"{relative} has no {expected.relative_to(ROOT)}"


def test_readme_tree_is_the_tree():
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"## Files\n.*?```\n(.*?)```", readme, re.DOTALL).group(1)
    named, folders = set(), []
    for line in block.splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        entry = line.split()[0]
        folders = folders[:indent]
        if entry.endswith("/"):
            folders.append(entry)
        else:
            named.add("".join(folders) + entry)
    made = (".git", ".venv", ".hypothesis", ".pytest_cache", ".ruff_cache", "__pycache__", "runs", "tfhalf.egg-info")
    real = {path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()}
    kept = {str(path) for path in real if not set(path.parts) & set(made)}
    bundles = {name for name in kept if re.fullmatch(r"saved_models/.+/.+", name)}
    assert named == kept - bundles
    assert all(len(line.split(maxsplit=1)) == 2 or line.rstrip().endswith("/") for line in block.splitlines())


def test_readme_flags_and_commands_exist():
    readme = (ROOT / "README.md").read_text()
    for module in set(re.findall(r"-m (apps\.[\w.]+|benchmarks\.[\w.]+)", readme)):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make (\w+)", readme)) - {"a", "it"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
