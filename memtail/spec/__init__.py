"""Declaration of an experiment: its parts, their validation, and the fingerprint of the computation.

No module of this package imports torch.
"""

from memtail.spec.cluster import Toleration, WorkersSpec
from memtail.spec.dataset import DatasetSpec, TableColumns
from memtail.spec.dataset_sources import AnyDataset, FunctionDataset, HuggingFaceDataset, HuggingFaceSplits, TorchvisionDataset
from memtail.spec.errors import differences
from memtail.spec.experiment import (
    NAME,
    RECIPE_VERSION,
    Cnn,
    Constant,
    Cosine,
    ExecutionSpec,
    Experiment,
    Linear,
    Mlp,
    ModelSpec,
    NamedModel,
    RecordedOutcomes,
    ScheduleSpec,
    Sgd,
    Step,
    SubsetsSpec,
    TrainingSpec,
    UntilSpec,
)
from memtail.spec.trainer import CommandTrainer, FunctionTrainer, ImagesTrainer, ImportedTrainer, TrainerSpec

__all__ = [
    "NAME",
    "RECIPE_VERSION",
    "AnyDataset",
    "Cnn",
    "CommandTrainer",
    "Constant",
    "Cosine",
    "DatasetSpec",
    "ExecutionSpec",
    "Experiment",
    "FunctionDataset",
    "FunctionTrainer",
    "HuggingFaceDataset",
    "HuggingFaceSplits",
    "ImagesTrainer",
    "ImportedTrainer",
    "Linear",
    "Mlp",
    "ModelSpec",
    "NamedModel",
    "RecordedOutcomes",
    "ScheduleSpec",
    "Sgd",
    "Step",
    "SubsetsSpec",
    "TableColumns",
    "Toleration",
    "TorchvisionDataset",
    "TrainerSpec",
    "TrainingSpec",
    "UntilSpec",
    "WorkersSpec",
    "differences",
]
