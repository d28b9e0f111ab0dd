"""Processes that train shards for an embedded run: one per device, or per core of a CPU.

Each has a process pool of its own, so that a process that dies (out of memory, a segfault) takes only its own shard with it and is
replaced. Processes end when their parent does, also if it was killed.
"""

import multiprocessing
import queue
import sys
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memtail import logs
from memtail.datasets import ImageDataset
from memtail.errors import MemtailError
from memtail.experiment_store import ExperimentStore
from memtail.processes import follow_parent, keep_memory
from memtail.spec import Experiment
from memtail.storage import ObjectNotFound, ObjectStore, keys
from memtail.storage.open import open_store
from memtail.trials import Shard, TrialBatch

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Task:
    """What a training process needs to know."""

    experiment: Experiment
    dataset: Path
    store: str
    device: str
    profile: bool = False


@dataclass(frozen=True)
class Finished:
    """What became of a shard: a batch, or an error and its traceback; both None where another run had committed it.

    `peak_memory` is the most bytes that its process has taken so far: of the device's memory on CUDA, of the host's elsewhere.
    """

    shard: Shard
    batch: TrialBatch | None = None
    error: str | None = None
    traceback: str = ""
    peak_memory: int = 0


class Workers:
    """A set of training processes.

    Args:
        task: what they work on, but for the device.
        devices: one entry per process.
    """

    def __init__(self, task: Task, devices: list[str]) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._reports: multiprocessing.queues.Queue[tuple[Shard, float]] = self._context.Queue()
        self._tasks = [replace(task, device=device) for device in devices]
        self._pools = [self._pool() for _ in self._tasks]
        self._idle = list(range(len(devices)))
        self._running: dict[Future[Finished], tuple[int, Shard]] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools:
            _end(pool)
        self._reports.close()
        self._reports.cancel_join_thread()

    @property
    def idle(self) -> int:
        """How many processes have nothing to do."""
        return len(self._idle)

    @property
    def running(self) -> list[Shard]:
        """The shards in training."""
        return [shard for _, shard in self._running.values()]

    def start(self, shard: Shard, **changes: Any) -> None:
        """Hand a shard to an idle process; `changes` to the task are for this shard only."""
        index = self._idle.pop()
        future = self._pools[index].submit(_train, replace(self._tasks[index], **changes), shard)
        self._running[future] = (index, shard)

    def finished(self, timeout: float) -> list[Finished]:
        """The shards that have ended since the last call; waits up to `timeout` seconds for the first."""
        ended = []
        for future in wait(self._running, timeout=timeout, return_when=FIRST_COMPLETED).done:
            index, shard = self._running.pop(future)
            self._idle.append(index)
            try:
                ended.append(future.result())
            except BrokenProcessPool:
                self._pools[index] = self._pool()
                ended.append(Finished(shard, error="the training process died (killed, out of memory, or a crash in native code)"))
        return ended

    def progress(self) -> list[tuple[Shard, float]]:
        """What the processes have reported since the last call: shards, and how much of each is done (0 to 1)."""
        reports = []
        while True:
            try:
                reports.append(self._reports.get_nowait())
            except (queue.Empty, EOFError, OSError):
                return reports

    def _pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=self._context, initializer=_initialize, initargs=(self._reports,))


def _end(pool: ProcessPoolExecutor) -> None:
    """End a pool's process at once; what it was training is trained again by the next run."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


_reports: Any = None


def _initialize(reports: Any) -> None:
    global _reports  # noqa: PLW0603 - a pool's process keeps what it was given once
    _reports = reports
    logs.configure()
    keep_memory()
    follow_parent()


@lru_cache(maxsize=1)
def _opened(folder: Path) -> ImageDataset:
    """The dataset, opened once per process, so that its images stay on the device from shard to shard."""
    return ImageDataset.open(folder)


@lru_cache(maxsize=1)
def _store(address: str) -> ObjectStore:
    """The store, opened once per process, so that its connections stay; whoever started the process has proved it."""
    return open_store(address, verify=False)


def _train(task: Task, shard: Shard) -> Finished:
    import torch

    from memtail.trainers.images import Progress, train_shard

    store = _store(task.store)
    if ExperimentStore(store, task.experiment.name).is_committed(shard):
        return Finished(shard)

    def report(progress: Progress) -> None:
        _reports.put((shard, progress.epochs / progress.total))

    try:
        batch = train_shard(
            task.experiment,
            _opened(task.dataset),
            shard.trials,
            torch.device(task.device),
            on_progress=report,
            checkpoints=StoredCheckpoints(store, task.experiment.name, shard),
            profile=task.profile,
        )
    except MemtailError as error:
        return Finished(shard, error=str(error), traceback=traceback.format_exc())
    except Exception as error:  # whatever a model or a library raises becomes a failure record
        return Finished(shard, error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
    return Finished(shard, batch, peak_memory=_peak_memory(torch.device(task.device)))


def _peak_memory(device: "torch.device") -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):  # Linux; its getrusage also counts what the parent held when it started the process
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class StoredCheckpoints:
    """`memtail.trainers.images.Checkpoints` of one shard, kept in the store."""

    def __init__(self, store: ObjectStore, name: str, shard: Shard) -> None:
        self._store = store
        self._key = keys.checkpoint(name, shard.first, shard.last)

    def load(self) -> bytes | None:
        """The last saved state."""
        try:
            return self._store.get(self._key)
        except ObjectNotFound:
            return None

    def save(self, state: bytes) -> None:
        """Replace the saved state."""
        self._store.put(self._key, state)

    def remove(self) -> None:
        """Forget the state, once the shard is committed."""
        self._store.delete(self._key)
