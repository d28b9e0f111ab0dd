"""The embedded run: one experiment from its declaration to its scores, on this machine, with a store in a folder or a bucket.

A run continues where an earlier one stopped, however that ended, and may run beside another run of the same experiment: the store
decides which trial batch counts.
"""

import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import torch

from memtail import datasets
from memtail.datasets import Dataset
from memtail.errors import BatchesRefusedError, ShardsFailedError, SpecError, StoreError, UnsupportedError, WorkerFaultError
from memtail.execution.aggregation import Aggregation, Extend, Pace, Step
from memtail.execution.breaker import BREAKER_SHARDS, common_error
from memtail.execution.checkpoints import left_over
from memtail.execution.declare import declare, network_shard_size, user_shard_size
from memtail.execution.finishing import still_finished
from memtail.execution.pool import Task, Workers
from memtail.execution.run_state import RunState
from memtail.execution.shard_task import ShardOutcome, ShardResult
from memtail.experiment_store import MAX_ATTEMPTS, ExperimentStore, Finished
from memtail.processes import end_if_imported, hide
from memtail.scores.pointer import latest_version
from memtail.scores.summary import ScoreSummary
from memtail.settings import S3Settings
from memtail.spec import Experiment, TrainerSpec
from memtail.storage import ObjectNotFound, ObjectStore, keys
from memtail.storage.open import is_url, open_store
from memtail.trainers.images.devices import available_devices, device_kind
from memtail.trainers.images.profiling import COMPUTATION, PHASES
from memtail.trainers.images.shard_size import checked_shard_size
from memtail.trials import Shard
from memtail.user_code import names_a_place

if TYPE_CHECKING:
    from memtail.scores.reader import Scores

log = structlog.get_logger()

#: Scores are published at the end, and in a long run at this interval, in seconds.
PUBLISH_SECONDS = 300.0


@dataclass(frozen=True)
class RunResult(Mapping[str, Any]):
    """Result of a run. As a mapping it is the summary, with `profile` in it if the run was profiled.

    Attributes:
        summary: summary of the published scores.
        store: address of the store.
        experiment: name of the experiment.
        profile: seconds by phase and shares of computation, if the run was profiled.
    """

    summary: ScoreSummary
    store: str
    experiment: str
    profile: dict[str, Any] | None = None

    @cached_property
    def scores(self) -> "Scores":
        """The published scores, opened for reading. Raises: ScoresError, StoreError."""
        from memtail.scores.fetch import load_scores

        return load_scores(f"{self.store}/{keys.experiments()}{self.experiment}")

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    @cached_property
    def _items(self) -> dict[str, Any]:
        return {**self.summary.to_dict(), **({"profile": self.profile} if self.profile else {})}


def run(
    experiment: Experiment,
    store: str | Path = "memtail-store",
    *,
    dataset: Dataset | None = None,
    on_progress: Callable[[RunState], None] | None = None,
    on_preparation: Callable[[int, int], None] | None = None,
    profile: bool = False,
) -> RunResult:
    """Run an experiment to its scores.

    Args:
        experiment: the declaration.
        store: the folder, or `s3://BUCKET/PREFIX`, for the results; scores lie in `STORE/experiments/NAME`.
        dataset: the experiment's dataset, if it is open already; by default it is prepared.
        on_progress: called several times a second with the state of the run.
        on_preparation: called with (images done, images in all) while a folder of images is prepared.
        profile: also return the seconds by phase. The result's `profile` holds the wall-clock `seconds`, the number of `devices`, in
            `phases` the device-seconds of all devices together, and in `computation` by device the share of the training (from the start
            of the processes to the last result) in which it computed: forward and backward passes, optimizer and evaluation.

    Returns:
        The result: `summary`, `scores`, and the keys of the summary.

    Raises:
        MemtailError: bad input, or a store that holds another experiment of this name.
        UnsupportedError: the experiment requires another kind of device.
        WorkerFaultError: a device or the disk of this machine is at fault; trained trials are in the store.
        ShardsFailedError: shards failed as often as a run tries them; the scores are published without them.
        BatchesRefusedError: trial batches are damaged; the scores are published without them.
    """
    if not isinstance(experiment, Experiment):
        raise SpecError(f"experiment: is {type(experiment).__name__}, and no memtail.Experiment: read a file with memtail.Experiment.load")
    end_if_imported()
    if is_url(store):
        S3Settings.refuse_expiring_key()
    opened = open_store(store)
    opened.sweep()
    dataset = dataset or datasets.prepare(experiment.dataset, on_preparation)
    experiment_store = ExperimentStore(opened, experiment.name)
    devices = available_devices(experiment.execution.device)
    record = experiment_store.register(declare(experiment, dataset, _shard_size(experiment, dataset, opened.address, devices)))
    aggregation = Aggregation(experiment_store, record, dataset, Pace(float("inf"), PUBLISH_SECONDS, first_at_once=False))
    state = RunState(aggregation, dataset, [str(device) for device in devices])
    return _Run(opened, experiment_store, state, on_progress, profile, experiment.trainer).to_the_end()


