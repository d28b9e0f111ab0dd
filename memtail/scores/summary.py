"""The summary of one version of the scores, `summary.json`: numbers of trials, accuracies, shares of memorized examples, pairs.

Needs only the standard library, because `memtail status` and the services read nothing but summaries.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from memtail.scores.names import OUTCOMES, OutcomeNames

#: 1: standard errors from the observed rates. 2: by Agresti and Caffo, with `mem_lo` and `mem_hi` in the tables of memorization.
SCHEMA = 2
#: Thresholds of memorization, and quantiles of its standard errors, in a summary.
MEM_STEPS = (0.1, 0.25, 0.5, 0.75, 0.9)
SE_QUANTILES = (0.5, 0.95, 1.0)
#: Fewer trials than these are few: with subsets of 0.7 of the examples, the 95% interval of a score near one half is +-0.1 or wider.
FEW_TRIALS = 500
#: So wide are the intervals of fewer.
FEW_TRIALS_WIDTH = "the 95% interval of a score near one half is ±0.1 or wider"
#: The accuracies of a trial's `TrialMetrics`.
ACCURACIES = ("in_subset_accuracy", "held_out_accuracy", "test_accuracy")


@dataclass(frozen=True)
class PairSummary:
    """The pairs by the paper's thresholds: the thresholds, the number of pairs, and of distinct examples in them."""

    mem_threshold: float
    infl_threshold: float
    count: int
    train_examples: int
    test_examples: int


@dataclass(frozen=True)
class SelectionSummary:
    """The pairs that adjusted influence selects: the conditions, and the numbers of pairs, confirmed ones, and distinct examples in them.

    Attributes:
        mem_threshold: of memorization.
        infl_threshold: of adjusted influence.
        false_discovery_rate: the largest one of a pair.
        count: pairs.
        confirmed: pairs whose influence, too, is above 0 by a test.
        train_examples, test_examples: distinct examples in the pairs.
    """

    mem_threshold: float
    infl_threshold: float
    false_discovery_rate: float
    count: int
    confirmed: int
    train_examples: int
    test_examples: int


