"""Imports of whole programs: they load no slow modules, and work without the extras that they do not need."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from memtail.storage.local import LocalStore
from tests.support.arrays import write_arrays, write_mnist
from tests.support.cli import command_in_process, module_path, write_spec

FEW = {"subsets": {"trials": 8, "design": "balanced", "fraction": 0.5}}


def python(code: str, *arguments: object) -> None:
    """Run code in a new process, and fail if an assertion in it fails."""
    ended = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Write an experiment file with a dataset that needs no scikit-learn."""
    return write_spec(tmp_path, "tiny", dataset={"name": "arrays", "root": str(write_arrays(tmp_path / "tiny.npz"))}, **FEW)


def test_scores_are_read_without_torch_or_pandas(explored: LocalStore) -> None:
    python(
        "import sys, memtail\n"
        "scores = memtail.load_scores(sys.argv[1])\n"
        "assert len(scores.most_memorized(5)['mem']) == 5 and len(scores.pairs['infl']) >= 0\n"
        "assert not {'pandas', 'torch', 'pyarrow.dataset'} & sys.modules.keys()\n"
        "scores.memorization; scores.top_influencers(0)\n"
        "import memtail.scores.publish, memtail.estimators, memtail.statistics\n"
        "assert 'torch' not in sys.modules",
        explored.root / "experiments" / "digits",
    )


def test_results_of_studies_are_read_without_torch_or_matplotlib(explored: LocalStore) -> None:
    python(
        "import sys; from memtail.storage.local import LocalStore; from memtail.studies.result import load_results\n"
        "assert load_results(LocalStore(sys.argv[1]), 'odd')[0].figure_svg()\n"
        "assert not {'torch', 'matplotlib', 'pandas', 'scipy'} & sys.modules.keys()",
        explored.root,
    )


def test_report_modules_load_neither_torch_nor_pandas() -> None:
    python("import sys, memtail.report.page, memtail.report.publish; assert not {'torch', 'pandas', 'scipy'} & sys.modules.keys()")


@pytest.mark.parametrize("name", ["run", "plan"])
def test_a_mistake_in_an_experiment_file_is_answered_before_slow_modules_are_loaded(name: str, tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("name: e\ndataset: {name: mnst}\n")
    python(
        "import sys; from typer.testing import CliRunner; from memtail.cli.app import app\n"
        "error = CliRunner().invoke(app, sys.argv[1:]).exception\n"
        "assert str(error).endswith(\"there is no 'mnst': did you mean 'mnist'?\"), error\n"
        "assert not {'torch', 'numpy', 'scipy'} & sys.modules.keys()",
        name,
        tmp_path / "e.yaml",
    )


def test_help_loads_no_slow_modules() -> None:
    python(
        "import sys; from typer.testing import CliRunner; from memtail.cli.app import app\n"
        "assert 'removal' in CliRunner().invoke(app, ['study', '--help']).stdout\n"
        "assert not {'torch', 'matplotlib', 'numpy', 'scipy'} & sys.modules.keys()"
    )


def test_the_health_check_loads_no_slow_modules() -> None:
    """The health check runs every few seconds in each container."""
    python("import sys, services.tools.healthcheck; assert not {'numpy', 'pydantic', 'celery'} & sys.modules.keys()")


WITHOUT_TORCH = """
import json, sys
from memtail.cli.app import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["memtail", *arguments]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, arguments
    loaded = {"torch", "torchvision", "sklearn"} & sys.modules.keys()
    assert not loaded, (arguments, loaded)
"""


def without_torch(store: Path, *commands: list[str]) -> None:
    """Run commands on a store, one after the other; fail if one loads a training package."""
    python(WITHOUT_TORCH, json.dumps([[*arguments, "--store", str(store)] for arguments in commands]))


def test_commands_that_do_not_train_load_no_torch(explored: LocalStore, tiny: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(explored.root, store)
    without_torch(
        store,
        ["stage", str(tiny)],
        ["status"],
        ["status", "--json"],
        ["watch", "digits"],
        ["failures", "digits"],
        ["retry", "digits"],
        ["pause", "young"],
        ["resume", "young"],
        ["priority", "young", "3"],
        ["cancel", "young"],
        ["top", "digits"],
        ["top", "digits", "--pairs"],
        ["top", "digits", "--influencers-of", "0"],
        ["scores", "digits", "--fetch", str(tmp_path / "scores")],
        ["report", "digits", "--fetch", str(tmp_path / "report")],
    )


def test_submit_loads_no_torch(tiny: Path, tmp_path: Path) -> None:
    write_mnist(tmp_path / "data")
    mnist = write_spec(tmp_path, "mnist", dataset={"name": "mnist", "root": str(tmp_path / "data")}, **FEW)
    without_torch(tmp_path / "store", ["submit", str(tiny)], ["submit", str(mnist)])


def test_a_bucket_without_the_required_package_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "minio.py").write_text("raise ModuleNotFoundError(\"No module named 'minio'\", name='minio')")
    result = command_in_process("status", "--store", "s3://bucket", env=module_path(tmp_path))
    assert result.returncode == 2
    assert result.stderr.endswith("s3://bucket: this needs minio, which is not installed: pip install 'memtail[services]'\n")


def test_modules_need_no_package_of_the_extra_train_but_torch() -> None:
    """The images of the services have none of them: a module that imports another one at its start keeps the aggregator from starting."""
    python(
        """
import importlib, pkgutil, sys
import memtail, services.aggregator, services.dispatcher
sys.modules.update(dict.fromkeys(["torch", "torchvision", "scipy", "sklearn", "safetensors"]))
missing = {}
for package in (memtail, services.aggregator, services.dispatcher):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.startswith("memtail.testing") and not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                missing[module.name] = error.name
others = {module: name for module, name in missing.items() if name.partition(".")[0] != "torch" or module.startswith("services")}
assert others == {}, others
assert missing
"""
    )
