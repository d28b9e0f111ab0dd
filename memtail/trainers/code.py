"""`code_folder`: the folder on this machine with the training code of an experiment, as it was when the experiment was registered."""

import sys
from pathlib import Path

from memtail.errors import SpecError, UnsupportedError
from memtail.experiment_store import Record
from memtail.settings import Settings
from memtail.spec import ImagesTrainer, ImportedTrainer
from memtail.spec.trainer import code_digest


def code_folder(record: Record) -> Path | None:
    """Find the code of a function or a command: in `MEMTAIL_CODE`, in the folder from which it was registered, or in the current folder.

    A network is found by its name, on the Python path or there.

    Args:
        record: of the experiment.

    Returns:
        The folder; that of `MEMTAIL_CODE`, if any, for the built-in trainer.

    Raises:
        UnsupportedError: no folder has the code; or it differs from that of the experiment.
    """
    trainer = record.experiment.trainer
    if isinstance(trainer, ImagesTrainer):
        return Settings().code
    if isinstance(trainer, ImportedTrainer):
        raise UnsupportedError(f"its trials were trained elsewhere ({trainer.imported}): memtail has no trainer to train others")
    reasons = []
    for folder in dict.fromkeys(filter(None, (Settings().code, trainer.folder, Path.cwd()))):
        try:
            here = code_digest(trainer.model_copy(update={"folder": folder}), sys.path)
        except SpecError as error:
            reasons.append(f"it is not on this machine: {error}")
            continue
        if here == record.trainer_code:
            return folder
        reasons.insert(0, f"that in {folder} differs: digest {here[:12]}, registered {str(record.trainer_code)[:12]}")
    raise UnsupportedError(
        f"the training code of experiment '{record.experiment.name}' cannot be used here: {reasons[0]}; set MEMTAIL_CODE to the "
        f"folder of the code as it was"
    )
