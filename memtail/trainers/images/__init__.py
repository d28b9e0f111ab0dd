"""The built-in image trainer: one shard of trials on one device -> a trial batch.

`train_shard` is the entry point. It is pure: its result follows from the experiment, the dataset and the trials' indices, and does not
depend on the caller. On a CPU it computes on one thread, so that the bits do not depend on the number of cores (nor on the shard: see
`memtail.trainers.images.stack`); several shards at once keep all cores busy.
"""

from memtail.errors import TrainingStopped
from memtail.trainers.checkpoints import Checkpoints
from memtail.trainers.images.shard import Progress, train_shard

__all__ = ["Checkpoints", "Progress", "TrainingStopped", "train_shard"]
