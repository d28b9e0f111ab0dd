"""The metrics of the aggregator. Those of an experiment go away some time after it has ended."""

from prometheus_client import Counter, Gauge, Histogram

from services.common.metrics import LONG_BUCKETS

FOLDED = Gauge("memtail_trials_folded", "Trials folded into the statistics, diverged ones included", ["experiment"])
DIVERGED = Gauge("memtail_trials_diverged", "Of those, trials that diverged and are left out of the estimates", ["experiment"])
NEEDED = Gauge("memtail_trials_needed", "Trials still needed: of those asked for, or for the standard error asked for", ["experiment"])
ACCURACY = Gauge(
    "memtail_accuracy_ratio", "Mean accuracy of the trials, 0 to 1: in_subset, held_out, or on the test set", ["experiment", "examples"]
)
STANDARD_ERROR = Gauge(
    "memtail_memorization_standard_error", "A quantile of the memorization scores' standard errors", ["experiment", "quantile"]
)
EXPECTED_ERROR = Gauge(
    "memtail_memorization_standard_error_bound", "The largest standard error that so many trials lead one to expect", ["experiment"]
)
MEMORIZED = Gauge(
    "memtail_memorized_examples", "Training examples whose memorization is at least the threshold", ["experiment", "threshold"]
)
HISTOGRAM = Gauge("memtail_memorization_examples", "Training examples by memorization, from `bin` on, 0.05 wide", ["experiment", "bin"])
PAIRS = Gauge("memtail_high_influence_pairs", "High-influence pairs in the published scores", ["experiment"])
PUBLISHED = Gauge("memtail_scores_published_timestamp_seconds", "When scores were published last; a Unix time", ["experiment"])
PUBLISHED_TRIALS = Gauge(
    "memtail_scores_published_trials", "Trials that the published scores are of, diverged ones included", ["experiment"]
)
REFUSED = Gauge("memtail_batches_refused", "Trial batches that cannot be counted", ["experiment"])
FOLD_SECONDS = Histogram("memtail_fold_seconds", "Seconds to read a trial batch and fold it", buckets=LONG_BUCKETS)
PUBLISH_SECONDS = Histogram("memtail_publish_seconds", "Seconds to write and publish a version of the scores", buckets=LONG_BUCKETS)
REPORT_SECONDS = Histogram("memtail_report_seconds", "Seconds to draw and publish a report", buckets=LONG_BUCKETS)
REPORT_FAILURES = Counter("memtail_report_failures_total", "Reports that could not be drawn or published")
EXPLORER_RESTARTS = Counter("memtail_explorer_restarts_total", "Times that the explorer's process ended and was started again")
