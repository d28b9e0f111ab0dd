"""`still_finished`: whether an experiment that has ended is still to be left alone. The embedded run and the aggregator ask it."""

import structlog

from memtail.experiment_store import ExperimentStore, Finished, Record
from memtail.scores.pointer import latest_version
from memtail.scores.summary import SCHEMA
from memtail.storage import keys

log = structlog.get_logger()


def still_finished(experiment_store: ExperimentStore, record: Record) -> Finished | None:
    """Return the record of an experiment's end, if nothing has changed since; otherwise reopen the experiment.

    A record that does not hold any more was left by a command that was interrupted before it reopened the experiment. A trial batch that is
    missing changes nothing. One that was replaced reopens the experiment; so do scores that are lost or of an earlier schema, if all
    batches are there to publish them again.

    Args:
        experiment_store: the experiment's objects.
        record: the experiment's record.

    Raises:
        StoreError: the store cannot be read or written.
    """
    finished = experiment_store.finished(record)
    if finished is None:
        if experiment_store.store.exists(keys.finished(experiment_store.name)):
            experiment_store.reopen("it was changed by a command that was interrupted")
        return None
    tags = {shard.span: tag for shard, tag in experiment_store.committed_tags().items()}
    if replaced := [span for span, tag in tags.items() if finished.batches.get(span, tag) != tag]:
        experiment_store.reopen(f"trial batch {replaced[0]} was replaced")
        return None
    pointer, whole = latest_version(experiment_store.store, experiment_store.name), finished.batches.keys() <= tags.keys()
    published = pointer is not None and pointer.version == finished.version
    if whole and not (published and finished.score_schema >= SCHEMA):
        experiment_store.reopen("its scores are of an earlier schema" if published else "its scores are missing")
        return None
    if published:
        return finished
    name = experiment_store.name
    log.error(
        "scores of a finished experiment are missing, and so are trial batches",
        experiment=name,
        fix=f"restore experiments/{name}/scores/ from a backup, or train the missing trials again with memtail resume {name}",
    )
    return finished
