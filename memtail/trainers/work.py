"""Work of a trainer process: the message that asks for it, and checks of what the process returns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memtail.datasets import DatasetLabels
from memtail.errors import ForeignObjectError, TrainerError
from memtail.experiment_store import Record
from memtail.spec import Experiment
from memtail.subsets import membership
from memtail.trials import Shard, TrialBatch, pack


@dataclass(frozen=True)
class Work:
    """What a trainer process trains.

    Attributes:
        record: of the experiment, with the masks, if any, in a file on this machine.
        dataset: the experiment's dataset.
        shard: the shard.
        code: folder of the user's code.
        store: address of the store; if it is a folder, user code has no access to it.
    """

    record: Record
    dataset: DatasetLabels
    shard: Shard
    code: Path
    store: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The message that begins the training."""
        return {
            "experiment": self._experiment().model_dump(mode="json"),
            "fingerprint": self.record.fingerprint,
            "trainer_code": self.record.trainer_code,
            "dataset": str(self.dataset.folder),
            "first": self.shard.first,
            "last": self.shard.last,
            "code": str(self.code),
        }

    def check_model(self, trial: int) -> None:
        """Check that the model of a trial is to be kept. Raises: TrainerError."""
        if trial not in self.shard.trials or not self.record.experiment.record.keeps_model(trial):
            raise TrainerError(f"the trainer process returned a model of trial {trial}, which is not to be kept")

    def batch_of(self, data: bytes) -> TrialBatch:
        """Read a batch, and check that it is the shard's: user code shares the process that made it. Raises: TrainerError."""
        experiment, trials = self.record.experiment, self.shard.trials
        try:
            batch = TrialBatch.from_bytes(data)
            members = membership(experiment.subsets, self.dataset.train_labels, trials)
            same = (
                batch.trial.tolist() == list(trials)
                and batch.fingerprint == self.record.fingerprint
                and (batch.n_train, batch.n_test) == (self.dataset.n_train, self.dataset.n_test)
                and batch.scores_only == experiment.record.scores_only
                and bool((batch.membership == pack(members)).all())
            )
        except (ForeignObjectError, ValueError):
            raise TrainerError("the trainer process returned what is no batch: the code wrote to the connection of memtail") from None
        if not same:
            raise TrainerError("the trainer process returned a batch of other trials")
        return batch

    def _experiment(self) -> Experiment:
        """The experiment, with paths that hold in another folder."""
        experiment = self.record.experiment
        paths = [path for path in (experiment.subsets.masks, experiment.model.weights_file) if path is not None]
        return experiment.with_files({path: path.absolute() for path in paths})
