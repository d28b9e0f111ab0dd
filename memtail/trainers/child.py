"""The trainer process: trains what `memtail.trainers.process` sends over a channel. `memtail.trainers.guardian` starts it."""

import faulthandler
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import structlog
import torch

from memtail import logs
from memtail.datasets import Dataset, open_dataset
from memtail.errors import DatasetError, MemtailError, SpecError, TrainingStopped, UnsupportedError, WorkerFaultError
from memtail.processes import keep_memory
from memtail.spec import Experiment, FunctionTrainer, ImagesTrainer, ImportedTrainer
from memtail.spec.trainer import UserTrainer, code_digest
from memtail.trainers.channel import Channel
from memtail.trainers.checkpoints import LARGEST_STATE
from memtail.trainers.command import Command
from memtail.trainers.function import Function
from memtail.trainers.images.devices import peak_memory
from memtail.trainers.user_network import train_network_shard
from memtail.trainers.user_shard import train_user_shard
from memtail.trials import TrialBatch
from memtail.user_code import describe_fault

log = structlog.get_logger()

# Least seconds between two reports of progress of less than a step: code may report after each of a thousand updates a second.
_REPORT_SECONDS, _REPORT_STEP = 0.1, 0.01
# Most characters of an error's message and traceback.
_LONGEST_MESSAGE, _LONGEST_TRACEBACK = 10_000, 100_000
# Where an access was refused.
_HINT = (
    ": user code cannot change the store and the datasets, nor make files in the folders that lead to them: write to task.workdir or TMPDIR"
)
# Folder of memtail's code, and the file that calls functions.
_PACKAGE, _CALLER = Path(__file__).parents[1], str(Path(__file__).with_name("function.py"))
# Largest checkpoint that is taken, in bytes: any, since the other side is trusted.
_LARGEST = 1 << 62


