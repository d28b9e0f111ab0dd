"""Trainer process: runs code of the user's own, on one device, without credentials. This side starts it and talks to it.

Messages are JSON, and bytes where a message says so, over a socket pair; nothing is unpickled. The process leads a process group, which is
killed with it. It ends when this process does.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import structlog

from memtail.datasets import DatasetLabels
from memtail.errors import TrainerError, TrainingStopped, UnsupportedError, WorkerFaultError
from memtail.experiment_store import Record
from memtail.processes import kill_session
from memtail.subsets import membership
from memtail.trainers.command import GRACE_SECONDS, describe_exit
from memtail.trainers.confinement import trainer_environment
from memtail.trials import Shard, TrialBatch, pack

log = structlog.get_logger()

# Trials after which a process is replaced, so that memory that the code leaks is freed.
_MOST_TRIALS = 10_000
# Seconds between two looks at whether to stop.
_POLL_SECONDS = 0.1
# Seconds that the process has to stop, in which a command has its own grace.
_STOP_SECONDS = GRACE_SECONDS + 10.0
# Bytes of output that a failure record holds, lines per shard that the log holds, and characters of a line in it.
_KEPT_BYTES, _MOST_LINES, _LONGEST_LINE = 64 << 10, 1000, 1000


class Checkpoints(Protocol):
    """The place where the state of one unfinished shard is kept."""

    def load(self) -> bytes | None:
        """Return the state saved last, None if there is none."""
        ...

    def save(self, state: bytes) -> None:
        """Replace the saved state."""
        ...


@dataclass(frozen=True)
class Work:
    """What a trainer process trains.

    Attributes:
        record: of the experiment, with the masks, if any, in a file on this machine.
        dataset: the experiment's dataset.
        shard: the shard.
        code: folder of the user's code.
    """

    record: Record
    dataset: DatasetLabels
    shard: Shard
    code: Path

    def to_json(self) -> dict[str, Any]:
        """The message that begins the training."""
        return {
            "experiment": self.record.experiment.model_dump(mode="json"),
            "fingerprint": self.record.fingerprint,
            "trainer_code": self.record.trainer_code,
            "dataset": str(self.dataset.folder),
            "first": self.shard.first,
            "last": self.shard.last,
            "code": str(self.code),
            "path": [str(Path(part).absolute()) for part in sys.path],
        }


class _RemoteTraceback(Exception):  # noqa: N818 - not raised, but shown as a cause
    """Traceback of the trainer process and the end of its output, as the cause of the error that is raised here."""


class _Output:
    """Reads what the process prints: the log gets the first lines of a shard, a failure record the last ones."""

    def __init__(self, stream: int) -> None:
        self._stream = stream
        self._kept: deque[bytes] = deque()
        self._size = self._lines = 0
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Begin with the output of another shard."""
        self._kept.clear()
        self._size = self._lines = 0

    def text(self) -> str:
        """Return the end of the output."""
        return b"".join(list(self._kept))[-_KEPT_BYTES:].decode("utf-8", "replace")

    def close(self) -> None:
        """Wait until all has been read; children of the process may hold the stream open."""
        self._thread.join(1.0)

    def _read(self) -> None:
        rest = b""
        with os.fdopen(self._stream, "rb", buffering=0) as stream:
            while chunk := stream.read(1 << 16):
                self._kept.append(chunk)
                self._size += len(chunk)
                while self._size - len(self._kept[0]) >= _KEPT_BYTES:
                    self._size -= len(self._kept.popleft())
                *lines, rest = (rest + chunk).split(b"\n")
                rest = rest[-_LONGEST_LINE:]
                for line in lines:
                    self._log(line)

    def _log(self, line: bytes) -> None:
        self._lines += 1
        if self._lines <= _MOST_LINES:
            log.info("trainer", output=line[:_LONGEST_LINE].decode("utf-8", "replace"))
        elif self._lines == _MOST_LINES + 1:
            log.warning("trainer prints too much, the rest is left out", lines=_MOST_LINES)


