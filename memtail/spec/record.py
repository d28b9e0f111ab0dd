"""Outcomes that an experiment records in each trial, beside correctness or in its place."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from memtail.spec.base import Part

#: Most epochs after which outcomes are recorded.
MOST_SNAPSHOTS = 32


def _ascending(epochs: list[int]) -> list[int]:
    if sorted(set(epochs)) != epochs:
        raise ValueError(f"are different epochs in ascending order, not {epochs}")
    return epochs


def _auto_a_bool_or_only(value: Any) -> Any:
    if value in ("auto", "only"):
        return value
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        raise ValueError("is auto, false, true or only") from None


def _all_or_a_number(value: Any) -> Any:
    if value != "all" and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ValueError("is a number of trials, 0 or more, or all")
    return value


class RecordedOutcomes(Part):
    """Additional outcomes recorded in each trial.

    Attributes:
        margins: record the logit margin of every example.
        scores: record a score in [0, 1] of every example, of which memorization and influence are estimated too: of the built-in trainer,
            the probability of the label; of training code of your own, what it returns. Each takes a byte. `auto` has the built-in trainer
            record them of datasets up to about the size of ImageNet, and is false for training code of your own. `only` is for code of your
            own that does not know what is correct: it returns scores alone, and memorization and influence are those of scores.
        snapshots: record after these epochs, too, which training examples are classified correctly; of the built-in trainer.
        models: keep the weights of the models of this many first trials, or of `all` (see `memtail.load_model`); of the built-in trainer.
    """

    margins: bool = False
    # where a record lacks the key, its trials have no scores (see `Record`)
    scores: Annotated[bool | Literal["auto", "only"], BeforeValidator(_auto_a_bool_or_only)] = "auto"
    snapshots: Annotated[list[Annotated[int, Field(ge=1)]], Field(max_length=MOST_SNAPSHOTS), AfterValidator(_ascending)] = []
    models: Annotated[Literal["all"] | Annotated[int, Field(ge=0)], BeforeValidator(_all_or_a_number)] = 0

    def keeps_model(self, trial: int) -> bool:
        """Return whether the model of a trial is kept."""
        return self.models == "all" or trial < self.models

    @property
    def keeps_scores(self) -> bool:
        """Whether trials have scores, beside correctness or in its place; not while `auto` is undecided (see `Record.decided`)."""
        return self.scores in (True, "only")

    @property
    def scores_only(self) -> bool:
        """Whether trials have scores in place of correctness."""
        return self.scores == "only"