def _shard_size(experiment: Experiment, dataset: Dataset, store: str, devices: list[torch.device]) -> int:
    of_user = user_shard_size(experiment, len(devices)) or network_shard_size(experiment, dataset, store, [*map(str, devices)])
    return of_user or checked_shard_size(experiment, dataset, devices)


class _Run:
    def __init__(
        self,
        store: ObjectStore,
        experiment_store: ExperimentStore,
        state: RunState,
        on_progress: Callable[[RunState], None] | None,
        profile: bool,
        trainer: TrainerSpec,
    ) -> None:
        self._store, self._experiment_store, self._state, self._profile = store, experiment_store, state, profile
        self._code: Path | None = getattr(trainer, "folder", None)  # on this machine; that of the record may be another's
        self._aggregation = state.aggregation
        self._show = on_progress or (lambda state: None)
        self._began = time.monotonic()
        self._failures: Counter[Shard] = Counter()  # of this run: a run after a fix tries all missing shards again
        self._handed_back: dict[Shard, int] = defaultdict(int)
        self._errors: dict[Shard, str] = {}  # last error of each failed shard

    def to_the_end(self) -> RunResult:
        aggregation, state = self._aggregation, self._state
        self._remove_checkpoints()
        while True:
            self._follow_record()
            if finished := still_finished(self._experiment_store, state.record):
                return self._result_before(finished)
            with self._writing():
                aggregation.accumulate_new()
            missing = self._experiment_store.missing(state.record)
            state.failed = {shard: error for shard, error in state.failed.items() if shard in missing}
            self._show(state)
            if shards := [shard for shard in missing if shard not in state.failed]:
                self._train(_in_own_order(shards))
            elif isinstance(step := aggregation.next_step(), Extend):
                aggregation.extend(step.trials)
            elif aggregation.complete or state.failed or aggregation.refused:
                result = self._result()
                if aggregation.finish() or not self._is_changed():
                    return result

    def _follow_record(self) -> None:
        """Read the record again, which others may have extended.

        Raises:
            ObjectNotFound: the experiment was removed.
            StoreError: another experiment has the name now, or the store cannot be read.
        """
        self._experiment_store.check_registered(self._state.record.fingerprint)
        with suppress(UnsupportedError):  # a later version has written the record since
            self._aggregation.record = self._experiment_store.read_record()

    def _is_changed(self) -> bool:
        """Return whether the experiment was extended, or a batch discarded or replaced, since the scores were published."""
        self._follow_record()
        with self._writing():
            self._aggregation.accumulate_new()
        return self._aggregation.next_step() is not Step.DONE

    def _train(self, shards: list[Shard]) -> None:
        state = self._state
        began = time.monotonic() - state.seconds  # of earlier rounds
        with self._workers(len(shards)) as workers:
            while shards or workers.running:
                while shards and workers.takes(len(shards)):
                    workers.start(shards.pop(0))
                for result in workers.finished(timeout=0.2):
                    state.partial.pop(result.shard, None)
                    if self._is_over(result):
                        continue
                    shards.append(result.shard)
                state.partial |= {shard: share for shard, share in workers.progress() if shard in workers.running}
                state.seconds = time.monotonic() - began
                self._show(state)
                if self._aggregation.next_step() is Step.PUBLISH and (shards or workers.running):
                    with self._writing():
                        self._aggregation.accumulate_new()
                    if state.statistics.trials:  # not all discarded
                        self._publish()

    def _workers(self, shards: int) -> Workers:
        """Start processes for a number of shards. Raises: UnsupportedError: the experiment requires another kind of device."""
        state = self._state
        devices = state.devices[:shards]
        for device in devices if state.record.experiment.execution.require else ():
            self._experiment_store.check_device(state.record, device_kind(torch.device(device)))
        if state.record.experiment.runs_user_code:
            hide()
        task = Task(state.record, state.dataset.folder, self._store.address, device="", code=self._code)
        return Workers(task, devices)

    def _verify(self) -> None:
        """Train the chosen shards a second time. The scores are published: a fault here is logged, and the next run tries again."""
        shards = self._experiment_store.unverified(self._state.record, self._experiment_store.committed())
        if not shards:
            return
        try:
            workers = self._workers(len(shards))
        except UnsupportedError as error:
            log.warning("shards not verified", error=str(error))
            return
        with workers:
            while shards or workers.running:
                while shards and workers.takes(len(shards)):
                    workers.start(shards.pop(0))
                for result in workers.finished(timeout=0.2):
                    if result.outcome is not ShardOutcome.VERIFIED:
                        if result.outcome is ShardOutcome.FAILED and not result.attempt:  # so that it is not verified forever
                            self._experiment_store.record_failure(result.shard, result.error or "")
                        log.warning("shard not verified", shard=str(result.shard), outcome=result.outcome.value, error=result.error)
                workers.progress()
                self._show(self._state)

    def _is_over(self, result: ShardResult) -> bool:
        """Handle a result; return whether the shard is done or given up."""
        match result.outcome:
            case ShardOutcome.FAILED:
                error = result.error or ""
                if not result.attempt:
                    self._experiment_store.record_failure(result.shard, error)
                self._failures[result.shard] += 1
                # training code that fails twice at one place would fail there again: the shard has the same seeds and the same data
                repeated = names_a_place(error) and error == self._errors.get(result.shard)
                self._end_if_broken(result.shard, error)
                if self._failures[result.shard] < MAX_ATTEMPTS and not repeated:
                    return False
                self._state.failed[result.shard] = error
            case ShardOutcome.HANDED_BACK:
                self._handed_back[result.shard] += 1
                if self._handed_back[result.shard] < MAX_ATTEMPTS:
                    return False
                raise StoreError(f"{result.shard} could not be committed {MAX_ATTEMPTS} times: {result.error}")
            case ShardOutcome.WORKER_FAULT:
                raise WorkerFaultError(f"{result.shard} cannot be trained here: {result.error}; trained trials are in the store")
            case _:
                with self._writing(), suppress(ObjectNotFound):  # discarded since: it is missing in the next turn
                    self._aggregation.accumulate(result.shard)
                self._state.phases["writing"] += result.commit_seconds
                for phase, seconds in result.phases.items():
                    self._state.phases[phase] += seconds
                self._state.computing[result.device] += sum(result.phases.get(phase, 0.0) for phase in COMPUTATION)
        return True

    def _end_if_broken(self, shard: Shard, error: str) -> None:
        """End the run if its first shards failed alike. Raises: ShardsFailedError."""
        self._errors[shard] = error
        if not self._state.trials and (common := common_error(self._errors.values(), BREAKER_SHARDS)):
            records = f"{self._store.address}/{keys.failures(self._experiment_store.name)}"
            raise ShardsFailedError(
                f"the first {len(self._errors)} shards failed alike ({common}): tracebacks are in {records}; fix the cause, then run again",
                None,
            )

    def _remove_checkpoints(self) -> None:
        """Remove checkpoints left behind by processes that were killed between the commit and the removal."""
        checkpoints = list(self._store.list(keys.checkpoints(self._experiment_store.name)))
        for key in left_over(self._experiment_store, checkpoints) if checkpoints else ():
            self._store.delete(key)

    def _result_before(self, finished: Finished) -> RunResult:
        """The result of an earlier run or of the services. Raises: StoreError: the scores are missing."""
        name = self._experiment_store.name
        pointer = latest_version(self._store, name)
        if pointer is None or pointer.version != finished.version:
            raise StoreError(
                f"experiment '{name}' is finished, but its scores and trial batches were removed: restore them from a backup, "
                f"or train again with memtail resume {name} and memtail run"
            )
        return RunResult(pointer.summary, self._store.address, name)

    def _result(self) -> RunResult:
        failed, refused, name = self._state.failed, self._aggregation.refused, self._experiment_store.name
        if not failed and not refused:
            summary = self._publish()
            profile = _profile(self._state, time.monotonic() - self._began) if self._profile else None
            self._verify()
            return RunResult(summary, self._store.address, name, profile)
        published = self._publish() if self._state.statistics.trials else None
        records = f"{self._store.address}/{keys.failures(name)}"
        if failed:
            shard, error = next(iter(failed.items()))
            times = " to ".join(str(count) for count in sorted({self._failures[shard] for shard in failed}))
            raise ShardsFailedError(
                f"{len(failed)} shards failed {times} times each and are missing from the scores ({shard}: {error}): "
                f"tracebacks are in {records}; fix the cause, then run again",
                published,
            )
        raise BatchesRefusedError(
            f"{len(refused)} trial batch{'es' if len(refused) > 1 else ''} refused and missing from the scores "
            f"({next(iter(refused.values()))}): recorded in {records}",
            published,
        )

    def _publish(self) -> ScoreSummary:
        with self._writing():
            return self._aggregation.publish()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._state.phases["writing"] += time.monotonic() - began


def _profile(state: RunState, seconds: float) -> dict[str, Any]:
    phases = {phase: state.phases[phase] for phase in (*PHASES, "writing")}
    devices = len(state.devices)
    # writing overlaps training, so their sum can exceed the devices' time
    rest = max(0.0, devices * seconds - sum(phases.values()))
    times = {device: state.seconds * count for device, count in Counter(state.devices).items()}
    return {
        "seconds": round(seconds, 3),
        "devices": devices,
        "phases": {phase: round(spent, 3) for phase, spent in {**phases, "rest": rest}.items()},
        "computation": {device: round(state.computing[device] / time, 4) if time else 0.0 for device, time in times.items()},
    }


def _in_own_order(shards: list[Shard]) -> list[Shard]:
    """Shuffle the shards, so that concurrent runs rarely train the same one.

    In a common order, a run that catches up with another would train the same shards as that one from then on.
    """
    return random.SystemRandom().sample(shards, len(shards))
