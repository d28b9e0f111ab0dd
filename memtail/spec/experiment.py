"""Experiment: one declaration (YAML) of dataset, model, training recipe, subset design and number of trials.

`Experiment.load(path)` reads and validates a file; `experiment.fingerprint(dataset_fingerprint)` identifies its computation. The
fingerprint omits everything that no trial depends on: `name`, the paths of files, `execution` (speed), and `subsets.trials` and
`subsets.until` (number of trials: more trials extend an experiment).
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError, field_validator, model_validator

from memtail.digests import file_digest
from memtail.errors import SpecError
from memtail.spec.base import Part
from memtail.spec.cluster import WorkersSpec
from memtail.spec.dataset_sources import AnyDataset, with_absolute_paths
from memtail.spec.errors import describe
from memtail.spec.model import Mlp, ModelSpec, NamedModel
from memtail.spec.trainer import ImagesTrainer, ImportedTrainer, TrainerSpec, code_digest
from memtail.spec.training import TrainingSpec

#: Part of every fingerprint; raised when a change in memtail changes the computation of a trial.
RECIPE_VERSION = 2

#: Pattern of experiment names, which are parts of object keys.
NAME = re.compile(r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")

#: Most epochs after which outcomes are recorded.
MOST_SNAPSHOTS = 32

# Fewest trials in the first round of an experiment that stops at a standard error.
_SMALLEST_ROUND = 64
# Width of a 95% interval in standard errors, at most.
_INTERVAL = 2 * 1.96
# Standard error in the worst case up to which the overlap of rankings is sought: ties may keep it from ever being reached.
_FINEST = 0.01


class RankingSpec(Part):
    """The agreement on the most memorized examples at which an experiment ends.

    Attributes:
        top: the number of most memorized examples.
        overlap: the overlap (Jaccard) of these with those of another run of as many trials, as expected from the present trials.
    """

    top: Annotated[int, Field(ge=1)]
    overlap: Annotated[float, Field(gt=0, lt=1)]


class UntilSpec(Part):
    """The precision at which an experiment ends: all bounds that are declared, at least one, have to hold.

    Attributes:
        standard_error: the largest standard error of memorization accepted.
        interval_width: the largest width of the 95% interval of memorization accepted, from `mem_lo` to `mem_hi`.
        ranking: the agreement with another run on the most memorized examples that is needed. It is sought up to the number of trials at
            which no standard error exceeds 0.01.
        quantile: the share of training examples that must reach `standard_error` and `interval_width`.
    """

    standard_error: Annotated[float, Field(gt=0, lt=0.5)] | None = None
    interval_width: Annotated[float, Field(gt=0, lt=2)] | None = None
    ranking: RankingSpec | None = None
    quantile: Annotated[float, Field(gt=0, le=1)] = 0.95

    @model_validator(mode="after")
    def _has_a_bound(self) -> Self:
        if self.standard_error is None and self.interval_width is None and self.ranking is None:
            raise ValueError("until needs a bound: standard_error, interval_width or ranking")
        return self

    def most_trials(self, fraction: float) -> int:
        """Return the number of trials that suffices for every example, or is the most for a ranking: the worst case, p_in = p_out = 1/2.

        See `memtail.estimators.expected_standard_error`.

        Args:
            fraction: of the training examples in each subset.
        """
        bounds = (
            self.standard_error,
            None if self.interval_width is None else self.interval_width / _INTERVAL,
            None if self.ranking is None else _FINEST,
        )
        bound = min(each for each in bounds if each is not None)
        return math.ceil((1 / fraction + 1 / (1 - fraction)) / 4 / bound**2)

    def first_round(self, fraction: float) -> int:
        """Return the number of trials of the first round: a twentieth of the worst case, but enough to estimate standard errors from.

        Args:
            fraction: of the training examples in each subset.
        """
        most = self.most_trials(fraction)
        return max(2, min(most, max(_SMALLEST_ROUND, most // 20)))


class SubsetsSpec(Part):
    """The subset design and the number of trials.

    Attributes:
        design: the rule that maps a trial to its subset (see `memtail.subsets`).
        fraction: share of the training examples in a subset.
        trials: number of trials; with `until`, the number to begin with, which has a suitable default.
        seed: seed of the experiment: of subsets, initial weights, batch order and augmentation.
        masks: of the design `explicit`, a `.npy` file of booleans [trials, n].
        until: continue in rounds of trials until the scores have this precision.
    """

    design: Literal["uniform", "balanced", "stratified", "explicit"] = "uniform"
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.7
    trials: Annotated[int, Field(ge=2)] = 1000
    seed: Annotated[int, Field(ge=0)] = 0
    masks: Path | None = None
    until: UntilSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _begin_with_a_first_round(cls, data: Any) -> Any:
        try:
            if "trials" not in data and data["until"]:
                until = UntilSpec.model_validate(data["until"])
                return {**data, "trials": until.first_round(float(data.get("fraction", 0.7)))}
        except (KeyError, TypeError, ValueError, ArithmeticError):  # a ValidationError is a ValueError
            pass  # there is no `until`, or its own validation reports it
        return data

    @model_validator(mode="after")
    def _masks_are_given_in_full(self) -> Self:
        if self.masks is not None and self.until is not None:
            raise ValueError("until cannot be combined with masks, which fix the number of trials")
        return self

    @model_validator(mode="after")
    def _masks_belong_to_explicit(self) -> Self:
        if (self.design == "explicit") != (self.masks is not None):
            raise ValueError("masks (a .npy file of booleans [trials, n]) are required for design 'explicit', and refused for others")
        return self


def _ascending(epochs: list[int]) -> list[int]:
    if sorted(set(epochs)) != epochs:
        raise ValueError(f"are different epochs in ascending order, not {epochs}")
    return epochs


def _false_true_or_only(value: Any) -> Any:
    if value == "only":
        return value
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        raise ValueError("is false, true or only") from None


def _number_or_all(value: Any) -> Any:
    if value == "all" or (type(value) is int and value >= 0):
        return value
    raise ValueError("is a number of trials, or all")


class RecordedOutcomes(Part):
    """Additional outcomes recorded in each trial.

    Attributes:
        margins: record the logit margin of every example.
        scores: record a score in [0, 1] of every example, of which memorization and influence are estimated too: of the built-in trainer,
            the probability of the label; of training code of your own, what it returns. Each takes a byte. `only` is for training code
            of your own that does not know what is correct: it returns scores alone, and memorization and influence are those of scores.
        snapshots: record after these epochs, too, which training examples are classified correctly; of the built-in trainer.
        models: keep the weights of the models of this many first trials, or of `all` (see `memtail.load_model`); of the built-in trainer.
    """

    margins: bool = False
    scores: Annotated[bool | Literal["only"], BeforeValidator(_false_true_or_only)] = False
    snapshots: Annotated[list[Annotated[int, Field(ge=1)]], Field(max_length=MOST_SNAPSHOTS), AfterValidator(_ascending)] = []
    models: Annotated[Literal["all"] | Annotated[int, Field(ge=0)], BeforeValidator(_number_or_all)] = 0

    def keeps_model(self, trial: int) -> bool:
        """Return whether the model of a trial is kept."""
        return self.models == "all" or trial < self.models

    @property
    def scores_only(self) -> bool:
        """Whether trials have scores in place of correctness."""
        return self.scores == "only"


class ExecutionSpec(Part):
    """Where and how trials are trained. No trial depends on it but in rounding, which `require` keeps equal.

    Attributes:
        device: `auto`, `cpu`, `mps`, `cuda` (all GPUs) or `cuda:INDEX`.
        trials_per_shard: trials that are trained together and committed as one trial batch.
        require: `same-device` trains all trials on one kind of device and processor, that of the first; workers of other kinds leave the
            experiment alone. By default devices may be mixed.
        verify: share of the shards that are trained a second time after their commit, to compare the outcomes.
        workers: workers requested from a Kubernetes cluster.
    """

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    trials_per_shard: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    require: Literal["same-device"] | None = None
    verify: Annotated[float, Field(ge=0, le=1)] = 0.0
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
    def _scores_stand_alone_without_correctness(self) -> Self:
        if self.record.scores_only and isinstance(self.trainer, ImagesTrainer):
            raise ValueError("record.scores: only is for training code of your own; the built-in trainer knows correctness: set it to true")
        return self

    @property
    def runs_user_code(self) -> bool:
        """Whether its trials run code of the user's own: a function, a command, or a network named `package.module:function`."""
        return not isinstance(self.trainer, ImagesTrainer | ImportedTrainer) or (
            isinstance(self.model, NamedModel) and self.model.is_user_code
        )

    @field_validator("name", mode="before")
    @classmethod
    def _name_is_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    @classmethod
    def load(cls, path: str | Path) -> "Experiment":
        """Read and validate a YAML file.

        Args:
            path: of the file; relative paths in the file are relative to it.

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
        experiment = cls.parse(data, base=path.parent, source=str(path))
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
            raise SpecError(f"{source}: {describe(error, cls)}") from None
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
