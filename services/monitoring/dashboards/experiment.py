"""Dashboard of one experiment: progress, estimated completion, precision of the scores."""

from grafana_foundation_sdk.builders import dashboard

from memtail.scores.summary import FEW_TRIALS, FEW_TRIALS_WIDTH
from services.monitoring.dashboards.layout import build_dashboard
from services.monitoring.dashboards.panels import (
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    RED,
    Rows,
    bar_chart_panel,
    gauge_panel,
    heatmap_panel,
    stat_panel,
    text_panel,
    time_series_panel,
)

_OUTSTANDING = 'sum(memtail_trials{EXPERIMENT, state=~"waiting|queued|training"})'
_TRAINING = 'sum(memtail_trials{EXPERIMENT, state="training"})'
_DEAD = 'sum(memtail_trials{EXPERIMENT, state="dead"})'
_RESULTS = f"""\
`memtail scores ${{experiment}} --fetch DIR` downloads the score files, `memtail top ${{experiment}}` lists the most memorized examples. \
Score files in the browser: ${{files}}  Explorer and report: ${{pages}}/experiments/${{experiment}}

Below {FEW_TRIALS} trials in the scores, {FEW_TRIALS_WIDTH}, and some high-influence pairs are chance.
"""


def experiment() -> dashboard.Dashboard:
    """Build the dashboard."""
    rows: Rows = {
        "Status": [
            stat_panel(
                "State",
                "Whether trials are in training, are waiting (for a worker, or because the experiment is paused or cancelled), or have "
                "all ended. `memtail failures` explains why trials were given up.",
                "none",
                (f"({_OUTSTANDING} == bool 0) * (2 + ({_DEAD} > bool 0)) + ({_OUTSTANDING} > bool 0) * ({_TRAINING} > bool 0)", ""),
                mappings={
                    "0": ("waiting", ORANGE),
                    "1": ("training", GREEN),
                    "2": ("all committed", BLUE),
                    "3": ("ended, some given up", RED),
                },
                no_value="unknown",
                instant=True,
            ),
            gauge_panel(
                "Progress",
                "Committed trials as a share of the declared trials.",
                ('sum(memtail_trials{EXPERIMENT, state="committed"}) / sum(memtail_trials{EXPERIMENT})', ""),
                ((None, BLUE), (1, GREEN)),
            ),
            stat_panel(
                "Time left",
                "Estimated time until all trials are committed, from the rate of the last minutes. Unknown while no trials are committed.",
                "s",
                (f"clamp_min(max(memtail_completion_timestamp_seconds{{EXPERIMENT}}) - time(), 0) or {_OUTSTANDING} == 0", ""),
                mappings={"0": ("done", BLUE)},
                no_value="unknown",
                instant=True,
                thresholds=((None, GREEN), (86400, BLUE), (604800, ORANGE)),
            ),
            stat_panel(
                "Estimated completion",
                "Estimated time at which all trials are committed, from the rate of the last minutes.",
                "dateTimeAsLocalNoDateIfToday",
                ("1000 * max(memtail_completion_timestamp_seconds{EXPERIMENT})", ""),
                instant=True,
            ),
            stat_panel(
                "Trials per second",
                "Trials committed by all workers, averaged over five minutes.",
                "count:trials/s",
                ("sum(rate(memtail_trials_trained_total{EXPERIMENT}[5m]))", ""),
            ),
            stat_panel(
                "Given up, diverged, refused",
                "Trials of shards that failed three times; trials with a non-finite loss, which the estimates exclude; trial batches that "
                "were refused.",
                "none",
                (_DEAD, "given up"),
                ("sum(memtail_trials_diverged{EXPERIMENT})", "diverged"),
                ("sum(memtail_batches_refused{EXPERIMENT})", "refused"),
                thresholds=((None, GREEN), (1, RED)),
            ),
        ],
        "Precision": [
            stat_panel(
                "Standard error of memorization",
                "95% quantile over the training examples, and the upper bound of the expected standard error for this number of trials. "
                "Examples count as memorized from 0.25 on: at a standard error of 0.05 that is five standard errors.",
                "none",
                ('max(memtail_memorization_standard_error{EXPERIMENT, quantile="0.95"})', "95% quantile"),
                ("max(memtail_memorization_standard_error_bound{EXPERIMENT})", "bound"),
                thresholds=((None, GREEN), (0.05, ORANGE), (0.1, RED)),
                decimals=3,
            ),
            stat_panel(
                "Trials still needed",
                "Trials until the declared number of trials, and the bounds of `subsets.until`, are reached.",
                "none",
                ("max(memtail_trials_needed{EXPERIMENT})", ""),
                thresholds=((None, GREEN), (1, ORANGE)),
            ),
            stat_panel(
                "Age of stale scores",
                "Age of the published scores while they do not count all accumulated trials; else 0.",
                "s",
                (
                    "(time() - max(memtail_scores_published_timestamp_seconds{EXPERIMENT})) "
                    "* (max(memtail_trials_folded{EXPERIMENT}) > bool max(memtail_scores_published_trials{EXPERIMENT}))",
                    "",
                ),
                thresholds=((None, GREEN), (600, ORANGE), (3600, RED)),
                no_value="none yet",
            ),
            stat_panel(
                "In-subset accuracy",
                "Mean accuracy of the models on their own subsets. Models that do not fit their subsets memorize little.",
                "percentunit",
                ('max(memtail_accuracy_ratio{EXPERIMENT, examples="in_subset"})', ""),
                thresholds=((None, RED), (0.9, ORANGE), (0.98, GREEN)),
                decimals=1,
            ),
            stat_panel(
                "Memorized examples",
                f"Training examples with a memorization of at least 0.25. Below {FEW_TRIALS} trials, {FEW_TRIALS_WIDTH}.",
                "short",
                ('max(memtail_memorized_examples{EXPERIMENT, threshold="0.25"})', ""),
            ),
            stat_panel(
                "Selected pairs",
                "Pairs of a training and a test example of one class in the published scores that adjusted influence selects, at a false "
                "discovery rate of 10%.",
                "short",
                ("max(memtail_selected_pairs{EXPERIMENT})", ""),
            ),
        ],
        "Progress": [
            time_series_panel(
                "Trials by state",
                "All declared trials by state.",
                "short",
                ("max by (state) (memtail_trials{EXPERIMENT})", "{{state}}"),
                stacked=True,
                colors={"committed": GREEN, "training": BLUE, "queued": ORANGE, "waiting": GRAY, "dead": RED},
            ),
            time_series_panel(
                "Trials per second",
                "Trials committed by all workers.",
                "count:trials/s",
                ("sum(rate(memtail_trials_trained_total{EXPERIMENT}[$__rate_interval]))", "trials"),
            ),
            time_series_panel(
                "Seconds per trial",
                "Training time of a shard divided by its number of trials, on one device.",
                "s",
                (
                    "histogram_quantile(0.95, sum by (le) (rate(memtail_trial_seconds_bucket{EXPERIMENT}[$__rate_interval])))",
                    "95% quantile",
                ),
                ("histogram_quantile(0.5, sum by (le) (rate(memtail_trial_seconds_bucket{EXPERIMENT}[$__rate_interval])))", "median"),
            ),
        ],
        "Accuracy and standard error": [
            time_series_panel(
                "Accuracy",
                "Mean accuracy of the models on their own subsets, on the held-out training examples, and on the test set. The difference "
                "between the first two is the mean memorization.",
                "percentunit",
                ("max by (examples) (memtail_accuracy_ratio{EXPERIMENT})", "{{examples}}"),
                minimum=None,
                maximum=1,
            ),
            time_series_panel(
                "Standard error of memorization",
                "Quantiles over the training examples, and the upper bound of the expected standard error. All decrease with the inverse "
                "square root of the number of trials.",
                "none",
                ("max by (quantile) (memtail_memorization_standard_error{EXPERIMENT})", "quantile {{quantile}}"),
                ("max(memtail_memorization_standard_error_bound{EXPERIMENT})", "bound"),
                logarithmic=True,
                limit=0.05,
                dashed="bound",
            ),
            time_series_panel(
                "Trials in the scores",
                "Trials accumulated in the statistics, and trials counted by the published scores.",
                "short",
                ("max(memtail_trials_folded{EXPERIMENT})", "accumulated"),
                ("max(memtail_scores_published_trials{EXPERIMENT})", "published"),
            ),
        ],
        "Memorization and influence": [
            heatmap_panel(
                "Training examples by memorization, over time",
                "Distribution of memorization. With more trials, the modes near 0 and 1 separate.",
                "short",
                ("max by (bin) (memtail_memorization_examples{EXPERIMENT})", "{{bin}}"),
                "memorization",
            ),
            bar_chart_panel(
                "Training examples by memorization, latest",
                "Distribution at the end of the time range, on a logarithmic scale. Each bar is a bin of width 0.05 from its label on.",
                "short",
                ("max by (bin) (memtail_memorization_examples{EXPERIMENT})", "{{bin}}"),
                "bin",
            ),
            time_series_panel(
                "Memorized examples by threshold",
                "Training examples with a memorization of at least the threshold.",
                "short",
                ("max by (threshold) (memtail_memorized_examples{EXPERIMENT})", "at least {{threshold}}"),
                width=12,
            ),
            time_series_panel(
                "Pairs",
                "In the published scores: selected by adjusted influence, and by the paper's thresholds. With few trials many of the "
                "latter are false positives, which disappear as the standard error decreases.",
                "short",
                ("max(memtail_selected_pairs{EXPERIMENT})", "selected"),
                ("max(memtail_high_influence_pairs{EXPERIMENT})", "by the paper's thresholds"),
                width=12,
            ),
        ],
        "Results": [text_panel("Where to find the results", _RESULTS)],
    }
    built = build_dashboard("Experiment", "Progress of one experiment, and precision of its scores.", rows, experiments="one")
    built.with_variable(dashboard.TextBoxVariable("files").label("URL of the score files").default_value("http://localhost:9001"))
    return built.with_variable(dashboard.TextBoxVariable("pages").label("URL of the explorer").default_value("http://localhost:8080"))
