"""`ShardTrainer`: trains shards on one device by the trainer that their experiment declares."""

import math
from collections.abc import Callable
from pathlib import Path

from memtail.datasets import Dataset
from memtail.experiment_store import Record
from memtail.trainers.checkpoints import Checkpoints
from memtail.trainers.inputs import trainable
from memtail.trainers.process import TrainerProcess
from memtail.trainers.work import Work
from memtail.trials import Shard, TrialBatch


class ShardTrainer:
    """Trains shards: memtail's own networks in this process, user code in a trainer process, which is kept from shard to shard.

    Args:
        device: to train on, as torch names it.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._process = TrainerProcess(device)
        self._keeps_images = False
        #: Whether this process can train further shards; not after an error of its device's driver.
        self.usable = True
        #: Peak memory in bytes of the process that trained the last shard: of the device on CUDA, of the host elsewhere.
        self.peak_memory = 0

    def train(
        self,
        record: Record,
        dataset: Dataset,
        shard: Shard,
        checkpoints: Checkpoints | None,
        *,
        code: Path | None = None,
        store: str | None = None,
        on_progress: Callable[[float], None] = lambda fraction: None,
        on_step: Callable[[], None] = lambda: None,
        stop: Callable[[], bool] = lambda: False,
        silence: float = math.inf,
        following: Callable[[], Shard | None] = lambda: None,
    ) -> TrialBatch:
        """Train a shard from its last checkpoint on.

        Args:
            record: of the experiment, with its masks, if any, in a file on this machine.
            dataset: the experiment's dataset.
            shard: the shard.
            checkpoints: where its state is kept.
            code: folder of the user's code; by default the current folder.
            store: address of the store; if it is a folder, user code has no access to it.
            on_progress: is called with the trained part of the shard, 0 to 1.
            on_step: is called when training has advanced; several times a second while user code is watched.
            stop: is asked every few steps, or several times a second, whether to stop.
            silence: seconds without progress after which user code is ended.
            following: asked which shard of the experiment this process trains next, so that an accelerator does not wait for its networks.

        Returns:
            The shard's batch.

        Raises:
            TrainingStopped: `stop` returned True.
            WorkerFaultError: this machine is at fault.
            UnsupportedError: the user's code on this machine is not the experiment's.
            Exception: the shard is at fault.
        """
        if record.experiment.runs_user_code:
            self._release_device()
            work = Work(record, dataset, shard, (code or Path.cwd()).absolute(), store)
            batch = self._process.train(work, checkpoints, on_progress=on_progress, on_step=on_step, stop=stop, silence=silence)
            self.peak_memory = self._process.peak_memory
            return batch
        self._process.end()
        return self._train_images(record, dataset, shard, checkpoints, on_progress, on_step, stop, following)

    def end(self) -> None:
        """End the trainer process."""
        self._process.end()

    def _release_device(self) -> None:
        """Release the device's memory that this process keeps for the next shard of the built-in trainer."""
        if not self._keeps_images:
            return
        from memtail.trainers.images.images import release_images

        release_images()
        self._keeps_images = False

    def _train_images(
        self,
        record: Record,
        dataset: Dataset,
        shard: Shard,
        checkpoints: Checkpoints | None,
        on_progress: Callable[[float], None],
        on_step: Callable[[], None],
        stop: Callable[[], bool],
        following: Callable[[], Shard | None],
    ) -> TrialBatch:
        import torch

        from memtail.trainers.images import Progress, train_shard
        from memtail.trainers.images.devices import is_device_error, peak_memory

        def report(progress: Progress) -> None:
            on_progress(progress.epochs / progress.total)

        def step() -> bool:
            on_step()
            return stop()

        device, self._keeps_images = torch.device(self._device), True
        try:
            batch = train_shard(
                record.experiment,
                trainable(record.experiment, dataset),
                shard.trials,
                device,
                on_progress=report,
                checkpoints=checkpoints,
                stop=step,
                following=lambda: shard.trials if (shard := following()) else None,
            )
        except Exception as error:
            self.usable = not is_device_error(error)
            raise
        self.peak_memory = peak_memory(device)
        return batch
