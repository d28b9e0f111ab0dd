"""The trainer process: `python -m memtail.trainers.child FD` trains what `memtail.trainers.process` sends over a socket."""

import json
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from memtail import logs
from memtail.datasets import ImageDataset
from memtail.errors import MemtailError, SpecError, TrainingStopped, UnsupportedError, WorkerFaultError
from memtail.processes import keep_memory, kill_session
from memtail.spec import Experiment, FunctionTrainer, ImagesTrainer, TrainerSpec
from memtail.spec.trainer import code_digest
from memtail.trainers.command import Command
from memtail.trainers.function import Function
from memtail.trainers.user_shard import train_user_shard
from memtail.trials import TrialBatch


class _Parent:
    """The process that started this one: messages to it, and its request to stop."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._stopping = threading.Event()
        self._work: list[tuple[dict[str, Any], bytes | None]] = []
        self._has_work = threading.Condition()
        threading.Thread(target=self._receive, daemon=True).start()

    def next(self) -> tuple[dict[str, Any], bytes | None]:
        """Wait for a shard; return its message and checkpoint."""
        with self._has_work:
            self._has_work.wait_for(lambda: self._work)
            return self._work.pop(0)

    def send(self, message: dict[str, Any], data: bytes | None = None) -> None:
        """Send a message, and bytes after it."""
        with self._sending:
            self._connection.send_bytes(json.dumps(message).encode())
            if data is not None:
                self._connection.send_bytes(data)

    def progress(self, fraction: float) -> None:
        """Report the trained part of the shard."""
        self.send({"progress": fraction})

    def finished(self, trial: int) -> None:
        """Report a trained trial."""
        self.send({"finished": trial})

    def save(self, state: bytes) -> None:
        """Have a checkpoint kept."""
        self.send({"save": len(state)}, state)

    def should_stop(self) -> bool:
        """Return whether the parent asked to stop."""
        return self._stopping.is_set()

    def _receive(self) -> None:
        try:
            while True:
                message = json.loads(self._connection.recv_bytes())
                if "stop" in message:
                    self._stopping.set()
                    continue
                checkpoint = self._connection.recv_bytes() if message["checkpoint"] else None
                self._stopping.clear()
                with self._has_work:
                    self._work.append((message, checkpoint))
                    self._has_work.notify()
        except (EOFError, OSError):  # the parent has ended
            kill_session(os.getpid())


class _Child:
    def __init__(self, parent: _Parent) -> None:
        self._parent = parent
        self._trainer: Function | Command | None = None
        self._opened: dict[str, ImageDataset] = {}

    def serve(self) -> None:
        """Train one shard after the other until the parent ends this process."""
        while True:
            message, checkpoint = self._parent.next()
            try:
                batch = self._train(message["train"], message["device"], checkpoint)
                answer, data = {"batch": True}, batch.to_bytes()
            except BaseException as error:  # also SystemExit and KeyboardInterrupt of user code
                answer, data = _described(error), None
            self._parent.send(answer, data)

    def _train(self, work: dict[str, Any], device: str, checkpoint: bytes | None) -> TrialBatch:
        experiment, code = Experiment.parse(work["experiment"]), Path(work["code"])
        if work["dataset"] not in self._opened:
            self._opened = {work["dataset"]: ImageDataset.open(Path(work["dataset"]))}
        dataset = self._opened[work["dataset"]]
        trials = range(work["first"], work["last"] + 1)
        sys.path.extend(part for part in work["path"] if part not in sys.path)  # of a script that runs an experiment
        trainer = self._user_trainer(experiment.trainer, code, work["trainer_code"])
        self._parent.send({"ready": trainer.takes_many})
        return train_user_shard(experiment, work["fingerprint"], dataset, trials, device, trainer, self._parent, checkpoint)

    def _user_trainer(self, declared: TrainerSpec, code: Path, digest: str) -> Function | Command:
        """The user's code, imported once per process."""
        if isinstance(declared, ImagesTrainer):
            raise UnsupportedError("the built-in trainer needs no trainer process")
        if self._trainer is None:
            declared = declared.model_copy(update={"folder": code})
            try:
                here = code_digest(declared, [part for part in sys.path if part != str(code)])
            except SpecError as error:
                raise UnsupportedError(f"its training code is not on this machine: {error}") from None
            if here != digest:
                raise UnsupportedError(f"its training code differs from that in {code}: digest {digest[:12]}, here {here[:12]}")
            self._trainer = Function(declared, code) if isinstance(declared, FunctionTrainer) else Command(declared, code)
        return self._trainer


def _described(error: BaseException) -> dict[str, Any]:
    if isinstance(error, TrainingStopped):
        kind = "stopped"
    elif isinstance(error, UnsupportedError):
        kind = "unsupported"
    elif isinstance(error, WorkerFaultError):
        kind = "worker"
    else:
        kind = "shard"
    message = str(error) if isinstance(error, MemtailError) else f"{type(error).__name__}: {error}"
    return {"error": kind, "message": message, "traceback": "".join(traceback.format_exception(error))}


def main() -> None:
    """Serve the parent over the socket whose number is the first argument."""
    logs.configure()
    keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    _Child(_Parent(Connection(int(sys.argv[1])))).serve()


if __name__ == "__main__":
    main()
