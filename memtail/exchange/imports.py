"""Makes an experiment of trials that were trained elsewhere: record, masks, trial batches and scores, as of any other experiment."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np

from memtail.datasets import Dataset
from memtail.datasets.opaque_dataset import write_opaque
from memtail.datasets.staged_dataset import stage
from memtail.datasets.staged_inputs import stage_inputs
from memtail.errors import OutcomeError
from memtail.exchange.foreign import ForeignTrial, ForeignTrials, read_foreign
from memtail.execution.aggregation import Aggregation, Pace
from memtail.execution.declare import declare
from memtail.experiment_store import ExperimentStore, Record
from memtail.experiment_store.replicas import compare
from memtail.settings import Settings
from memtail.spec import AnyDataset, DatasetSpec, Experiment
from memtail.storage import ObjectStore, keys
from memtail.trainers.trial_batch import pack_trials
from memtail.trials import Provenance, Shard, TrialBatch

# Trials in a batch.
_SHARD = 64
_OUTCOMES = ("train_correct", "test_correct", "train_margin", "test_margin", "train_score", "test_score")


@dataclass(frozen=True)
class _Trials:
    """The trials of several files or folders, one after the other."""

    parts: Sequence[ForeignTrials]

    @property
    def count(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def origin(self) -> str:
        return ", ".join(dict.fromkeys(part.origin for part in self.parts))

    def __iter__(self) -> Iterator[ForeignTrial]:
        for part in self.parts:
            yield from part


def import_trials(
    store: ObjectStore,
    name: str,
    paths: Sequence[Path],
    dataset: Dataset | None = None,
    spec: AnyDataset | None = None,
    on_progress: Callable[[int, int], None] = lambda done, count: None,
) -> Record:
    """Register an experiment of trials that were trained elsewhere, commit their batches, and publish its scores.

    The same command continues an import that was interrupted. More trials make another experiment.

    Args:
        store: to write to.
        name: of the experiment.
        paths: files and folders with trials, as `memtail.exchange.foreign` describes them.
        dataset: the dataset of the trials; by default examples are known by their indices only, and labels if the files have them.
        spec: its declaration.
        on_progress: is called with the trials committed, and all trials.

    Returns:
        The experiment's record.

    Raises:
        OutcomeError: a file is damaged, holds no trials, or has other examples than another or than the dataset.
        StoreError: another experiment has the name, or the store cannot be written.
    """
    trials = _Trials([read_foreign(path) for path in paths])
    first = trials.parts[0]
    for part in trials.parts:
        _compare(str(part.path), part, first.n_train, first.n_test)
        if part.recorded != first.recorded:
            raise OutcomeError(
                f"{part.path}: has {', '.join(sorted(part.recorded))}, and {first.path} {', '.join(sorted(first.recorded))}: give parts "
                "with the same outcomes"
            )
    if trials.count < 2:
        raise OutcomeError(f"{first.path}: there is only 1 trial: scores need at least two, and in practice hundreds")
    if dataset is None or spec is None:
        dataset, spec = _opaque(first), DatasetSpec(name="opaque")
    if dataset.n_test and not first.n_test:
        raise OutcomeError(
            f"the files: trials without test examples, and the dataset has {dataset.n_test}: give a dataset without a test set, or none"
        )
    _compare("the files", first, dataset.n_train, dataset.n_test)
    for part in trials.parts:
        _compare_labels(part, dataset)
    experiment_store = ExperimentStore(store, name)
    with tempfile.TemporaryDirectory(prefix="memtail-import-") as folder:
        masks = Path(folder, "masks.npy")
        _write_masks(trials, masks)
        declared = declare(_experiment(name, spec, trials, masks), dataset, _SHARD)
        if store.exists(keys.experiment(name)):
            experiment_store.register(declared)  # refuse before a large dataset is uploaded
        stage(dataset, store)
        stage_inputs(declared.experiment, declared.canonical, store)
    record = experiment_store.register(declared)
    _commit(experiment_store, record, dataset, trials, on_progress)
    aggregation = Aggregation(experiment_store, record, dataset, Pace(1, 1, first_at_once=True))
    aggregation.accumulate_new()
    aggregation.publish()
    aggregation.finish()
    return record


def _experiment(name: str, spec: AnyDataset, trials: _Trials, masks: Path) -> Experiment:
    recorded = trials.parts[0].recorded
    scores = "train_score" in recorded and (True if "train_correct" in recorded else "only")
    return Experiment.parse(
        {
            "name": name,
            "dataset": spec.model_dump(mode="json"),
            "trainer": {"imported": trials.origin},
            "subsets": {"design": "explicit", "masks": str(masks), "trials": trials.count},
            "record": {"margins": "train_margin" in recorded, "scores": scores},
        }
    )


def _opaque(first: ForeignTrials) -> Dataset:
    labels = None
    if first.train_labels is not None and first.test_labels is not None:
        labels = first.train_labels, first.test_labels
    return write_opaque(first.n_train, first.n_test, labels, Settings().cache / "datasets")


def _compare(what: str, part: ForeignTrials, n_train: int, n_test: int) -> None:
    if (part.n_train, part.n_test) != (n_train, n_test):
        raise OutcomeError(
            f"{what}: trials of {part.n_train} training and {part.n_test} test examples, expected are {n_train} and {n_test}: give trials "
            "and dataset of one experiment"
        )


def _compare_labels(first: ForeignTrials, dataset: Dataset) -> None:
    for split, theirs in (("train", first.train_labels), ("test", first.test_labels)):
        ours = getattr(dataset, f"{split}_labels")
        if theirs is not None and dataset.labelled and (differ := np.flatnonzero(theirs != ours)).size:
            raise OutcomeError(
                f"{split}_labels of {first.path} differ from the dataset's at {len(differ)} of {len(ours)} examples, first at {differ[0]} "
                f"({theirs[differ[0]]}, in the dataset {ours[differ[0]]}): the outcomes are in another order, or of another dataset"
            )


def _write_masks(trials: _Trials, path: Path) -> None:
    masks = np.lib.format.open_memmap(path, "w+", np.bool_, (trials.count, trials.parts[0].n_train))
    for row, trial in enumerate(trials):
        masks[row] = trial.members


def _commit(
    experiment_store: ExperimentStore, record: Record, dataset: Dataset, trials: _Trials, on_progress: Callable[[int, int], None]
) -> None:
    provenance = Provenance(record.fingerprint, version("memtail"), started=datetime.now(UTC).isoformat(timespec="seconds"))
    committed = set(experiment_store.committed())
    for first, group in enumerate(_groups(trials, record.trials_per_shard)):
        shard = Shard(first * record.trials_per_shard, first * record.trials_per_shard + len(group) - 1)
        batch = _packed(dataset, shard, group, provenance)
        if shard not in committed:
            experiment_store.commit(batch, record.fingerprint)
        elif compare(experiment_store.batch(shard, record), batch).differs:
            raise OutcomeError(f"experiment '{record.experiment.name}' holds other outcomes of {shard}: import these under another name")
        on_progress(shard.last + 1, trials.count)


def _packed(dataset: Dataset, shard: Shard, group: list[ForeignTrial], provenance: Provenance) -> TrialBatch:
    outcomes = {name: np.stack([getattr(trial, name) for trial in group]) for name in _OUTCOMES if getattr(group[0], name) is not None}
    return pack_trials(
        dataset,
        shard.trials,
        np.stack([trial.members for trial in group]),
        outcomes.pop("train_correct", None),
        outcomes.pop("test_correct", None),
        np.full(len(group), np.nan),
        np.zeros(len(group), np.bool_),
        provenance,
        **outcomes,  # type: ignore[arg-type]
    )


def _groups(trials: _Trials, size: int) -> Iterator[list[ForeignTrial]]:
    left = iter(trials)
    while group := list(islice(left, size)):
        yield group
