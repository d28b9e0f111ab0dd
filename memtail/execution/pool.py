"""Local processes that run shards: one per device, or per core of a CPU.

Each has its own process pool, so a process that dies (out of memory, a segfault) takes only its own shard with it and is replaced.
Processes end when their parent does, also if it was killed. Each imports the script that started them, as multiprocessing does.

A process of an accelerator has its next shards already while it trains one. So the device does not wait for this process, which may be busy
with publishing, nor for the networks of the next shard, which are drawn meanwhile.
"""

import multiprocessing
import queue
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from memtail import logs
from memtail.datasets import Dataset, open_dataset
from memtail.execution.checkpoints import StoredCheckpoints
from memtail.execution.shard_task import ShardOutcome, ShardResult, run_shard
from memtail.experiment_store import ExperimentStore, Record
from memtail.processes import check_script, follow_parent, keep_memory
from memtail.storage import ObjectStore
from memtail.storage.open import open_store
from memtail.trainers.shard_trainer import ShardTrainer
from memtail.trials import Shard, TrialBatch


@dataclass(frozen=True)
class Task:
    """Work of a training process.

    Attributes:
        record: record of the experiment.
        dataset: folder of its prepared dataset.
        store: address of the store.
        device: device to train on, as torch names it.
        code: folder of the user's training code, if the trainer is the user's.
    """

    record: Record
    dataset: Path
    store: str
    device: str
    code: Path | None = None


class Workers:
    """A set of training processes.

    Args:
        task: their work; each process trains on its own device instead of the task's.
        devices: one entry per process.
    """

    def __init__(self, task: Task, devices: list[str]) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._reports: multiprocessing.queues.Queue[tuple[Shard, float]] = self._context.Queue()
        self._tasks = [replace(task, device=device) for device in devices]
        self._upcoming = [self._context.SimpleQueue() for _ in devices]
        self._pools = [self._pool(index) for index in range(len(devices))]
        self._running: dict[Future[ShardResult | None], tuple[int, Task, Shard]] = {}  # in the order of their starts

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools:
            _end(pool)
        self._reports.close()
        self._reports.cancel_join_thread()

    @property
    def running(self) -> list[Shard]:
        """The shards in training, and the next ones of the processes."""
        return [shard for _, _, shard in self._running.values()]

    def takes(self, waiting: int) -> bool:
        """Return whether a process takes another shard, of a number that wait.

        It takes next ones only as long as there are as many for each process: the last ones go to whichever is idle first.
        """
        share = (len(self._running) + waiting) // len(self._tasks) - 1
        return any(held <= max(0, min(share, _most_next(task.device))) for held, task in zip(self._held(), self._tasks, strict=True))

    def start(self, shard: Shard, **changes: Any) -> None:
        """Hand a shard to the process with the fewest; `changes` replace fields of the task for this shard only."""
        held = self._held()
        index = held.index(min(held))
        self._submit(index, replace(self._tasks[index], **changes), shard)

    def finished(self, timeout: float) -> list[ShardResult]:
        """Return the results since the last call; wait up to `timeout` seconds for the first.

        The result of a shard whose process died is FAILED with `attempt` 0: the failure is not recorded yet.

        Raises:
            SpecError: the script starts a run when a process imports it.
        """
        results = []
        done = wait(self._running, timeout=timeout, return_when=FIRST_COMPLETED).done
        for future in [future for future in self._running if future in done]:
            if future not in self._running:  # handed to a new process
                continue
            index, _, shard = self._running[future]
            try:
                result = future.result()
            except BrokenProcessPool:
                check_script(self._pools[index])
                error = "the training process died (killed, out of memory, or a crash in native code)"
                result = ShardResult(shard, ShardOutcome.FAILED, error=error, process_usable=False)
            if result is None:
                self._restart(index)
                continue
            del self._running[future]
            results.append(result)
            if not result.process_usable:
                self._restart(index)
        return results

    def _held(self) -> list[int]:
        """Return the number of shards of each process."""
        indices = [index for index, _, _ in self._running.values()]
        return [indices.count(index) for index in range(len(self._pools))]

    def _submit(self, index: int, task: Task, shard: Shard) -> None:
        if _most_next(task.device):
            self._upcoming[index].put(shard)
        try:
            future = self._pools[index].submit(_train, task, shard)
        except BrokenProcessPool as error:  # its process has died since the last call of `finished`
            future = Future()
            future.set_exception(error)
        self._running[future] = (index, task, shard)

    def _restart(self, index: int) -> None:
        """Replace a process, and hand its next shards, which it has not begun, to the new one."""
        _end(self._pools[index])
        self._upcoming[index] = self._context.SimpleQueue()
        self._pools[index] = self._pool(index)
        for future, (holder, task, shard) in list(self._running.items()):
            if holder == index and not _has_result(future):
                del self._running[future]
                self._submit(index, task, shard)

    def progress(self) -> list[tuple[Shard, float]]:
        """Return the reports of the processes since the last call: shards, and the part of each that is trained (0 to 1)."""
        reports = []
        while True:
            try:
                reports.append(self._reports.get_nowait())
            except (queue.Empty, EOFError, OSError):
                return reports

    def _pool(self, index: int) -> ProcessPoolExecutor:
        arguments = (self._reports, self._upcoming[index])
        return ProcessPoolExecutor(1, mp_context=self._context, initializer=_initialize, initargs=arguments)


