"""Training: one shard of trials on one device -> a trial batch.

`train_shard` is the only door. It is pure: what it returns follows from the experiment, the dataset and the trials' indices, and
not from who calls it. On a CPU it computes on one thread, which makes the bits independent of the number of cores (and of the
shard: see `memtail.trainers.images.stack`); the cores are filled by running several shards at once.
"""

from memtail.errors import TrainingStopped
from memtail.trainers.images.shard import Checkpoints, Progress, train_shard

__all__ = ["Checkpoints", "Progress", "TrainingStopped", "train_shard"]
