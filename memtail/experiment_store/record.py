"""The record of an experiment, `experiment.json`: its declaration, its fingerprint, and the size of its shards."""

import json
import re
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from memtail.errors import SpecError, StoreError, UnsupportedError
from memtail.settings import Limits
from memtail.spec.base import Part
from memtail.spec.cluster import WorkersSpec
from memtail.spec.errors import describe, differences
from memtail.spec.experiment import RECIPE_VERSION, ExecutionSpec, Experiment
from memtail.spec.trainer import ImagesTrainer
from memtail.storage.keys import LAST_TRIAL
from memtail.trials import Shard

SCHEMA = 1

#: Most bytes that a trial with scores may take in the statistics where nobody asked for scores. ImageNet's take 376,542.
SCORED_BYTES = 400_000

#: Pattern of an owner: one line of printable characters.
OWNER = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,100}")

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _DatasetPart(BaseModel):
    model_config = ConfigDict(extra="allow")
    fingerprint: str


class _Canonical(BaseModel):
    """The parts of a canonical declaration that are read."""

    model_config = ConfigDict(extra="allow")
    dataset: _DatasetPart
    subsets: dict[str, Any]


class _Content(BaseModel):
    """What a record holds beside the declaration."""

    model_config = ConfigDict(strict=True)
    fingerprint: _Digest
    canonical: Annotated[dict[str, Any], AfterValidator(_Canonical.model_validate), AfterValidator(_Canonical.model_dump)]
    n_train: PositiveInt
    n_test: NonNegativeInt
    trials_per_shard: PositiveInt
    owner: Annotated[str, Field(pattern=f"^{OWNER.pattern}$")] | None = None


