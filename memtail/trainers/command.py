"""A command of the user's as a trainer: it reads `task.json` and writes `outcome.npz`. Runs in a trainer process."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from memtail.errors import OutcomeError, TrainerError, TrainingStopped
from memtail.spec import CommandTrainer
from memtail.trainers.task import Outcome, TrainingTask

# Seconds between two looks at a command and its progress.
_POLL_SECONDS = 0.1
# Seconds that a command has to end after SIGTERM.
GRACE_SECONDS = 20.0


class Command:
    """The command, which is started for each trial.

    Args:
        trainer: the declaration.
        folder: folder of the code, which `{code}` in an argument names.
    """

    takes_many = False

    def __init__(self, trainer: CommandTrainer, folder: Path) -> None:
        self._arguments = [argument.replace("{code}", str(folder)) for argument in trainer.command]
        if "/" in self._arguments[0]:  # below the code, as a shell in that folder takes it
            self._arguments[0] = str(folder / self._arguments[0])
        # arguments that name files of the code stay valid in the scratch folder
        self._arguments[1:] = [str(folder / part) if part and (folder / part).is_file() else part for part in self._arguments[1:]]

    def __call__(self, tasks: Sequence[TrainingTask]) -> Sequence[object]:
        """Train trials, one after the other.

        Raises:
            TrainerError: the command cannot be started, or fails.
            OutcomeError: it wrote no outcome that can be read.
            TrainingStopped: it was told to stop, and ended.
        """
        return [self._train(task) for task in tasks]

    def _train(self, task: TrainingTask) -> Outcome:
        folder = task.workdir.parent
        (folder / "task.json").write_text(json.dumps(_described(task), indent=1))
        np.save(folder / "subset.npy", task.subset)
        try:
            process = subprocess.Popen(
                self._arguments,
                cwd=task.workdir,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "MEMTAIL_TASK": str(folder)},
                process_group=0,
            )
        except OSError as error:
            raise TrainerError(f"command {self._arguments[0]} cannot be started: {error.strerror}: fix trainer.command") from None
        try:
            self._wait(process, task, folder / "progress")
        finally:
            _kill(process, signal.SIGKILL)
            process.wait()
        if process.returncode:
            raise TrainerError(f"command {self._arguments[0]} {describe_exit(process.returncode)}")
        return _outcome(folder / "outcome.npz")

    def _wait(self, process: "subprocess.Popen[bytes]", task: TrainingTask, progress: Path) -> None:
        stopping: float | None = None
        while process.poll() is None:
            if fraction := _fraction(progress):
                task.report(fraction)
            if task.should_stop() and stopping is None:
                stopping = time.monotonic()
                _kill(process, signal.SIGTERM)
            if stopping is not None and time.monotonic() - stopping > GRACE_SECONDS:
                break
            time.sleep(_POLL_SECONDS)
        if stopping is not None:
            task.save()
            raise TrainingStopped


def describe_exit(code: int) -> str:
    """Describe how a process ended: an exit code, or as a negative number a signal."""
    if code >= 0:
        return f"ended with exit code {code}"
    hints = {
        signal.SIGKILL: ": out of memory, or killed",
        signal.SIGBUS: ": /dev/shm may be too small for the workers of a DataLoader: enlarge it, or set num_workers=0",
        signal.SIGSEGV: ": a crash in native code",
    }
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was ended by {name}{hints.get(-code, '')}"  # type: ignore[call-overload]


def _described(task: TrainingTask) -> dict[str, Any]:
    arrays = sorted(task.dataset.folder.glob("*.npy"))
    files = {path.stem: str(path) for path in arrays if task.dataset.labelled or not path.stem.endswith("_labels")}
    return {
        "trial": task.trial,
        "seed": task.seed,
        "device": task.device,
        "options": task.options,
        "n_train": task.dataset.n_train,
        "n_test": task.dataset.n_test,
        "classes": list(task.dataset.classes),
        "dataset": files,
        "subset": str(task.workdir.parent / "subset.npy"),
        "checkpoint": str(task.checkpoint),
        "outcome": str(task.workdir.parent / "outcome.npz"),
        "progress": str(task.workdir.parent / "progress"),
    }


def _fraction(progress: Path) -> float | None:
    try:
        return float(progress.read_text() or 0)
    except (OSError, ValueError):
        return None


def _kill(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """Send a signal to the command and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _outcome(path: Path) -> Outcome:
    names = set(Outcome.__dataclass_fields__)
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise OutcomeError("the command ended without outcome.npz in the folder MEMTAIL_TASK: write the outcomes there") from None
    except Exception as error:  # damaged bytes make numpy raise anything
        raise OutcomeError(f"outcome.npz cannot be read ({error}): write it with numpy.savez, without objects") from None
    if unknown := sorted(arrays.keys() - names):
        raise OutcomeError(f"outcome.npz has unknown arrays ({', '.join(unknown)}): known are {', '.join(sorted(names))}")
    if "metrics" in arrays:
        try:
            arrays["metrics"] = json.loads(str(arrays["metrics"]))
        except ValueError:
            raise OutcomeError("metrics in outcome.npz is no JSON text: write json.dumps({...})") from None
    return Outcome(**arrays)