@dataclass(frozen=True)
class ScoreSummary(Mapping[str, Any]):
    """The content of `summary.json`; also a mapping of the file's keys to its values: `summary["trials"]`, `summary["pairs"]["count"]`.

    Attributes:
        schema: of the file.
        experiment, fingerprint: the experiment's name and fingerprint.
        trials: trials that count.
        diverged: trials that diverged, which do not count.
        n_train, n_test: sizes of the dataset.
        without_estimate: training examples in every subset or in none.
        in_subset_accuracy, held_out_accuracy, test_accuracy: means over the trials that count; None if no trial has one.
        accuracy_se: standard errors of these means, by name; None for fewer than two trials.
        mem_mean: mean memorization of the examples with an estimate; None if there is none, as in the next two.
        mem_share_at_least: share of these examples with mem_i at or above each of `MEM_STEPS`; the keys are numbers as text.
        mem_se_quantiles: quantiles of the standard errors of mem_i, for each of `SE_QUANTILES`; the keys are numbers as text.
        pairs: the pairs by the paper's thresholds.
        conditions: numbers of trials, diverged ones included, by "device", "torch" and "memtail"; empty if unknown.
        outcome: "correct"; or "score" where only scores are recorded. Accuracies are then mean scores, memorization and influence are
            mem_p and infl_p.
        selected_pairs: the pairs that adjusted influence selects; None in scores of a memtail that did not select them.
        extendable: whether the experiment takes more trials; one of imported trials does not.
    """

    schema: int
    experiment: str
    fingerprint: str
    trials: int
    diverged: int
    n_train: int
    n_test: int
    without_estimate: int
    in_subset_accuracy: float | None
    held_out_accuracy: float | None
    test_accuracy: float | None
    accuracy_se: dict[str, float | None]
    mem_mean: float | None
    mem_share_at_least: dict[str, float | None]
    mem_se_quantiles: dict[str, float | None]
    pairs: PairSummary
    conditions: dict[str, dict[str, int]] = field(default_factory=dict)
    outcome: str = "correct"
    selected_pairs: SelectionSummary | None = None
    extendable: bool = True

    @property
    def names(self) -> OutcomeNames:
        """Names of what is estimated."""
        return OUTCOMES[self.outcome]

    @property
    def accumulated_trials(self) -> int:
        """Trials in the statistics, diverged ones included."""
        return self.trials + self.diverged

    @property
    def shown_pairs(self) -> PairSummary | SelectionSummary:
        """The selected pairs, or else those by the paper's thresholds."""
        return self.selected_pairs or self.pairs

    def mem_share(self, threshold: float) -> float | None:
        """Share of the examples with mem_i at or above one of `MEM_STEPS`."""
        return self.mem_share_at_least[f"{threshold:g}"]

    def mem_se_quantile(self, quantile: float) -> float | None:
        """Standard error of mem_i that this share of the examples, one of `SE_QUANTILES`, does not exceed."""
        return self.mem_se_quantiles[f"{quantile:g}"]

    @property
    def few_trials(self) -> str | None:
        """The warning of few trials, for all who show these scores; None from `FEW_TRIALS` on."""
        if self.trials >= FEW_TRIALS:
            return None
        fix = (
            "raise subsets.trials and run again, which keeps the present trials"
            if self.extendable
            else "train more where these come from, and import all of them under another name"
        )
        if self.outcome == "score":
            return (
                f"These scores rest on only {self.trials} trials: read each with its standard error. Four times as many trials halve the "
                f"standard errors: {fix}."
            )
        pairs = ", and some high-influence pairs are chance" if self.n_test else ""
        return (
            f"These scores rest on only {self.trials} trials: below {FEW_TRIALS} {FEW_TRIALS_WIDTH}{pairs}. Read each score with its "
            f"interval (mem_lo to mem_hi). Four times as many trials halve the intervals: {fix}."
        )

    @property
    def few_trials_mark(self) -> str | None:
        """`few_trials` in two words, for lists and tables; None from `FEW_TRIALS` on."""
        return "few trials" if self.few_trials else None

    @property
    def mixture(self) -> str | None:
        """The devices and versions of torch with their numbers of trials, if there are several, on which bits may differ."""
        mixed = [counts for condition in ("device", "torch") if len(counts := self.conditions.get(condition, {})) > 1]
        return "; ".join(", ".join(f"{count} on {value}" for value, count in counts.items()) for counts in mixed) or None

    def to_dict(self) -> dict[str, Any]:
        """The values in the order of the file, for `json.dumps`; without what is usual, and as 0.1.0 writes them without conditions."""
        content = asdict(self)
        if not self.conditions:
            del content["conditions"]
        if self.outcome == "correct":
            del content["outcome"]
        if self.selected_pairs is None:
            del content["selected_pairs"]
        if self.extendable:
            del content["extendable"]
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Read the file's content; unknown keys are ignored.

        Raises:
            KeyError, TypeError: the content is not a summary.
            ValueError: it is of another outcome.
        """
        # memtail's first versions wrote no standard errors of accuracies
        later: dict[str, Any] = {"conditions": {}, "outcome": "correct", "selected_pairs": None, "extendable": True}
        content = {"accuracy_se": dict.fromkeys(ACCURACIES), **later, **content}
        if content["outcome"] not in OUTCOMES:
            raise ValueError(f"outcome {content['outcome']!r} is none of {', '.join(OUTCOMES)}")
        pairs, selected = content["pairs"], content["selected_pairs"]
        return cls(
            **{
                **_known(cls, content),
                "pairs": PairSummary(**_known(PairSummary, pairs)),
                "selected_pairs": None if selected is None else SelectionSummary(**_known(SelectionSummary, selected)),
            }
        )

    def __getitem__(self, key: str) -> Any:
        return self.to_dict()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __len__(self) -> int:
        return len(self.to_dict())


def _known(kind: type[Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a dataclass's fields."""
    return {field.name: content[field.name] for field in fields(kind)}
