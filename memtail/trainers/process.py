"""Trainer process: runs code of the user's own, on one device, without credentials. This side starts it and talks to it.

A guardian (`memtail.trainers.guardian`) stands between the two processes: it kills the trainer process, and all that it started, when this
process says so or ends.
"""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from memtail.datasets import DatasetLabels
from memtail.errors import SpecError, TrainerError, TrainingStopped, UnsupportedError, WorkerFaultError
from memtail.experiment_store import Record
from memtail.processes import hide
from memtail.spec import Experiment, ImagesTrainer
from memtail.trainers.channel import Channel
from memtail.trainers.checkpoints import LARGEST_STATE, Checkpoints
from memtail.trainers.command import describe_exit
from memtail.trainers.confinement import has_landlock, restricted_paths, trainer_environment
from memtail.trainers.limits import Limits
from memtail.trainers.output import Output
from memtail.trainers.work import Work
from memtail.trials import Shard, TrialBatch, largest_batch

log = structlog.get_logger()

#: Line between the traceback of a fault and the output of the code.
OUTPUT_HEADING = "Last output of the trainer:\n"

# Trials after which a process is replaced, so that memory that the code leaks is freed.
_MOST_TRIALS = 10_000
# Seconds between two looks at whether to stop.
_POLL_SECONDS = 0.1
# Seconds within which the process takes a message, and within which it ends once it is killed.
_SEND_SECONDS, _END_SECONDS = 60.0, 30.0
# Seconds in which a process that is about to be ended shows what it is doing.
_SHOW_SECONDS = 0.5
# Most characters of a warning that the log takes.
_LONGEST_WARNING = 1000
# Imports come from where those of this process do: the folder of the user's code, which could replace any module, is not among them.
_PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from memtail.trainers.guardian import main; main()"


class _RemoteTraceback(Exception):  # noqa: N818 - not raised, but shown as a cause
    """Traceback of the trainer process and the end of its output, as the cause of the error that is raised here."""


