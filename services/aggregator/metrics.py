"""Metrics of the aggregator. The series of an experiment are removed some time after its end."""

from prometheus_client import Counter, Gauge, Histogram

from services.common.metrics import LONG_BUCKETS

ACCUMULATED = Gauge("memtail_trials_folded", "Trials accumulated in the statistics, including diverged trials", ["experiment"])
DIVERGED = Gauge("memtail_trials_diverged", "Accumulated trials that diverged, which the estimates exclude", ["experiment"])
NEEDED = Gauge("memtail_trials_needed", "Trials still needed for the declared number of trials, and the bounds of until", ["experiment"])
ACCURACY = Gauge(
    "memtail_accuracy_ratio",
    "Mean accuracy of the trials, 0 to 1: on the subset, on the held-out training examples, or on the test set; mean score, with `_score` "
    "in `examples`, of an experiment of scores only",
    ["experiment", "examples"],
)
STANDARD_ERROR = Gauge(
    "memtail_memorization_standard_error",
    "Quantile of the standard errors of memorization",
    ["experiment", "quantile"],
)
EXPECTED_ERROR = Gauge(
    "memtail_memorization_standard_error_bound", "Upper bound of the expected standard error, by the number of trials", ["experiment"]
)
MEMORIZED = Gauge(
    "memtail_memorized_examples", "Training examples with a memorization of at least the threshold", ["experiment", "threshold"]
)
HISTOGRAM = Gauge(
    "memtail_memorization_examples",
    "Training examples by memorization, in bins of width 0.05 from `bin` on",
    ["experiment", "bin"],
)
SELECTED_PAIRS = Gauge("memtail_selected_pairs", "Pairs in the published scores that adjusted influence selects", ["experiment"])
PAIRS = Gauge("memtail_high_influence_pairs", "High-influence pairs in the published scores, by the paper's thresholds", ["experiment"])
PUBLISHED = Gauge("memtail_scores_published_timestamp_seconds", "Time of the last publication of scores, as Unix time", ["experiment"])
PUBLISHED_TRIALS = Gauge("memtail_scores_published_trials", "Trials in the published scores, including diverged trials", ["experiment"])
REFUSED = Gauge("memtail_batches_refused", "Trial batches that were refused: damaged, or of another experiment", ["experiment"])
PASSED_OVER = Counter(
    "memtail_experiments_passed_over_total",
    "Experiments passed over in a pass because of an error; the log line `experiment passed over` names the experiment and the error",
)
ACCUMULATE_SECONDS = Histogram(
    "memtail_fold_seconds",
    "Duration of reading and accumulating a trial batch, of which several are read at the same time",
    buckets=LONG_BUCKETS,
)
PUBLISH_SECONDS = Histogram("memtail_publish_seconds", "Duration of writing and publishing a version of the scores", buckets=LONG_BUCKETS)
REPORT_SECONDS = Histogram("memtail_report_seconds", "Duration of rendering and publishing a report", buckets=LONG_BUCKETS)
REPORT_FAILURES = Counter("memtail_report_failures_total", "Reports that failed to render or publish")
