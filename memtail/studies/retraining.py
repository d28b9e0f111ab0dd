"""Retraining on chosen subsets: an experiment derived from another, with an `explicit` design.

The experiment's name is derived from its parent, the study and a hash of its masks, so repeating a study resumes the same experiment.
"""

import hashlib
import io
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from memtail.datasets import Dataset
from memtail.datasets.staged_dataset import fetch
from memtail.datasets.staged_inputs import fetch_inputs
from memtail.digests import file_digest
from memtail.errors import ScoresError, SpecError
from memtail.execution.progress import progress_of
from memtail.experiment_store import ExperimentStore, Record
from memtail.settings import Settings
from memtail.spec import Experiment, ImagesTrainer, ImportedTrainer, TrainerSpec
from memtail.storage import ObjectStore, keys
from memtail.storage.atomic_file import atomic_file
from memtail.studies.experiment_names import derived_name
from memtail.subsets import Mask
from memtail.trainers.code import code_folder


def derive_experiment(record: Record, study: str, masks: Mask) -> Experiment:
    """Declare the experiment that trains trial k on the examples of masks[k], with the recipe of another experiment.

    The masks are kept in the cache folder. The seed is derived from them, so that no trial repeats one of the other experiment.

    Args:
        record: the other experiment.
        study: the study that needs the models.
        masks: bool [trials, n].

    Raises:
        SpecError: the derived name is too long.
        UnsupportedError: the code of a function or a command is not on this machine as it was.
    """
    buffer = io.BytesIO()
    np.save(buffer, masks)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    path = Settings().cache / keys.masks(digest)
    if not path.exists():
        with atomic_file(path) as file:
            file.write(buffer.getvalue())
    name = derived_name(record.experiment.name, study, digest)
    subsets = {"design": "explicit", "masks": str(path), "trials": len(masks), "seed": int(digest[:8], 16)}
    declaration = record.experiment.model_dump(mode="json") | {"trainer": _trainer_here(record).model_dump(mode="json")}
    recorded = {"scores": False}  # studies compare accuracies
    return Experiment.parse(
        {**declaration, "name": name, "subsets": subsets, "record": recorded}, source=f"experiment '{name}' of the study"
    )


def _trainer_here(record: Record) -> TrainerSpec:
    """The trainer of an experiment, with the folder of its code on this machine. Raises: UnsupportedError."""
    trainer = record.experiment.trainer
    return trainer if isinstance(trainer, ImagesTrainer) else trainer.model_copy(update={"folder": code_folder(record)})


def require_built_in(record: Record, study: str) -> None:
    """Refuse an experiment whose models memtail cannot build. Raises: SpecError: its trainer is not the built-in one."""
    trainer = record.experiment.trainer
    if not isinstance(trainer, ImagesTrainer):
        origin = f"was imported ({trainer.imported})" if isinstance(trainer, ImportedTrainer) else "is trained by a function or a command"
        raise SpecError(
            f"experiment '{record.experiment.name}' {origin}, and the study {study} needs a model of the "
            f"built-in trainer: declare an experiment with model and training on this dataset"
        )


def require_test_set(record: Record, study: str) -> None:
    """Refuse an experiment without test examples. Raises: SpecError."""
    if not record.n_test:
        raise SpecError(
            f"experiment '{record.experiment.name}' has no test examples, and the study {study} measures accuracy on them: declare an "
            f"experiment on a dataset with a test set"
        )


def require_correctness(record: Record, study: str) -> None:
    """Refuse an experiment without correctness. Raises: SpecError: it records scores only."""
    if record.experiment.record.scores_only:
        raise SpecError(
            f"experiment '{record.experiment.name}' has scores only, and the study {study} is of correctness: declare an experiment with "
            "record: {scores: true}"
        )


def require_finished(store: ObjectStore, name: str) -> Record:
    """Read the record of an experiment whose scores will not change any more, with the weights of its networks in a file of this machine.

    Raises:
        ScoresError: the experiment has trials left to train or publish.
        DatasetError: the weights are neither on this machine, as they were, nor in the store.
        StoreError: there is no such experiment, or the store cannot be read.
    """
    record, progress = ExperimentStore(store, name).read_record(), progress_of(store, name)
    if progress.ending is None:
        raise ScoresError(
            f"experiment '{name}' has scores of {progress.published_trials} of {progress.total} trials, and a study needs final scores: "
            f"wait until it finishes, or stop it with memtail cancel {name}"
        )
    return _with_weights(store, record)


def _with_weights(store: ObjectStore, record: Record) -> Record:
    weights = record.experiment.model.weights_file
    if weights is None or (weights.is_file() and file_digest(weights) == record.canonical["model"]["weights"]):
        return record
    return replace(record, experiment=fetch_inputs(record.experiment, record.canonical, store, Settings().cache))


def is_finished(store: ObjectStore, experiment: Experiment) -> bool:
    """Check whether all trials of an experiment's declaration are committed, and its scores published."""
    if not store.exists(keys.experiment(experiment.name)):
        return False
    progress = progress_of(store, experiment.name)
    return progress.ending == "published" and progress.total >= experiment.subsets.trials


def dataset_of(store: ObjectStore, record: Record) -> Dataset:
    """Open the dataset of an experiment, from the cache or the store. Raises: DatasetError, StoreError."""
    settings = Settings()
    return fetch(store, record.canonical["dataset"]["fingerprint"], settings.cache, settings.cache_limit)


def read_outcomes(store: ObjectStore, experiment: Experiment) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Read the test outcomes of an experiment, all of whose trials are committed.

    Returns:
        bool [trials, q], whether trial k classifies test example j correctly; and bool [trials], whether trial k counts: it did not
        diverge.

    Raises:
        ScoresError: trial batches were removed since.
        StoreError: the store cannot be read, or holds a damaged object.
    """
    experiment_store = ExperimentStore(store, experiment.name)
    record = experiment_store.read_record()
    correct = np.zeros((experiment.subsets.trials, record.n_test), np.bool_)
    counted, read = np.zeros(len(correct), np.bool_), np.zeros(len(correct), np.bool_)
    for shard in experiment_store.iterate_committed():
        batch = experiment_store.batch(shard, record)
        correct[batch.trial] = batch.correctness()[1]
        counted[batch.trial] = [not each.diverged for each in batch.metrics]
        read[batch.trial] = True
    if not read.all():
        raise ScoresError(
            f"experiment '{experiment.name}': {np.count_nonzero(~read)} trials were removed from the store, and the study needs them: "
            f"train them again with memtail resume {experiment.name}"
        )
    return correct, counted
