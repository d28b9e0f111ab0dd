"""Names of the published files; those of the pairs by the paper's thresholds carry them. Names of what is estimated."""

from dataclasses import dataclass

MEMORIZATION = "memorization.parquet"
MEMORIZATION_CSV = "memorization.csv"
INFLUENCE_MATRIX = "infl_matrix.npz"
PAIRS = "high_infl_pairs_infl0.15_mem0.25.npz"
SNAPSHOTS = "snapshots.parquet"
SELECTED_PAIRS = "pairs.parquet"
PAIRS_TABLE = "high_infl_pairs_infl0.15_mem0.25.parquet"
STATISTICS = "statistics.npz"
INDEX = "index.npz"
SUMMARY = "summary.json"
LATEST = "latest.json"


@dataclass(frozen=True)
class OutcomeNames:
    """Names of the columns of estimates, and words for them, by the outcome that they are of.

    Attributes:
        mem, mem_se, p_in, p_out: columns of the table of memorization: the estimate, its standard error, and its two terms.
        infl, infl_se: columns of influence and its standard error.
        mean: the mean outcome of models, in words.
        memorization: in words.
    """

    mem: str
    mem_se: str
    p_in: str
    p_out: str
    infl: str
    infl_se: str
    mean: str
    memorization: str


#: By the outcome that a summary names: correctness, or the score where only scores are recorded.
OUTCOMES = {
    "correct": OutcomeNames("mem", "mem_se", "p_in", "p_out", "infl", "infl_se", "accuracy", "memorization"),
    "score": OutcomeNames("mem_p", "mem_p_se", "score_in", "score_out", "infl_p", "infl_p_se", "score", "memorization of scores"),
}