@dataclass(frozen=True)
class Record:
    """Record of an experiment: the object `experiment.json`.

    All processes that work on an experiment cut it into shards of the recorded size. An extension may add trials to the last shard of the
    cut, which two batches then cover; statistics count each trial once.

    Attributes:
        experiment: the declaration.
        fingerprint: SHA-256 (hex) of `canonical`.
        canonical: the canonical declaration, with the dataset's fingerprint.
        n_train, n_test: numbers of training and test examples.
        trials_per_shard: number of trials in a shard.
        owner: who or which team owns the experiment, if the submission says so.
        later: keys of `execution`, and of its `workers`, that only a later version knows; kept when the record is written again.
    """

    experiment: Experiment
    fingerprint: str
    canonical: dict[str, Any]
    n_train: int
    n_test: int
    trials_per_shard: int
    owner: str | None = None
    later: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The record as JSON."""
        declared = self.experiment.model_dump(mode="json")
        workers = (declared["execution"].get("workers") or {}) | self.later.get("workers", {})
        declared["execution"] |= self.later | ({"workers": workers} if workers else {})
        if declared["record"].get("scores") is False:
            del declared["record"]["scores"]  # as records of 0.1.0, which reads them
        return json.dumps(
            {
                "schema": SCHEMA,
                "experiment": declared,
                "fingerprint": self.fingerprint,
                "canonical": self.canonical,
                "n_train": self.n_train,
                "n_test": self.n_test,
                "trials_per_shard": self.trials_per_shard,
                **({"owner": self.owner} if self.owner else {}),
            },
            indent=1,
        ).encode()

    def decided(self, held: "Record | None" = None) -> "Record":
        """Return the record with `record.scores: auto` decided.

        It is false for code of the user's own. The built-in trainer records scores up to a size with which an aggregator of 4 GiB publishes
        4,000 trials. An experiment that is registered goes on as it began, since scores are published only if all its trials have them.

        Args:
            held: the record in the store, if the experiment is registered.
        """
        recorded = self.experiment.record
        if recorded.scores != "auto":
            return self
        of_trial = (2 * self.n_train + self.n_test) / 8 + self.n_test  # bits, and scores of test examples
        by_default = held.experiment.record.scores if held else of_trial <= SCORED_BYTES
        scores = isinstance(self.experiment.trainer, ImagesTrainer) and by_default
        recorded = recorded.model_copy(update={"scores": scores})
        return replace(self, experiment=self.experiment.model_copy(update={"record": recorded}))

    def check_trainable(self) -> None:
        """Check that this version of memtail trains what the record declares.

        Raises:
            UnsupportedError: the recipe is another one, or the declaration means something else to this version.
        """
        recipe = self.canonical.get("recipe_version")
        if recipe != RECIPE_VERSION:
            raise UnsupportedError(f"it has recipe {recipe}, and memtail {version('memtail')} trains recipe {RECIPE_VERSION}")
        masks, model = self.canonical["subsets"].get("masks"), self.canonical.get("model")
        weights = model.get("weights") if isinstance(model, dict) else None
        read = self.experiment.canonical(self.canonical["dataset"]["fingerprint"], masks, self.trainer_code, weights)
        if changes := differences(self.canonical, read):
            raise UnsupportedError(f"memtail {version('memtail')} reads another declaration than was registered ({', '.join(changes)})")

    @property
    def trainer_code(self) -> str | None:
        """Digest of the code of the experiment's trainer; None if it is the built-in one."""
        trainer = self.canonical.get("trainer")
        return str(trainer["code"]) if isinstance(trainer, dict) and "code" in trainer else None

    @property
    def shards(self) -> int:
        """Number of shards of all trials."""
        return -(-self.experiment.subsets.trials // self.trials_per_shard)

    @property
    def most_trials(self) -> int:
        """Number of trials to which the experiment may be extended."""
        limits = Limits()
        return min(limits.trials, limits.shards * self.trials_per_shard, LAST_TRIAL + 1)

    def check_limits(self) -> None:
        """Check that the experiment is not too large. Raises: UnsupportedError."""
        limits, subsets, name = Limits(), self.experiment.subsets, self.experiment.name
        trials, fewer = "trials", "fewer trials"
        if subsets.until is not None and subsets.trials == subsets.until.first_round(subsets.fraction):
            trials, fewer = "trials in its first round", "larger bounds in subsets.until"
        for count, unit, most, variable, remedy in (
            (subsets.trials, trials, min(limits.trials, LAST_TRIAL + 1), "MEMTAIL_MAX_TRIALS", fewer),
            (self.shards, "shards", limits.shards, "MEMTAIL_MAX_SHARDS", f"more trials per shard, or {fewer}"),
        ):
            if count > most:
                raise UnsupportedError(
                    f"experiment '{name}' has {count} {unit}, and at most {most} are allowed: declare {remedy}, or raise {variable} "
                    f"for all services and clients"
                )

    def has(self, shard: Shard) -> bool:
        """Whether a shard can belong to this experiment: not empty, not larger than its shards, no trial beyond the last."""
        return 0 < len(shard.trials) <= self.trials_per_shard and shard.last < self.experiment.subsets.trials

    def with_trials(self, trials: int) -> "Record":
        """Return the record with another number of trials."""
        subsets = self.experiment.subsets.model_copy(update={"trials": trials})
        return replace(self, experiment=self.experiment.model_copy(update={"subsets": subsets}))

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> "Record":
        """Read a record. Unknown keys of `execution`, on which no trial depends, are kept but have no effect.

        Raises:
            UnsupportedError: a newer memtail wrote it, or the experiment is too large.
            StoreError: it is corrupt.
        """
        try:
            content = json.loads(data)
            if (schema := content.pop("schema")) != SCHEMA:
                raise UnsupportedError(f"{source}: has schema {schema}, this memtail reads {SCHEMA}: use the memtail that wrote it")
            declared = content.pop("experiment")
            declared["record"] = {"scores": False, **declared["record"]}  # left out by those without scores
            declared["execution"], later = _split(declared["execution"], ExecutionSpec)
            if declared["execution"].get("workers"):
                declared["execution"]["workers"], later_workers = _split(declared["execution"]["workers"], WorkersSpec)
                later |= {"workers": later_workers} if later_workers else {}
                for toleration in declared["execution"]["workers"].get("tolerations", ()):
                    if toleration.get("value"):  # 0.1.0 allowed it with Exists, as no API server does
                        toleration["operator"] = "Equal"
            known = _Content.model_validate(content)
            record = cls(experiment=Experiment.parse(declared, source=source), later=later, **dict(known))
        except ValidationError as error:
            faults = "; ".join(describe(error, _Content))
            raise StoreError(f"{source}: is corrupt ({faults}): restore it, or remove the experiment") from None
        except SpecError as error:
            raise UnsupportedError(
                f"{error}: memtail {version('memtail')} cannot read this experiment: use the version that registered it, or a later one"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{source}: is corrupt ({error}): restore it, or remove the experiment") from None
        record.check_limits()
        return record


def _split(values: dict[str, Any], part: type[Part]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keys into those that this version knows and the others."""
    known = {key: value for key, value in values.items() if key in part.model_fields}
    return known, {key: value for key, value in values.items() if key not in known}
