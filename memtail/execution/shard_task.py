"""`run_shard`: one attempt at a shard. The embedded run and the workers of the services call the same function.

Skip if committed (and not to be verified), train, commit, record a failure, drop the checkpoint. The process that calls it holds the
store's credentials and commits. A failure is recorded only for what happens in training; a store that refuses the commit hands the shard
back without one.
"""

import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import version

import numpy as np
import structlog

from memtail.errors import ForeignObjectError, MemtailError, StoreError, TrainingStopped, UnsupportedError, WorkerFaultError
from memtail.execution.checkpoints import StoredCheckpoints
from memtail.experiment_store import ExperimentStore, Origin, Record, Replica
from memtail.experiment_store.replicas import compare
from memtail.settings import Settings
from memtail.spec import Experiment, ImagesTrainer
from memtail.trials import Shard, TrialBatch

log = structlog.get_logger()


class ShardOutcome(StrEnum):
    """Outcome of one attempt at a shard."""

    COMMITTED = "committed"
    #: Trained, but another process committed first; its batch counts.
    LOST_RACE = "lost race"
    #: Committed before, and trained a second time to compare the outcomes, as the experiment asks for.
    VERIFIED = "verified"
    DONE_BEFORE = "done before"
    #: Training raised; there is a failure record.
    FAILED = "failed"
    #: The store failed, not the shard; it is retried without counting an attempt.
    HANDED_BACK = "handed back"
    #: The process that trained is at fault: its device, disk, cache or installation; no attempt is counted.
    WORKER_FAULT = "worker fault"
    #: Training was told to stop; its state is in the checkpoint.
    STOPPED = "stopped"


@dataclass(frozen=True)
class ShardResult:
    """Result of one attempt at a shard; small, so that it can be sent between processes.

    Attributes:
        shard: the shard.
        outcome: its outcome.
        error: one line, where the outcome is FAILED, HANDED_BACK or WORKER_FAULT.
        attempt: number of the failure record that was written, counted from 1; 0 if none was.
        trials, examples: trials trained, and training examples processed in all their epochs.
        seconds: seconds of training and evaluation.
        phases: seconds by phase; none of the user's own training code.
        device: that trained it, as torch names it.
        commit_seconds: seconds that the commit took.
        process_usable: whether the process can train further shards; not after an error of its device's driver.
        peak_memory: peak memory in bytes of the process that trained: of the device on CUDA, of the host elsewhere; 0 if not measured.
        replica: comparison with the committed batch, where there was one that can be read.
    """

    shard: Shard
    outcome: ShardOutcome
    error: str | None = None
    attempt: int = 0
    trials: int = 0
    examples: int = 0
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    device: str = ""
    commit_seconds: float = 0.0
    process_usable: bool = True
    peak_memory: int = 0
    replica: Replica | None = None


def run_shard(
    experiment_store: ExperimentStore, record: Record, shard: Shard, device: str, train: Callable[[StoredCheckpoints], TrialBatch]
) -> ShardResult:
    """Attempt a shard; errors of the trainer, the model and the store become outcomes.

    Args:
        experiment_store: the experiment's objects.
        record: the experiment's record.
        shard: one of its shards.
        device: device of the training, for failure records.
        train: trains the shard's trials from the last checkpoint on and returns their batch. It may raise `TrainingStopped`.

    Returns:
        The result. Only a failed read of the store or a failed commit hands the shard back.

    Raises:
        UnsupportedError: `train` says that this process must not train the experiment.
    """
    checkpoints = StoredCheckpoints(experiment_store, record.fingerprint, shard)
    try:
        verifying = experiment_store.is_committed(shard)
        if verifying:
            checkpoints.remove()  # of a process that was killed between the commit and the removal
            checkpoints = StoredCheckpoints(experiment_store, record.fingerprint, shard, second=True)
        to_train = experiment_store.unverified(record, [shard]) if verifying else experiment_store.finished(record) is None
        if not to_train:
            checkpoints.remove()
            return ShardResult(shard, ShardOutcome.DONE_BEFORE)
        try:
            batch = train(checkpoints)
        except (StoreError, TrainingStopped, WorkerFaultError):
            raise
        except Exception as error:  # of a model or a library; also MemoryError, which would end a Celery worker
            return _failed(experiment_store, shard, device, error)
        experiment_store.check_registered(record.fingerprint)  # its trials would be counted in the next experiment of the name
        began = time.monotonic()
        committed = experiment_store.commit(batch, record.fingerprint)
        seconds = time.monotonic() - began
        replica = None if committed else _compared(experiment_store, record, batch, verifying)
    except TrainingStopped:
        return ShardResult(shard, ShardOutcome.STOPPED)
    except WorkerFaultError as error:
        log.error("worker at fault, shard handed back", shard=str(shard), error=str(error))
        return ShardResult(shard, ShardOutcome.WORKER_FAULT, error=str(error))
    except UnsupportedError:
        raise
    except StoreError as error:
        log.error("shard handed back", shard=str(shard), error=str(error))
        return ShardResult(shard, ShardOutcome.HANDED_BACK, error=str(error))
    checkpoints.remove()
    return ShardResult(
        shard,
        ShardOutcome.COMMITTED if committed else ShardOutcome.VERIFIED if verifying else ShardOutcome.LOST_RACE,
        trials=len(batch.trial),
        examples=int(np.bitwise_count(batch.membership).sum()) * _epochs(record.experiment),
        seconds=batch.provenance.seconds or 0.0,
        phases=batch.provenance.phases or {},
        commit_seconds=seconds,
        replica=replica,
    )


def _epochs(experiment: Experiment) -> int:
    """Return the number of epochs; those of user code are unknown and count as one."""
    return experiment.training.epochs if isinstance(experiment.trainer, ImagesTrainer) else 1


def _compared(experiment_store: ExperimentStore, record: Record, batch: TrialBatch, verifying: bool) -> Replica | None:
    """Compare a batch with the committed one, and record the comparison; a committed batch that cannot be read fails no shard."""
    try:
        replica = compare(experiment_store.batch(batch.shard, record), batch)
        experiment_store.record_replica(replica)
    except StoreError as error:
        log.warning("second training not compared", shard=str(batch.shard), error=str(error))
        if verifying and isinstance(error, ForeignObjectError):  # counted, so that the shard is not verified forever
            experiment_store.record_failure(batch.shard, str(error))
        return None
    if replica.differs:
        facts = {"trials": replica.trials, "bits": replica.bits, "margins": replica.margins, "alike": replica.alike}
        log.error("two trainings differ", shard=str(batch.shard), comparison=str(replica), **facts)
    return replica


def this_process(device: str) -> Origin:
    """Describe this process for the failures of its shards."""
    return Origin(Settings().node, socket.gethostname(), device, version("memtail"), version("torch"))


def _failed(experiment_store: ExperimentStore, shard: Shard, device: str, error: Exception) -> ShardResult:
    message = str(error) if isinstance(error, MemtailError) else f"{type(error).__name__}: {error}"
    message = message.partition("\n")[0]  # CUDA adds advice in further lines, which the traceback has
    text = "".join(traceback.format_exception(error))
    failure = experiment_store.record_failure(shard, message, text, origin=this_process(device))
    log.warning("shard failed", shard=str(shard), attempt=failure.attempt, error=message)
    return ShardResult(shard, ShardOutcome.FAILED, error=message, attempt=failure.attempt)
