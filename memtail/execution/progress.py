"""Progress of an experiment, read from its store at every call with listings and a few small objects."""

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from memtail.experiment_store import MAX_ATTEMPTS, Control, ExperimentStore, Notice, missing_shards
from memtail.experiment_store.replicas import unverified
from memtail.scores.pointer import ScorePointer, latest_version
from memtail.storage import ObjectStore, keys
from memtail.trials import Shard

#: End of an experiment: all trials are published; the missing ones failed too often or were refused; its owner cancelled it; all are
#: committed but give no scores, as a notice says.
Ending = Literal["published", "dead", "cancelled", "without scores"]

#: Number of shards whose difference between two trainings is described.
DIFFERENCES_SHOWN = 5


@dataclass(frozen=True)
class ExperimentProgress:
    """Progress of an experiment at one moment.

    Attributes:
        experiment, fingerprint: its name and fingerprint.
        owner: who owns it, if its submission said so.
        control: its control.
        committed: the shards that have a trial batch.
        trials, total: number of committed trials, and of all trials.
        missing: the shards without a batch, dead ones included.
        attempts: number of failed attempts on record, by shard.
        refused: the committed shards whose batches cannot be counted. Determined only if no trial or score is outstanding.
        pointer: pointer to the published scores, None if there are none.
        notices: notices of the services, by service.
        trained_twice: the shards with a comparison of a second training, and whether one differed.
        unverified: the committed shards that are still to be trained a second time.
        differences: one line for each of the first `DIFFERENCES_SHOWN` shards that differ.
        finished: whether its end is on record, after which trial batches may be removed; `committed` then lists those that were counted.
        archived: whether they were removed by `memtail archive`.
    """

    experiment: str
    fingerprint: str
    owner: str | None
    control: Control
    committed: list[Shard]
    trials: int
    total: int
    missing: list[Shard]
    attempts: Counter[Shard]
    refused: list[Shard]
    pointer: ScorePointer | None
    notices: dict[str, Notice]
    trained_twice: dict[Shard, bool]
    unverified: list[Shard]
    differences: list[str]
    finished: bool = False
    archived: bool = False

    @property
    def dead(self) -> list[Shard]:
        """The missing shards that are not tried again: they failed `MAX_ATTEMPTS` times."""
        return [shard for shard in self.missing if self.attempts[shard] >= MAX_ATTEMPTS]

    @property
    def failed_attempts(self) -> int:
        """Number of failed attempts on record."""
        return self.attempts.total()

    @property
    def outstanding(self) -> int:
        """Number of trials neither committed nor in dead shards."""
        return sum(len(shard.trials) for shard in self.missing) - sum(len(shard.trials) for shard in self.dead)

    @property
    def published_trials(self) -> int:
        """Number of trials in the published scores, without diverged ones."""
        return self.pointer.summary.trials if self.pointer else 0

    @property
    def published_age(self) -> float | None:
        """Seconds since the scores were published, by this machine's clock; None if there are none."""
        return (datetime.now(UTC) - datetime.fromisoformat(self.pointer.published)).total_seconds() if self.pointer else None

    @property
    def standard_error(self) -> float | None:
        """0.95 quantile of the standard errors of the published memorization scores; None if there are none."""
        return self.pointer.summary.mem_se_quantile(0.95) if self.pointer else None

    @property
    def few_trials(self) -> str | None:
        """The warning of few trials in the published scores; None if there are enough, or no scores."""
        return self.pointer.summary.few_trials if self.pointer else None

    @property
    def few_trials_mark(self) -> str | None:
        """The same in two words."""
        return self.pointer.summary.few_trials_mark if self.pointer else None

    @property
    def ending(self) -> Ending | None:
        """The end of the experiment; None while trials or scores are still to come."""
        if not self.missing and self.pointer and self.pointer.summary.accumulated_trials >= self.total:
            return "published"
        if self.control.state == "cancelled":
            return "cancelled"
        if not self.missing and any(notice.final for notice in self.notices.values()):
            return "without scores"
        return "dead" if not self.outstanding and (self.dead or self.refused) else None

    @property
    def notice_lines(self) -> list[str]:
        """The lines of all notices."""
        return [line for notice in self.notices.values() for line in notice.lines]

    @property
    def lines(self) -> list[str]:
        """The lines of all notices, about differences between two trainings of a shard, and about several kinds of devices."""
        more = len(self.different) - len(self.differences)
        lines = self.notice_lines + self.differences + ([f"two trainings of {more} further shards differ"] if more else [])
        mixture = self.pointer and self.pointer.summary.mixture
        return [*lines, f"trials of several kinds: {mixture}"] if mixture else lines

    @property
    def different(self) -> list[Shard]:
        """The shards of which two trainings differ."""
        return [shard for shard, differs in self.trained_twice.items() if differs]

    def fate(self, shard: Shard) -> str:
        """State of a shard that has failed attempts on record."""
        if shard in self.refused:
            return "refused"
        if shard in self.dead:
            return "given up"
        left = any(other.first <= shard.last and shard.first <= other.last for other in self.missing)
        return "to be tried again" if left else "committed"

    def to_json(self) -> dict[str, Any]:
        """The JSON that `memtail status --json` prints. Times in seconds, shards as FIRST-LAST."""
        return {
            "experiment": self.experiment,
            "state": self.control.state,
            "ending": self.ending,
            "finished": self.finished,
            "archived": self.archived,
            "priority": self.control.priority,
            "owner": self.owner,
            "trials": self.trials,
            "wanted": self.total,
            "shards_committed": len(self.committed),
            "shards_wanted": len(self.committed) + len(self.missing),
            "failed_attempts": self.failed_attempts,
            "dead_shards": [shard.span for shard in self.dead],
            "published_trials": self.published_trials,
            "published": self.pointer.published if self.pointer else None,
            "published_age": self.published_age,
            "standard_error": self.standard_error,
            "few_trials": self.few_trials,
            "notices": self.notice_lines,
            "conditions": self.pointer.summary.conditions if self.pointer else {},
            "trained_twice": len(self.trained_twice),
            "unverified": len(self.unverified),
            "different": [shard.span for shard in self.different],
            "outcome": self.pointer.summary.outcome if self.pointer else None,
            "test_accuracy": self.pointer.summary.test_accuracy if self.pointer else None,
            "test_accuracy_se": self.pointer.summary.accuracy_se["test_accuracy"] if self.pointer else None,
            "fingerprint": self.fingerprint,
        }


