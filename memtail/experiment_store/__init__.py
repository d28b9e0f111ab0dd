"""Objects of one experiment in a store: record, control, failures, notices and trial batches; and the cut of trials into shards."""

from memtail.experiment_store.audit import Action, record_action, recorded_actions
from memtail.experiment_store.control import Control, Failure, Notice, Origin
from memtail.experiment_store.finished import Finished
from memtail.experiment_store.names import change_tags, experiment_names
from memtail.experiment_store.record import Record
from memtail.experiment_store.replicas import Replica
from memtail.experiment_store.shard_grid import missing_shards
from memtail.experiment_store.store import MAX_ATTEMPTS, ExperimentStore

__all__ = [
    "MAX_ATTEMPTS",
    "Action",
    "Control",
    "ExperimentStore",
    "Failure",
    "Finished",
    "Notice",
    "Origin",
    "Record",
    "Replica",
    "change_tags",
    "experiment_names",
    "missing_shards",
    "record_action",
    "recorded_actions",
]