class _Parent:
    """The process with credentials: messages to it, and its request to stop."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._stopping = threading.Event()
        self._reported = self._fraction = 0.0
        self._work: queue.SimpleQueue[tuple[dict[str, Any], bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._receive, daemon=True).start()

    def next(self) -> tuple[dict[str, Any], bytes | None]:
        """Wait for work; return its message, and a checkpoint if there is one."""
        message, checkpoint = self._work.get()
        return message, checkpoint if message.get("checkpoint") else None

    def send(self, message: dict[str, Any], data: bytes = b"") -> None:
        """Send a message, and bytes with it."""
        self._channel.send(message, data)

    def progress(self, fraction: float) -> None:
        """Report the trained part of the shard."""
        now = time.monotonic()
        if abs(fraction - self._fraction) >= _REPORT_STEP or fraction >= 1 or now - self._reported >= _REPORT_SECONDS:
            self._reported, self._fraction = now, fraction
            self.send({"progress": fraction})

    def step(self) -> None:
        """Report that training advances."""
        if (now := time.monotonic()) - self._reported >= _REPORT_SECONDS:
            self._reported = now
            self.send({"step": True})

    def finished(self, trial: int) -> None:
        """Report a trained trial."""
        self.send({"finished": trial})

    def save(self, state: bytes) -> None:
        """Have a checkpoint kept, if it is not too large."""
        if len(state) > LARGEST_STATE:
            log.warning("checkpoint not kept, training continues", bytes=len(state), largest=LARGEST_STATE)
            return
        self.send({"save": True}, state)

    def keep_model(self, trial: int, model: bytes) -> None:
        """Have the model of a trained trial kept."""
        self.send({"model": trial}, model)

    def warn(self, message: str, trials: str) -> None:
        """Have a warning logged."""
        self.send({"warning": message, "trials": trials})

    def should_stop(self) -> bool:
        """Return whether the parent asked to stop."""
        return self._stopping.is_set()

    def _receive(self) -> None:
        try:
            while True:
                received = self._channel.receive()
                if received is None:
                    continue
                if "stop" in received[0]:
                    self._stopping.set()
                elif "show" in received[0]:
                    faulthandler.dump_traceback(file=2)
                else:
                    self._stopping.clear()
                    self._work.put(received)
        except (EOFError, OSError, ValueError):  # the parent has ended, or user code has closed or read the connection
            os.write(2, b"the trainer process has lost its connection to memtail\n")
            os._exit(1)


class _Child:
    def __init__(self, parent: _Parent) -> None:
        self._parent = parent
        self._trainer: Function | Command | None = None
        self._declared: UserTrainer | None = None
        self._opened: dict[str, Dataset] = {}

    def serve(self) -> None:
        """Train one shard after the other until this process is killed."""
        while True:
            message, checkpoint = self._parent.next()
            try:
                if "check" in message:
                    answer, data = _check(message["check"], message["devices"], message["count"]), b""
                else:
                    batch = self._train(message["train"], message["device"], checkpoint)
                    answer, data = {"batch": True, "peak_memory": peak_memory(torch.device(message["device"]))}, batch.to_bytes()
            except BaseException as error:  # also SystemExit and KeyboardInterrupt of user code
                answer, data = _described(error, self._declared), b""
            self._parent.send(answer, data)

    def _train(self, work: dict[str, Any], device: str, checkpoint: bytes | None) -> TrialBatch:
        experiment, code = Experiment.parse(work["experiment"]), Path(work["code"])
        try:
            dataset = self._dataset(work["dataset"])
        except (DatasetError, OSError) as error:
            raise WorkerFaultError(f"the dataset cannot be opened: {error}") from error
        trials = range(work["first"], work["last"] + 1)
        if isinstance(experiment.trainer, ImagesTrainer | ImportedTrainer):
            _search(code)
            self._parent.send({"ready": True})
            return train_network_shard(experiment, dataset, trials, device, self._parent, checkpoint)
        if self._trainer is None:
            declared = self._declared = _checked(experiment.trainer, code, work["trainer_code"])
            # from here on nothing that is raised is the fault of this machine
            self._parent.send({"importing": True})
            paths = [str(code), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
            os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # of commands and other programs that user code starts
            self._trainer = Function(declared, code) if isinstance(declared, FunctionTrainer) else Command(declared, code)
        self._parent.send({"ready": self._trainer.takes_many})
        return train_user_shard(experiment, work["fingerprint"], dataset, trials, device, self._trainer, self._parent, checkpoint)

    def _dataset(self, folder: str) -> Dataset:
        if folder not in self._opened:
            self._opened = {folder: open_dataset(Path(folder))}
        return self._opened[folder]


def _check(work: dict[str, Any], devices: list[str] | None, count: bool) -> dict[str, Any]:
    """Check a network, and return the answer to the parent."""
    from memtail.trainers.images.shard_size import checked_shard_size, operations_per_trial

    _search(Path(work["code"]))
    experiment, dataset = Experiment.parse(work["experiment"]), open_dataset(Path(work["dataset"]))
    size = checked_shard_size(experiment, dataset, None if devices is None else [torch.device(device) for device in devices])
    return {"trials_per_shard": size, "operations": operations_per_trial(experiment, dataset) if count else 0.0}


def _search(code: Path) -> None:
    """Have networks searched in the folder of the code too, after the Python path."""
    if str(code) not in sys.path:
        sys.path.append(str(code))


def _checked(trainer: UserTrainer, code: Path, digest: str) -> UserTrainer:
    """Return the declaration of the trainer, if the code on this machine is the experiment's. Raises: UnsupportedError."""
    declared = trainer.model_copy(update={"folder": code})
    try:
        here = code_digest(declared, [part for part in sys.path if part != str(code)])
    except SpecError as error:
        raise UnsupportedError(f"its training code is not on this machine: {error}") from None
    if here != digest:
        raise UnsupportedError(f"its training code differs from that in {code}: digest {digest[:12]}, here {here[:12]}")
    return declared


def _described(error: BaseException, trainer: UserTrainer | None) -> dict[str, Any]:
    kinds = {TrainingStopped: "stopped", UnsupportedError: "unsupported", WorkerFaultError: "worker"}
    kind = next((kind for cause, kind in kinds.items() if isinstance(error, cause)), "shard")
    try:
        message = str(error) if isinstance(error, MemtailError | TrainingStopped) else _fault(error, trainer)
        text = "" if isinstance(error, MemtailError) and _is_own(error) else "".join(traceback.format_exception(error))
        if isinstance(error, PermissionError):
            message += _HINT
    except Exception:  # an exception of user code may not know how to be shown
        message = text = type(error).__name__
    return {"error": kind, "message": message[:_LONGEST_MESSAGE], "traceback": text[-_LONGEST_TRACEBACK:]}


def _fault(error: BaseException, trainer: UserTrainer | None) -> str:
    """Return the message of an exception, of a function with its name and the last place in its folder."""
    called = any(frame.filename == _CALLER for frame in traceback.extract_tb(error.__traceback__))
    if called and isinstance(trainer, FunctionTrainer) and trainer.folder is not None:
        return f"trainer.function '{trainer.function}' failed: {describe_fault(error, trainer.folder)}"
    return f"{type(error).__name__}: {error}"


def _is_own(error: BaseException) -> bool:
    """Return whether memtail itself found the fault, so that a traceback shows nothing of the user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    return error.__cause__ is None and all(Path(frame.filename).is_relative_to(_PACKAGE) for frame in frames)


def serve(connection: int) -> None:
    """Serve the parent over a socket, by its number."""
    os.set_inheritable(connection, False)
    logs.configure()
    keep_memory()
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    _Child(_Parent(Channel(socket.socket(fileno=connection), _LARGEST))).serve()