def _most_next(device: str) -> int:
    """Return the most shards that a process has beside the one in training: with two it knows, when it begins one, which comes then."""
    return 0 if device == "cpu" else 2


def _has_result(future: "Future[ShardResult | None]") -> bool:
    return future.done() and not future.cancelled() and future.exception() is None and future.result() is not None


def _end(pool: ProcessPoolExecutor) -> None:
    """Kill a pool's process; the next run trains its shard again."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


_reports: Any = None
_upcoming: Any = None  # shards of this process, in order
_known: list[Shard] = []  # those read from it, from the one in training on


def _initialize(reports: Any, upcoming: Any) -> None:
    global _reports, _upcoming  # queues cannot be sent with a task
    _reports, _upcoming = reports, upcoming
    logs.configure()
    keep_memory()
    follow_parent()


@lru_cache(maxsize=1)
def _opened(folder: Path) -> Dataset:
    """The dataset, opened once per process, so that its images stay on the device from shard to shard."""
    return open_dataset(folder)


@lru_cache(maxsize=1)
def _store(address: str) -> ObjectStore:
    """The store, opened once per process, so that its connections stay; the parent has verified its contract."""
    return open_store(address, verify=False)


_trainers: dict[str, ShardTrainer] = {}


def _trainer(device: str) -> ShardTrainer:
    """The trainer, kept from shard to shard."""
    if device not in _trainers:
        end_trainers()
        _trainers[device] = ShardTrainer(device)
    return _trainers[device]


def end_trainers() -> None:
    """End the trainer processes of this process."""
    while _trainers:
        _trainers.popitem()[1].end()


def _following(shard: Shard) -> Shard | None:
    """Return the shard that this process trains after one, if it is known."""
    while _upcoming is not None and not _upcoming.empty():
        _known.append(_upcoming.get())
    while _known and _known[0] != shard:
        _known.pop(0)
    return _known[1] if len(_known) > 1 else None


def _train(task: Task, shard: Shard) -> ShardResult | None:
    """Train a shard; return None, and train nothing, in a process that an earlier shard has left unusable."""
    _following(shard)  # whoever needs not know reads the queue too, since it holds a limited number
    trainer = _trainer(task.device)
    if not trainer.usable:
        return None

    def train(checkpoints: StoredCheckpoints) -> TrialBatch:
        return trainer.train(
            task.record,
            _opened(task.dataset),
            shard,
            checkpoints,
            code=task.code,
            store=task.store,
            on_progress=lambda fraction: _reports.put((shard, fraction)),
            following=lambda: _following(shard),
        )

    experiment_store = ExperimentStore(_store(task.store), task.record.experiment.name)
    result = run_shard(experiment_store, task.record, shard, task.device, train)
    return replace(result, device=task.device, process_usable=trainer.usable, peak_memory=trainer.peak_memory)
