"""Runs the command line, in this process or in a child process, and finds the files of small runs."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import structlog
import yaml
from typer.testing import CliRunner

import memtail
from memtail.cli.app import app, main
from memtail.errors import MemtailError

MEMTAIL = [sys.executable, "-m", "memtail"]


@dataclass(frozen=True)
class Answer:
    """Exit code and output of a command."""

    returncode: int
    stdout: str
    stderr: str


def command(*arguments: object, env: Mapping[str, str] | None = None) -> Answer:
    """Run `memtail` in this process, which saves the imports of a child process.

    Args:
        arguments: arguments of the command line.
        env: the complete environment; by default this process's.
    """
    output, errors = io.StringIO(), io.StringIO()
    terminate = signal.getsignal(signal.SIGTERM)
    with (
        mock.patch.dict(os.environ, os.environ if env is None else env, clear=True),
        mock.patch.object(sys, "argv", ["memtail", *map(str, arguments)]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            main()
            code: Any = 0
        except SystemExit as ended:
            code = ended.code
        finally:
            signal.signal(signal.SIGTERM, terminate)
            structlog.reset_defaults()
    return Answer(int(code or 0), output.getvalue(), errors.getvalue())


def invoke(store: str, *arguments: object, code: int = 0, answer: str | None = None) -> str:
    """Run a command on a store in this process, and raise the error that users would see.

    Args:
        store: its address.
        arguments: arguments of the command line, without the store.
        code: the expected exit code.
        answer: text on the standard input.

    Returns:
        The standard output.
    """
    result = CliRunner().invoke(app, [*map(str, arguments), "--store", store], input=answer)
    if isinstance(result.exception, MemtailError):
        raise result.exception
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout


def command_in_process(*arguments: object, env: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """Run `memtail` in a child process."""
    return subprocess.run([*MEMTAIL, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300, env=env)


def module_path(folder: Path) -> dict[str, str]:
    """Return an environment in which Python searches a folder for modules first."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


def write_spec(folder: Path, name: str = "digits", **parts: Any) -> Path:
    """Write an experiment file of 60 short trials on digits in shards of 5."""
    content: dict[str, Any] = {
        "name": name,
        "dataset": {"name": "digits"},
        "model": {"name": "mlp", "hidden": [32]},
        "training": {"epochs": 4},
        "subsets": {"trials": 60},
        "execution": {"trials_per_shard": 5, "device": "cpu"},
    }
    for key, value in parts.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) and key in content else value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def batches(store: Path, name: str = "digits") -> list[Path]:
    """Return the files of an experiment's trial batches."""
    return sorted((Path(store) / "experiments" / name / "trials").glob("*.npz"))


def version(store: Path, name: str = "digits") -> Path:
    """Return the folder of the latest scores."""
    return memtail.load_scores(Path(store) / "experiments" / name).folder


def same_files(one: Path, other: Path) -> bool:
    """Return whether two folders hold files of equal names and bytes."""
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )
