"""Declaration of an experiment: its parts, their validation, and the fingerprint of the computation.

No module of this package imports torch.
"""

from memtail.spec.augmentation import AugmentationSpec, ColorJitter, CropFlip, Flip, RandomErasing, RandomResizedCrop
from memtail.spec.cluster import Toleration, WorkersSpec
from memtail.spec.dataset import DatasetSpec, TableColumns
from memtail.spec.dataset_sources import AnyDataset, FunctionDataset, HuggingFaceDataset, HuggingFaceSplits, TorchvisionDataset
from memtail.spec.errors import differences
from memtail.spec.experiment import NAME, RECIPE_VERSION, ExecutionSpec, Experiment
from memtail.spec.model import Cnn, Mlp, ModelSpec, NamedModel
from memtail.spec.record import RecordedOutcomes
from memtail.spec.subsets import PairsSpec, RankingSpec, SubsetsSpec, UntilSpec
from memtail.spec.trainer import CommandTrainer, FunctionTrainer, ImagesTrainer, ImportedTrainer, TrainerSpec
from memtail.spec.training import Adam, AdamW, Constant, Cosine, Linear, OptimizerSpec, ScheduleSpec, Sgd, Step, TrainingSpec

__all__ = [
    "NAME",
    "RECIPE_VERSION",
    "Adam",
    "AdamW",
    "AnyDataset",
    "AugmentationSpec",
    "Cnn",
    "ColorJitter",
    "CommandTrainer",
    "Constant",
    "Cosine",
    "CropFlip",
    "DatasetSpec",
    "ExecutionSpec",
    "Experiment",
    "Flip",
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
    "OptimizerSpec",
    "PairsSpec",
    "RandomErasing",
    "RandomResizedCrop",
    "RankingSpec",
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