def progress_of(store: ObjectStore, name: str) -> ExperimentProgress:
    """Read the progress of an experiment.

    Raises:
        ObjectNotFound: there is no such experiment.
        StoreError: the store cannot be read, or holds a damaged object.
    """
    experiment_store = ExperimentStore(store, name)
    record = experiment_store.read_record()
    attempts, finished = experiment_store.attempts(), experiment_store.finished(record)
    committed = finished.shards if finished else experiment_store.committed()
    total = record.experiment.subsets.trials
    missing = [] if finished else missing_shards(total, record.trials_per_shard, committed)
    pointer = latest_version(store, name)
    trained_twice = experiment_store.trained_twice()
    different = [shard for shard, differs in trained_twice.items() if differs]
    all_counted = pointer is not None and pointer.summary.accumulated_trials >= total
    return ExperimentProgress(
        experiment=name,
        fingerprint=record.fingerprint,
        owner=record.owner,
        control=experiment_store.control(),
        committed=committed,
        trials=len({trial for shard in committed for trial in shard.trials}),
        total=total,
        missing=missing,
        attempts=attempts,
        refused=[] if missing or all_counted else _refused(experiment_store, set(committed) & attempts.keys()),
        pointer=pointer,
        notices=experiment_store.notices(),
        trained_twice=trained_twice,
        unverified=[] if finished else unverified(record.fingerprint, record.experiment.execution.verify, committed, trained_twice),
        differences=[experiment_store.difference(shard) for shard in different[:DIFFERENCES_SHOWN]],
        finished=finished is not None,
        archived=finished is not None and finished.archived is not None,
    )


def _refused(experiment_store: ExperimentStore, failed: set[Shard]) -> list[Shard]:
    """The committed shards with a failure on record that names their batch."""
    if not failed:
        return []
    about = {
        failure.shard
        for failure in experiment_store.failures()
        if keys.trial_batch(experiment_store.name, failure.shard.first, failure.shard.last) in failure.error
    }
    return sorted(failed & about, key=lambda shard: shard.first)
