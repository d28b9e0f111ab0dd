"""Retraining on chosen subsets: an ordinary experiment of the design `explicit`, like another but for its subsets.

It is named after what it is like, its purpose and its masks, so that the same question is the same experiment, which goes on where it was,
and another question another one.
"""

import hashlib
import io

import numpy as np
import numpy.typing as npt

from memtail.errors import ScoresError
from memtail.execution.progress import progress_of
from memtail.experiment_store import ExperimentStore, Record
from memtail.settings import Settings
from memtail.spec import Experiment
from memtail.storage import ObjectStore, keys
from memtail.storage.atomic_file import atomic_file
from memtail.studies.names import derived_name
from memtail.subsets import Mask
from memtail.trials import unpack


def derive_experiment(record: Record, purpose: str, masks: Mask) -> Experiment:
    """The experiment that trains trial k on the examples of masks[k], bool [trials, n], by the recipe of another.

    The masks are kept in the cache folder. Its seed follows from the masks, so that no trial is one of the other's again.

    Raises:
        SpecError: its name would be too long.
    """
    buffer = io.BytesIO()
    np.save(buffer, masks)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    path = Settings().cache / keys.masks(digest)
    if not path.exists():
        with atomic_file(path) as file:
            file.write(buffer.getvalue())
    name = derived_name(record.experiment.name, purpose, digest)
    subsets = {"design": "explicit", "masks": str(path), "trials": len(masks), "seed": int(digest[:8], 16)}
    declaration = record.experiment.model_dump(mode="json", exclude={"record"})
    return Experiment.parse({**declaration, "name": name, "subsets": subsets}, source=f"experiment '{name}' of the study")


def require_finished(store: ObjectStore, name: str) -> Record:
    """The record of an experiment that a study may start from: one whose scores are not to change any more.

    Raises:
        ScoresError: trials of it are still to come.
        StoreError: there is no such experiment, or the store cannot be read.
    """
    record, progress = ExperimentStore(store, name).read_record(), progress_of(store, name)
    if progress.ending is None:
        raise ScoresError(
            f"experiment '{name}' has scores of {progress.published_trials} of {progress.wanted} trials, and the study starts from the "
            f"scores: let it finish, or give it up with memtail cancel {name}"
        )
    return record


def is_finished(store: ObjectStore, experiment: Experiment) -> bool:
    """Whether all trials that a study needs of an experiment are committed, and its scores published."""
    if not store.exists(keys.experiment(experiment.name)):
        return False
    progress = progress_of(store, experiment.name)
    return progress.ending == "published" and progress.wanted >= experiment.subsets.trials


def correctness(store: ObjectStore, experiment: Experiment) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """What the models of an experiment get right, all of whose trials are committed.

    Returns:
        bool [trials, q], whether trial k's model classifies test example j correctly; and bool [trials], which trials count: those that
        did not diverge.

    Raises:
        StoreError: the store cannot be read, or holds a damaged object.
    """
    experiment_store = ExperimentStore(store, experiment.name)
    record = experiment_store.read_record()
    correct = np.zeros((experiment.subsets.trials, record.n_test), np.bool_)
    counted = np.zeros(len(correct), np.bool_)
    for shard in experiment_store.iterate_committed():
        batch = experiment_store.batch(shard, record)
        correct[batch.trial] = unpack(batch.test_correct, record.n_test)
        counted[batch.trial] = [not each.diverged for each in batch.metrics]
    return correct, counted