class TrainerProcess:
    """Runs code of the user's own on one device; the process is replaced whenever it cannot be trusted to train further shards.

    Args:
        device: as torch names it.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._guardian: subprocess.Popen[bytes] | None = None
        self._serves: tuple[str, Path, str | None] | None = None
        self._trials = 0
        self._warned = ""  # fingerprint of the experiment that was warned of last
        #: Peak memory in bytes when the last shard was trained, as the process says.
        self.peak_memory = 0

    def train(
        self,
        work: Work,
        checkpoints: Checkpoints | None,
        *,
        on_progress: Callable[[float], None],
        on_step: Callable[[], None],
        stop: Callable[[], bool],
        silence: float = math.inf,
    ) -> TrialBatch:
        """Train a shard.

        Args:
            work: the shard.
            checkpoints: where its state is kept, if anywhere.
            on_progress: is called with the trained part of the shard, 0 to 1.
            on_step: is called several times a second while the code is watched.
            stop: is asked several times a second whether to stop.
            silence: longest time in seconds without progress, of a network and of code that has reported progress.

        Raises:
            TrainerError: the code raised, its process died, a trial took longer than `trainer.timeout`, or it hangs.
            TrainingStopped: `stop` returned True.
            UnsupportedError: the code on this machine is not the experiment's.
            WorkerFaultError: the process cannot be started, or cannot open the dataset; or the device or the disk is at fault.
            StoreError: a model cannot be kept.
        """
        state = checkpoints.load() if checkpoints else None
        self._begin(work)
        usable = False
        try:
            self._send({"train": work.to_json(), "device": self._device, "checkpoint": state is not None}, state or b"")
            batch = self._follow(work, checkpoints, on_progress, on_step, stop, silence)
            usable = True
            return batch
        except _EndedError:
            failure: Exception = TrainerError(f"the trainer process {self._exit()}")
        except (TrainerError, WorkerFaultError) as error:
            failure = error
        finally:
            self._trials += len(work.shard.trials)
            if not usable or self._trials >= _MOST_TRIALS:
                self.end()  # so that all its output has been read
        output = self._output.text()
        trace = f"{failure.__cause__ or ''}\n" + (OUTPUT_HEADING + output if output else "")
        raise self._fault(failure) or failure from _RemoteTraceback(f"\n{trace}") if trace.strip() else None

    def check(
        self, experiment: Experiment, dataset: DatasetLabels, code: Path, store: str | None, devices: list[str] | None, count: bool
    ) -> tuple[int, float]:
        """Check a network of the user's own.

        Args:
            experiment: the declaration.
            dataset: its dataset.
            code: folder of the user's code, as in `Work`.
            store: address of the store, as in `Work`.
            devices: devices to train on; those of this machine by default.
            count: whether to count operations.

        Returns:
            The number of trials in a shard, as of `checked_shard_size`, and the operations of a trial, as of `operations_per_trial`.

        Raises:
            SpecError: the network cannot be built, fails on an image, or ends the process.
            WorkerFaultError: the process cannot be started.
        """
        work = Work(Record(experiment, "", {}, dataset.n_train, dataset.n_test, 1), dataset, Shard(0, 0), code, store)
        self._begin(work)
        try:
            self._send({"check": work.to_json(), "devices": devices, "count": count})
            while True:
                match self._receive():
                    case {"trials_per_shard": int(size), "operations": float(operations)}, _ if size > 0 and operations >= 0:
                        return size, operations
                    case {"error": _, "message": str(message)}, _:
                        raise SpecError(_printable(message))
        except _EndedError:
            raise SpecError(f"model '{experiment.model.name}': the process that built it {self._exit()}: fix the model") from None
        except TrainerError as error:
            raise SpecError(f"model '{experiment.model.name}': {error}") from None
        finally:
            self.end()

    def end(self) -> None:
        """End the process and all that it started."""
        guardian, self._guardian = self._guardian, None
        if guardian is None:
            return
        _end(guardian)
        self._channel.close()
        self._output.close()
        shutil.rmtree(self._scratch, ignore_errors=True)  # of a guardian that was killed

    def _begin(self, work: Work) -> None:
        serves = (work.record.fingerprint, work.code, work.store)
        if self._guardian is not None and (self._serves != serves or self._guardian.poll() is not None):
            self.end()
        if self._guardian is None:
            self._start(work)
            self._serves, self._trials = serves, 0
        self._output.begin()

    def _start(self, work: Work) -> None:
        hide()
        try:
            # its name is short, since sockets of user code may lie in it
            self._scratch = scratch = Path(tempfile.mkdtemp(prefix="memtail-"))
        except OSError as error:
            raise WorkerFaultError(f"no folder for the trainer process can be made: {error}") from error
        size = largest_batch(len(work.shard.trials), work.dataset.n_train, work.dataset.n_test)
        ours, theirs = socket.socketpair()
        ours.settimeout(_SEND_SECONDS)
        reading, writing = os.pipe()
        try:
            arguments = {"connection": theirs.fileno(), "scratch": str(scratch), "accesses": self._accesses(work, scratch)}
            path = [str(Path(part).absolute()) for part in sys.path]
            self._guardian = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, json.dumps(path), json.dumps(arguments)],
                stdin=subprocess.PIPE,
                stdout=writing,
                stderr=writing,
                pass_fds=[theirs.fileno()],
                cwd=scratch,
                env=self._environment(scratch),
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            os.close(reading)
            shutil.rmtree(scratch, ignore_errors=True)
            raise WorkerFaultError(f"the trainer process cannot be started: {error}") from error
        finally:
            theirs.close()
            os.close(writing)
        self._channel = Channel(ours, max(LARGEST_STATE, size))
        self._output = Output(reading)

    def _environment(self, scratch: Path) -> dict[str, str]:
        environment = trainer_environment(os.environ, scratch)
        if self._device == "cpu":  # there is a process for each core
            environment.setdefault("OMP_NUM_THREADS", "1")
        return environment

    def _accesses(self, work: Work, scratch: Path) -> dict[str, int] | None:
        if not has_landlock():
            return None
        paths = restricted_paths(os.environ, work.store, work.dataset.folder, work.code, scratch)
        return {str(path): int(access) for path, access in paths.items()}

    def _send(self, message: dict[str, Any], data: bytes = b"") -> None:
        try:
            self._channel.send(message, data)
        except OSError:
            raise _EndedError from None

    def _receive(self) -> tuple[dict[str, Any], bytes] | None:
        try:
            return self._channel.receive(_POLL_SECONDS)
        except (EOFError, OSError):
            raise _EndedError from None
        except ValueError as error:
            raise TrainerError(f"the trainer process sent no message ({error}): the code wrote to the connection of memtail") from None

    def _follow(
        self,
        work: Work,
        checkpoints: Checkpoints | None,
        on_progress: Callable[[float], None],
        on_step: Callable[[], None],
        stop: Callable[[], bool],
        silence: float,
    ) -> TrialBatch:
        trainer, imports = work.record.experiment.trainer, False
        limits = Limits(getattr(trainer, "timeout", None), len(work.shard.trials), silence, isinstance(trainer, ImagesTrainer))
        while True:
            received = self._receive()
            if received is not None:
                limits.heard()
            self._check(limits)
            on_step()
            if limits.stopping is None and stop():
                limits.stopping = time.monotonic()
                self._send({"stop": True})
            if received is None:
                continue
            message, data = received
            match message:
                case {"importing": _}:
                    imports = True
                case {"ready": many}:
                    imports = True
                    limits.begin(bool(many))
                case {"progress": float(fraction)} if 0 <= fraction <= 1:
                    limits.progress()
                    on_progress(fraction)
                case {"finished": _}:
                    limits.finished()
                case {"save": _}:
                    if checkpoints:
                        checkpoints.save(data)
                        limits.heard()  # the store may have been slow
                case {"model": int(trial)}:
                    work.check_model(trial)
                    if checkpoints:
                        checkpoints.keep_model(trial, data)
                        limits.heard()
                case {"warning": str(warning), "trials": str(trials)}:
                    self._warn(work, _printable(warning), _printable(trials))
                case {"batch": _}:
                    peak = message.get("peak_memory")
                    self.peak_memory = peak if isinstance(peak, int) else 0
                    return work.batch_of(data)
                case {"error": str(kind), "message": str(text), "traceback": str(trace)}:
                    self._raise(kind, _printable(text), _printable(trace), imports, limits.stopping is not None)

    def _warn(self, work: Work, warning: str, trials: str) -> None:
        """Log a warning, the first one of each experiment only: what is wrong with one shard is wrong with all."""
        if self._warned != work.record.fingerprint:
            self._warned = work.record.fingerprint
            log.warning(warning[:_LONGEST_WARNING], experiment=work.record.experiment.name, trials=trials[:_LONGEST_WARNING])

    def _check(self, limits: Limits) -> None:
        try:
            limits.check()
        except TrainerError:
            with suppress(_EndedError):
                self._send({"show": True})
                time.sleep(_SHOW_SECONDS)
            raise

    def _raise(self, kind: str, message: str, trace: str, imports: bool, stopping: bool) -> None:
        """Raise what the process says; only before it imports user code may it blame this machine."""
        if kind == "stopped" and stopping:
            raise TrainingStopped
        if kind == "unsupported" and not imports:
            raise UnsupportedError(message)
        if kind == "stopped":
            message = "the code raised memtail.TrainingStopped although it was not told to stop: ask task.should_stop() first"
        error = WorkerFaultError(message) if kind == "worker" and not imports else TrainerError(message)
        raise error from _RemoteTraceback(trace)

    def _fault(self, failure: Exception) -> WorkerFaultError | None:
        """Find a fault of this machine that a failure of user code may come from."""
        from memtail.trainers.images.devices import fault_of_machine

        return fault_of_machine(self._device) if isinstance(failure, TrainerError) else None

    def _exit(self) -> str:
        """Wait for the end of a process that has closed its connection; return how it ended."""
        if self._guardian is not None:
            with suppress(subprocess.TimeoutExpired):
                return describe_exit(self._guardian.wait(_END_SECONDS))
        return "closed its connection"


class _EndedError(Exception):
    """The process has ended, or does not take messages."""


def _end(guardian: "subprocess.Popen[bytes]") -> None:
    """Have a guardian kill the processes that it guards, and clean up."""
    if guardian.stdin is not None:
        guardian.stdin.close()
    try:
        guardian.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:  # it waits for a process that the kernel cannot end, or was stopped
        log.warning("the trainer process does not end", pid=guardian.pid)
        guardian.kill()
        guardian.wait()


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