class TrainerProcess:
    """Runs code of the user's own on one device; the process is replaced whenever it cannot be trusted to train further shards.

    Args:
        device: as torch names it.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._process: subprocess.Popen[bytes] | None = None
        self._serves: tuple[str, Path] | None = None
        self._trials = 0

    def train(
        self,
        work: Work,
        checkpoints: Checkpoints,
        *,
        on_progress: Callable[[float], None],
        on_step: Callable[[], None],
        stop: Callable[[], bool],
    ) -> TrialBatch:
        """Train a shard.

        Args:
            work: the shard.
            checkpoints: where its state is kept.
            on_progress: is called with the trained part of the shard, 0 to 1.
            on_step: is called when training has advanced; several times a second while code is at work that has never reported progress.
            stop: is asked several times a second whether to stop.

        Raises:
            TrainerError: the code raised, its process died, or a trial took longer than `trainer.timeout`.
            TrainingStopped: `stop` returned True.
            UnsupportedError: the code on this machine is not the experiment's.
            WorkerFaultError: the process cannot be started, or its device is at fault.
        """
        self._begin(work)
        state = checkpoints.load()
        usable = False
        try:
            self._send({"train": work.to_json(), "device": self._device, "checkpoint": state is not None}, state)
            batch = self._follow(work, checkpoints, on_progress, on_step, stop)
            _check(batch, work)
            usable = True
            return batch
        except (EOFError, OSError):
            raise (died := self._died()) from died.__cause__  # the last output
        except (TrainingStopped, UnsupportedError):
            usable = True
            raise
        finally:
            self._trials += len(work.shard.trials)
            if not usable or self._trials >= _MOST_TRIALS:
                self.end()

    def end(self) -> None:
        """End the process and all that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        kill_session(process.pid)
        process.wait()
        self._connection.close()
        self._output.close()
        self._scratch.cleanup()

    def _begin(self, work: Work) -> None:
        serves = (work.record.fingerprint, work.code)
        if self._process is not None and (self._serves != serves or self._process.poll() is not None):
            self.end()
        if self._process is None:
            self._start(work)
            self._serves, self._trials = serves, 0
        self._output.begin()

    def _start(self, work: Work) -> None:
        ours, theirs = socket.socketpair()
        reading, writing = os.pipe()
        # its name is short, since sockets of user code may lie in it
        self._scratch = tempfile.TemporaryDirectory(prefix="memtail-", ignore_cleanup_errors=True)
        scratch = self._scratch.name
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "memtail.trainers.child", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                pass_fds=[theirs.fileno()],
                cwd=scratch,
                env=self._environment(work.code, Path(scratch)),
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            os.close(reading)
            raise WorkerFaultError(f"the trainer process cannot be started: {error}") from error
        finally:
            theirs.close()
            os.close(writing)
        self._connection = Connection(ours.detach())
        self._output = _Output(reading)

    def _environment(self, code: Path, scratch: Path) -> dict[str, str]:
        environment = trainer_environment(os.environ, code, scratch)
        if self._device == "cpu":  # there is a process for each core
            environment.setdefault("OMP_NUM_THREADS", "1")
        return environment

    def _send(self, message: dict[str, Any], data: bytes | None = None) -> None:
        self._connection.send_bytes(json.dumps(message).encode())
        if data is not None:
            self._connection.send_bytes(data)

    def _follow(
        self,
        work: Work,
        checkpoints: Checkpoints,
        on_progress: Callable[[float], None],
        on_step: Callable[[], None],
        stop: Callable[[], bool],
    ) -> TrialBatch:
        timeout = getattr(work.record.experiment.trainer, "timeout", None)
        deadline = time.monotonic() + timeout * (len(work.shard.trials)) if timeout else float("inf")
        allowed, stopping, reported = timeout or float("inf"), float("inf"), False
        together, last = True, time.monotonic()
        while True:
            if not self._connection.poll(_POLL_SECONDS):
                now = time.monotonic()
                if now > stopping:
                    raise TrainingStopped
                if now > deadline or (not together and now - last > allowed):
                    raise TrainerError(f"a trial took longer than trainer.timeout, {timeout:g} s: raise it, or make the code faster")
                if stopping == float("inf") and stop():
                    stopping = now + _STOP_SECONDS
                    self._send({"stop": True})
                elif not reported:
                    on_step()
                continue
            match json.loads(self._connection.recv_bytes()):
                case {"ready": many}:
                    together, last = bool(many), time.monotonic()
                case {"progress": fraction}:
                    reported = True
                    on_step()
                    on_progress(float(fraction))
                case {"finished": _}:
                    last = time.monotonic()
                    on_step()
                case {"save": _}:
                    checkpoints.save(self._connection.recv_bytes())
                case {"batch": _}:
                    return TrialBatch.from_bytes(self._connection.recv_bytes())
                case {"error": kind, "message": message, "traceback": text}:
                    self._raise(str(kind), str(message), str(text))

    def _raise(self, kind: str, message: str, text: str) -> None:
        if kind == "stopped":
            raise TrainingStopped
        if kind == "unsupported":
            raise UnsupportedError(message)
        error = WorkerFaultError(message) if kind == "worker" else TrainerError(message)
        self.end()  # its last output is then complete
        raise error from _RemoteTraceback(f"\n{text}{self._last_output()}")

    def _died(self) -> TrainerError:
        code = None
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(5.0) if self._process else None
        how = "closed its connection" if code is None else describe_exit(code)
        self._output.close()
        error = TrainerError(f"the trainer process {how}")
        error.__cause__ = _RemoteTraceback(self._last_output())
        return error

    def _last_output(self) -> str:
        text = self._output.text()
        return f"\nLast output of the trainer:\n{text}" if text else ""


def _check(batch: TrialBatch, work: Work) -> None:
    """Check that a batch is the shard's: user code shares the process that made it. Raises: TrainerError."""
    experiment, dataset, trials = work.record.experiment, work.dataset, work.shard.trials
    members = membership(experiment.subsets, dataset.train_labels, trials)
    same = (
        batch.trial.tolist() == list(trials)
        and batch.fingerprint == work.record.fingerprint
        and (batch.n_train, batch.n_test) == (dataset.n_train, dataset.n_test)
        and bool((batch.membership == pack(members)).all())
    )
    if not same:
        raise TrainerError("the trainer process returned a batch of other trials")
