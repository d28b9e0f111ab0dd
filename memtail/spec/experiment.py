"""Experiment: one declaration (YAML) of dataset, model, training recipe, subset design and number of trials.

`Experiment.load(path)` reads and validates a file; `experiment.fingerprint(dataset_fingerprint)` identifies its computation. The
fingerprint omits everything that no trial depends on: `name`, the paths of files, `execution` (speed), and `subsets.trials` and
`subsets.until` (number of trials: more trials extend an experiment).
"""

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from memtail.digests import file_digest
from memtail.errors import SpecError
from memtail.spec.base import Part
from memtail.spec.changes import changed
from memtail.spec.cluster import WorkersSpec
from memtail.spec.dataset_sources import AnyDataset, with_absolute_paths
from memtail.spec.errors import describe
from memtail.spec.model import Mlp, ModelSpec, NamedModel
from memtail.spec.record import RecordedOutcomes
from memtail.spec.subsets import SubsetsSpec
from memtail.spec.trainer import ImagesTrainer, ImportedTrainer, TrainerSpec, code_digest
from memtail.spec.training import TrainingSpec

#: Part of every fingerprint; raised when a change in memtail changes the computation of a trial.
RECIPE_VERSION = 2

#: Pattern of experiment names, which are parts of object keys.
NAME = re.compile(r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")


def _auto_or_a_bool(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError("is auto, true or false")
    return value


class ExecutionSpec(Part):
    """Where and how trials are trained. No trial depends on it but in rounding, which `require` keeps equal.

    Attributes:
        device: `auto`, `cpu`, `mps`, `cuda` (all GPUs) or `cuda:INDEX`.
        trials_per_shard: trials that are trained together and committed as one trial batch.
        require: `same-device` trains all trials on one kind of device and processor, that of the first; workers of other kinds leave the
            experiment alone. By default devices may be mixed.
        verify: share of the shards that are trained a second time after their commit, to compare the outcomes.
        compile: of built-in networks on CUDA: `true` compiles them (`torch.compile`), which takes a minute or two in each process; `auto`
            does so where 500 trials take more than ten minutes of a GPU; `false` neither compiles them nor captures their steps in CUDA
            graphs. Networks of linear layers have steps of their own, except in `bfloat16`: these are captured and never compiled.
        workers: workers requested from a Kubernetes cluster.
    """

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    trials_per_shard: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    require: Literal["same-device"] | None = None
    verify: Annotated[float, Field(ge=0, le=1)] = 0.0
    compile: Annotated[bool | Literal["auto"], BeforeValidator(_auto_or_a_bool)] = "auto"
    workers: WorkersSpec | None = None


class Experiment(Part):
    """One declared experiment. Immutable; equal declarations have equal fingerprints.

    Attributes:
        name: name of the experiment in the store: lower-case letters, digits, `.`, `_` and `-`, at most 63.
        dataset: the training and test examples.
        model: the architecture.
        training: the training recipe.
        subsets: the subset design and the number of trials.
        record: additional outcomes.
        execution: settings that affect speed only.
        trainer: the built-in trainer, or a function or a command of the user's. A function or a command replaces `model` and `training`.
    """

    name: Annotated[str, Field(pattern=NAME.pattern)]
    dataset: AnyDataset
    model: ModelSpec = Mlp()
    training: TrainingSpec = TrainingSpec()
    subsets: SubsetsSpec = SubsetsSpec()
    record: RecordedOutcomes = RecordedOutcomes()
    execution: ExecutionSpec = ExecutionSpec()
    trainer: TrainerSpec = ImagesTrainer()

    @model_validator(mode="before")
    @classmethod
    def _user_code_replaces_the_recipe(cls, data: Any) -> Any:
        trainer = data.get("trainer") if isinstance(data, dict) else None
        kind = next((key for key in ("function", "command", "imported") if isinstance(trainer, dict) and key in trainer), None)
        for key in ("model", "training"):
            if kind and data.get(key) not in (None, _DEFAULTS[key]):
                raise ValueError(
                    f"{key} is for the built-in trainer, and trainer.{kind} replaces it: remove {key}, or pass trainer.options"
                )
        return data

    @model_validator(mode="after")
    def _records_fit_the_trainer(self) -> Self:
        snapshots, built_in = self.record.snapshots, isinstance(self.trainer, ImagesTrainer)
        if self.record.models and not built_in:
            raise ValueError("record.models is for the built-in trainer: remove it, and save models in the training code")
        if snapshots and not built_in:
            raise ValueError("record.snapshots is for the built-in trainer, whose epochs memtail knows: remove it")
        if snapshots and snapshots[-1] > self.training.epochs:
            raise ValueError(f"record.snapshots: {snapshots[-1]} is after the last of {self.training.epochs} epochs: name epochs up to it")
        return self

    @model_validator(mode="after")
    def _compiled_networks_are_built_in(self) -> Self:
        if self.execution.compile is True and self.runs_user_code:
            raise ValueError("execution.compile: true is for built-in networks: remove it, and compile your own network in its code")
        return self

    @model_validator(mode="after")
    def _scores_stand_alone_without_correctness(self) -> Self:
        if self.record.scores_only and isinstance(self.trainer, ImagesTrainer):
            raise ValueError("record.scores: only is for training code of your own; the built-in trainer knows correctness: remove it")
        return self

    @property
    def runs_user_code(self) -> bool:
        """Whether its trials run code of the user's own: a function, a command, or a network named `package.module:function`."""
        return not isinstance(self.trainer, ImagesTrainer | ImportedTrainer) or (
            isinstance(self.model, NamedModel) and self.model.is_user_code
        )

    @field_validator("name", mode="before")
    @classmethod
    def _name_is_one_of_the_store(cls, value: Any) -> Any:
        name = str(value) if isinstance(value, int) else value
        if isinstance(name, str) and not NAME.match(name):
            other = re.sub("[^a-z0-9._-]+", "-", name.lower())[:63].strip("._-")
            fix = f": use {other}" if NAME.match(other) else ""
            raise ValueError(f"has lower-case letters, digits, '.', '_' and '-' only, at most 63{fix}")
        return name

    @classmethod
    def load(cls, path: str | Path, changes: Sequence[str] = ()) -> "Experiment":
        """Read and validate a YAML file.

        Args:
            path: of the file; relative paths in the file are relative to it.
            changes: keys to set, such as `training.epochs=5`; the value is YAML.

        Raises:
            SpecError: the file cannot be read, is not YAML, or does not validate; one line names each place and fault.
        """
        path = Path(path)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SpecError(f"{path}: cannot be read ({error.strerror}): give the path of an experiment file") from None
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise SpecError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(data, dict):
            raise SpecError(f"{path}: holds {type(data).__name__}, not the keys of an experiment (name, dataset, ...)")
        experiment = cls.parse(changed(data, changes), base=path.parent, source=str(path))
        if isinstance(experiment.trainer, ImportedTrainer):
            raise SpecError(f"{path}: trainer.imported is of trials that memtail import brought: declare a function or a command")
        return experiment

    @classmethod
    def parse(cls, data: dict[str, Any], *, base: Path | None = None, source: str = "experiment") -> "Experiment":
        """Validate a loaded declaration.

        Args:
            data: keys and values, as in the YAML file.
            base: folder of relative paths; by default they stay relative.
            source: name of the declaration in errors.

        Raises:
            SpecError: the declaration does not validate; one line names each place and fault.
        """
        try:
            experiment = cls.model_validate(data)
        except ValidationError as error:
            faults = describe(error, cls)
            lines = (f"{source}: {len(faults)} mistakes", *(f"  {fault}" for fault in faults)) if len(faults) > 1 else ()
            raise SpecError(f"{source}: {'; '.join(faults)}", lines) from None
        return experiment if base is None else experiment._with_absolute_paths(base)

    def _with_absolute_paths(self, base: Path) -> "Experiment":
        def absolute(path: Path | None) -> Path | None:
            return None if path is None else (base / path.expanduser()).resolve()

        return self.model_copy(
            update={
                "dataset": with_absolute_paths(self.dataset, base),
                "trainer": self._trainer_in(base),
                "subsets": self.subsets.model_copy(update={"masks": absolute(self.subsets.masks)}),
                "model": self._model_from(absolute(self.model.weights_file)),
            }
        )

    def _model_from(self, weights: Path | None) -> ModelSpec:
        return self.model if weights is None else self.model.model_copy(update={"weights": str(weights)})

    def _trainer_in(self, base: Path) -> TrainerSpec:
        if isinstance(self.trainer, ImagesTrainer | ImportedTrainer):
            return self.trainer
        return self.trainer.model_copy(update={"folder": (base / (self.trainer.folder or Path()).expanduser()).resolve()})

    def with_files(self, files: Mapping[Path, Path]) -> "Experiment":
        """Return this experiment with masks and weights in other files of equal content.

        Args:
            files: the other file of each.
        """
        subsets, weights = self.subsets, self.model.weights_file
        if subsets.masks is not None and subsets.masks in files:
            subsets = subsets.model_copy(update={"masks": files[subsets.masks]})
        return self.model_copy(update={"subsets": subsets, "model": self._model_from(files.get(weights) if weights else None)})

    def canonical(
        self,
        dataset_fingerprint: str,
        masks_digest: str | None = None,
        trainer_code: str | None = None,
        weights_digest: str | None = None,
    ) -> dict[str, Any]:
        """Return the input of the fingerprint: the resolved declaration without everything that no trial depends on.

        Keys later than 0.1.0 are in it only where they differ from their default; of `record`, `scores` only as `only`, without
        correctness, and `snapshots` and `models` never.

        Args:
            dataset_fingerprint: replaces the dataset's declaration.
            masks_digest: digest of the masks, where their file is elsewhere; by default the file is read.
            trainer_code: digest of the trainer's code, where its files are elsewhere; by default they are read.
            weights_digest: digest of the file of the weights, where it is elsewhere; by default it is read.

        Raises:
            SpecError: the masks, the weights or the trainer's code cannot be read.
        """
        spec = self.model_dump(mode="json", exclude={"name": True, "execution": True, "dataset": True, "subsets": {"trials", "until"}})
        spec["dataset"] = {"fingerprint": dataset_fingerprint}
        spec["record"] = {"margins": self.record.margins} | ({"scores": "only"} if self.record.scores_only else {})
        if self.subsets.masks is not None:
            spec["subsets"]["masks"] = masks_digest or _digest("subsets.masks", self.subsets.masks)
            del spec["subsets"]["fraction"]
        if (weights := self.model.weights_file) is not None:
            spec["model"]["weights"] = weights_digest or _digest("model.weights", weights)
        if not isinstance(self.trainer, ImagesTrainer | ImportedTrainer):
            trainer = self.trainer.model_dump(mode="json", include={"function", "command", "options"})
            spec["trainer"] = trainer | {"code": trainer_code or code_digest(self.trainer, sys.path)}
        return {"recipe_version": RECIPE_VERSION, **spec}

    def fingerprint(self, dataset_fingerprint: str) -> str:
        """Return the SHA-256 (hex) of the canonical declaration.

        Args:
            dataset_fingerprint: of the prepared dataset.

        Raises:
            SpecError: the masks, the weights or the trainer's code cannot be read.
        """
        text = json.dumps(self.canonical(dataset_fingerprint), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_yaml(self) -> str:
        """Return the resolved declaration as YAML, with its defaults except those of keys later than 0.1.0."""
        replaced = set() if isinstance(self.trainer, ImagesTrainer) else {"model", "training"}
        text: str = yaml.safe_dump(
            self.model_dump(mode="json", exclude_none=True, exclude=replaced), sort_keys=False, default_flow_style=None, width=120
        )
        return text


# The declared parts that a trainer of the user's replaces, as records hold them.
_DEFAULTS = {"model": Mlp().model_dump(mode="json"), "training": TrainingSpec().model_dump(mode="json")}


def _digest(key: str, path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise SpecError(f"{key}: {path} cannot be read ({error.strerror})") from None
