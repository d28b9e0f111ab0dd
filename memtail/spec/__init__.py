"""The declaration of an experiment: its parts, its validation, and the fingerprint that names what it computes.

Nothing here imports torch.
"""

from memtail.spec.cluster import Toleration, WorkersSpec
from memtail.spec.errors import differences
from memtail.spec.experiment import (
    NAME,
    RECIPE_VERSION,
    Cnn,
    Constant,
    Cosine,
    DatasetSpec,
    ExecutionSpec,
    Experiment,
    Linear,
    Mlp,
    ModelSpec,
    NamedModel,
    RecordSpec,
    ScheduleSpec,
    Sgd,
    Step,
    SubsetsSpec,
    TrainingSpec,
    UntilSpec,
)

__all__ = [
    "NAME",
    "RECIPE_VERSION",
    "Cnn",
    "Constant",
    "Cosine",
    "DatasetSpec",
    "ExecutionSpec",
    "Experiment",
    "Linear",
    "Mlp",
    "ModelSpec",
    "NamedModel",
    "RecordSpec",
    "ScheduleSpec",
    "Sgd",
    "Step",
    "SubsetsSpec",
    "Toleration",
    "TrainingSpec",
    "UntilSpec",
    "WorkersSpec",
    "differences",
]
