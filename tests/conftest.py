"""What several tests share: real data, one real training run, one bundle."""

import collections
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests import modules

ROOT = Path(__file__).parents[1]
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
pytest.register_assert_rewrite("tests.apps.contract")


def run_module(*arguments: str, timeout: float = 300, is_forked: bool = True) -> subprocess.CompletedProcess:
    """Runs `python -m ...` in the project's folder: from a process that has TensorFlow, or as a shell does."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if is_forked:
        return modules.run(list(arguments), ROOT, environment, timeout)
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def options_for(task, *arguments: str):
    """Returns what `arguments` on the command line of a task's app give to its functions."""
    from absl import flags

    from apps import runner

    values = flags.FlagValues()
    names = runner.define_flags(task, values)
    values(["test", *arguments])
    return runner.options_of(values, names)


def _needs_data(item: pytest.Item) -> bool:
    return "data_dir" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that need data sets come last: the sets are fetched while the others run. Of each kind the long come first.

    Workers take files in this order by --no-loadscope-reorder.
    """
    waiting = {item.path for item in items if _needs_data(item)}
    slow = collections.Counter(
        item.path for item in items if item.get_closest_marker("slow") and not item.get_closest_marker("soak")
    )
    items.sort(key=lambda item: (item.path in waiting, -slow[item.path]))


def _once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder for all workers: the first one makes what is in it, the others wait."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session", autouse=True)
def _fetching(request, tmp_path_factory) -> Iterator[Future | None]:
    """The folder of the data sets, some time; nothing is fetched where no test needs it."""
    tmp_path_factory.getbasetemp()  # or the thread and the first test would both make it
    with ThreadPoolExecutor(1) as thread:
        needed = any(map(_needs_data, request.session.items))
        yield thread.submit(_once, tmp_path_factory, "data", _fetch) if needed else None


@pytest.fixture(scope="session")
def data_dir(_fetching) -> str:
    """TFDS's folder with the apps' real default sets, fetched by the program that users run."""
    return str(_fetching.result())


def _fetch(folder: Path) -> None:
    names = ["mnist_5k", "deepforest", "blue_marble", "reuters_r8", "vader_movies"]
    if shutil.which("apt-get"):  # these are Debian's packages
        names += ["bible_en_es", "fillets_cs", "fillets_noisy", "gcin_tones"]
    result = run_module(
        "apps.data", f"--dataset={','.join(names)}", f"--data_dir={folder}", timeout=900, is_forked=False
    )
    assert result.returncode == 0, result.stderr
    assert "train 4,000, test 1,000" in result.stdout


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data_dir):
    """A short run of the real command line in mixed_float16: (arguments, its folder, what it printed)."""
    arguments = ["apps.image.classification", f"--data_dir={data_dir}", "--epochs=2", "--steps_per_epoch=40"]
    arguments += ["--batch_size=48", "--seed=3"]

    def train(folder: Path) -> None:
        places = f"--workdir={folder}/run", f"--saved_model_dir={folder}/saved_models"
        result = run_module(*arguments, *places, is_forked=False)
        assert result.returncode == 0, result.stderr
        (folder / "printed").write_text(result.stdout)

    folder = _once(tmp_path_factory, "trained", train)
    return arguments, folder, (folder / "printed").read_text()


@pytest.fixture(scope="session")
def app_bundles(tmp_path_factory, data_dir) -> Path:
    """A base folder with a bundle of every app, each after a few steps of its real command line. It takes minutes."""
    from tests.apps import contract

    folder = tmp_path_factory.mktemp("apps")
    for module in contract.MODULES:
        arguments = [f"--data_dir={data_dir}", "--epochs=1", "--steps_per_epoch=4", "--batch_size=16"]
        arguments += [*contract.SMALLER.get(module, []), f"--workdir={folder}/runs/{module}"]
        result = run_module(module, *arguments, f"--saved_model_dir={folder}/saved_models", timeout=1800)
        assert result.returncode == 0, result.stderr
    return folder / "saved_models"


@pytest.fixture
def build_convnet():
    """A function that builds a small network with the layers that matter to half precision."""
    import keras

    def build(policy: str = "mixed_float16", output: str | None = "float32") -> keras.Model:
        before = keras.config.dtype_policy()
        keras.utils.set_random_seed(1)
        keras.config.set_dtype_policy(policy)
        try:
            pictures = keras.Input([8, 8, 3], name="picture")
            x = keras.layers.Conv2D(16, 3, padding="same", name="conv")(pictures)
            x = keras.layers.BatchNormalization(name="norm")(x)
            x = keras.layers.Activation("relu", name="relu")(x)
            x = keras.layers.Dropout(0.3, seed=2, name="dropout")(x)
            x = keras.layers.Flatten(name="flatten")(x)
            x = keras.layers.Dense(64, activation="relu", name="dense")(x)
            x = keras.layers.Dense(3, dtype=output, name="head")(x)
            return keras.Model(pictures, x, name="small")
        finally:
            keras.config.set_dtype_policy(before)

    return build


@pytest.fixture
def pictures() -> np.ndarray:
    """Twelve random pictures, float32 [12, 8, 8, 3]."""
    return np.random.default_rng(5).normal(size=[12, 8, 8, 3]).astype("float32")


@pytest.fixture(scope="session")
def trained_model():
    """A mixed_float16 model whose BatchNormalization has real statistics."""
    import keras

    import tfhalf

    keras.utils.set_random_seed(4)
    with tfhalf.PrecisionPlan().scope():
        inputs = keras.Input([16, 16, 3], name="picture")
        x = keras.layers.Conv2D(32, 3, name="conv")(inputs)
        x = keras.layers.BatchNormalization(name="norm")(x)
        x = keras.layers.LeakyReLU(name="act")(x)
        x = keras.layers.MaxPooling2D(4)(x)
        x = keras.layers.Reshape([9, 32])(x)
        x = keras.layers.Bidirectional(keras.layers.GRU(32, return_sequences=True, name="gru"), name="both")(x)
        x = keras.layers.MultiHeadAttention(2, 16, name="attention")(x, x)
        x = keras.layers.Flatten()(x)
        x = keras.layers.Dense(256, activation="gelu", name="dense")(x)
        model = keras.Model(inputs, keras.layers.Dense(10, dtype="float32", name="logits")(x))
    random = np.random.default_rng(0)
    model.compile("adam", "mse")
    model.fit(random.normal(3, 2, [64, 16, 16, 3]), random.normal(size=[64, 10]), verbose=0, epochs=2)
    return model


@pytest.fixture(scope="session")
def samples() -> np.ndarray:
    """Six held-out pictures for `trained_model`."""
    return np.random.default_rng(1).normal(3, 2, [6, 16, 16, 3]).astype("float32")


@pytest.fixture(scope="session")
def bundle(trained_model, samples, tmp_path_factory) -> Path:
    """The bundle of `trained_model`; tests that change it use `copy`."""
    import tfhalf

    folder = tmp_path_factory.mktemp("base") / "model" / "1"
    tfhalf.export_saved_model(trained_model, folder, inputs=samples, metadata={"task": "test"})
    return folder


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    """A copy of `bundle` to damage."""
    return Path(shutil.copytree(bundle, tmp_path / "copy" / "1"))
