"""The dashboard of one experiment: is it going, when is it done, can it be trusted yet?"""

from grafana_foundation_sdk.builders import dashboard

from services.monitoring.dashboards.parts import BLUE, GRAY, GREEN, ORANGE, RED, Rows, bars, course, density, number, page, share, words

_OUTSTANDING = 'sum(memtail_trials{EXPERIMENT, state=~"waiting|queued|training"})'
_TRAINING = 'sum(memtail_trials{EXPERIMENT, state="training"})'
_DEAD = 'sum(memtail_trials{EXPERIMENT, state="dead"})'
_RESULTS = """\
`memtail scores ${experiment} --fetch DIR` copies the score files, `memtail top ${experiment}` shows the most memorized examples. \
Score files in a browser: ${files}  Explorer and report: ${pages}/experiments/${experiment}
"""


def experiment() -> dashboard.Dashboard:
    """Builds it."""
    rows: Rows = {
        "Is it going, and when is it done?": [
            number(
                "State",
                "Whether trials are being trained, wait for a worker (or the experiment is paused or cancelled), or are all done. Why "
                "some are given up says `memtail failures`.",
                "none",
                (f"({_OUTSTANDING} == bool 0) * (2 + ({_DEAD} > bool 0)) + ({_OUTSTANDING} > bool 0) * ({_TRAINING} > bool 0)", ""),
                names={
                    "0": ("waiting", ORANGE),
                    "1": ("training", GREEN),
                    "2": ("all trained", BLUE),
                    "3": ("ended, some given up", RED),
                },
                none="not known",
                now=True,
            ),
            share(
                "Progress",
                "Trials that are committed, of all that are asked for.",
                ('sum(memtail_trials{EXPERIMENT, state="committed"}) / sum(memtail_trials{EXPERIMENT})', ""),
                ((None, BLUE), (1, GREEN)),
            ),
            number(
                "Time left",
                "Until all trials are committed, as the last minutes went. Not known while none were committed lately.",
                "s",
                (f"clamp_min(max(memtail_completion_timestamp_seconds{{EXPERIMENT}}) - time(), 0) or {_OUTSTANDING} == 0", ""),
                names={"0": ("done", BLUE)},
                none="not known",
                now=True,
                thresholds=((None, GREEN), (86400, BLUE), (604800, ORANGE)),
            ),
            number(
                "Done at",
                "When all trials will be committed, as the last minutes went.",
                "dateTimeAsLocalNoDateIfToday",
                ("1000 * max(memtail_completion_timestamp_seconds{EXPERIMENT})", ""),
                now=True,
            ),
            number(
                "Trials per second",
                "Trials committed by all workers, over the last five minutes.",
                "count:trials/s",
                ("sum(rate(memtail_trials_trained_total{EXPERIMENT}[5m]))", ""),
            ),
            number(
                "Given up, diverged, refused",
                "Trials whose shard failed too often; trials whose loss was not a number, which are left out of the estimates; batches "
                "that could not be counted.",
                "none",
                (_DEAD, "given up"),
                ("sum(memtail_trials_diverged{EXPERIMENT})", "diverged"),
                ("sum(memtail_batches_refused{EXPERIMENT})", "refused"),
                thresholds=((None, GREEN), (1, RED)),
            ),
        ],
        "Can it be trusted yet?": [
            number(
                "Standard error of memorization",
                "95% of the training examples have a memorization with at most this standard error; beside it the largest that so many "
                "trials lead one to expect. Memorization counts from 0.25 on: at 0.05 that is five standard errors from 0.",
                "none",
                ('max(memtail_memorization_standard_error{EXPERIMENT, quantile="0.95"})', "95% at most"),
                ("max(memtail_memorization_standard_error_bound{EXPERIMENT})", "bound"),
                thresholds=((None, GREEN), (0.05, ORANGE), (0.1, RED)),
                decimals=3,
            ),
            number(
                "Trials still needed",
                "For the number of trials, or the standard error, that the experiment asks for.",
                "none",
                ("max(memtail_trials_needed{EXPERIMENT})", ""),
                thresholds=((None, GREEN), (1, ORANGE)),
            ),
            number(
                "Scores behind",
                "Age of the published scores while there are trials that they do not count; 0 when they count all.",
                "s",
                (
                    "(time() - max(memtail_scores_published_timestamp_seconds{EXPERIMENT})) "
                    "* (max(memtail_trials_folded{EXPERIMENT}) > bool max(memtail_scores_published_trials{EXPERIMENT}))",
                    "",
                ),
                thresholds=((None, GREEN), (600, ORANGE), (3600, RED)),
                none="none yet",
            ),
            number(
                "In-subset accuracy",
                "Mean accuracy of models on the examples that they were trained on. Memorization is measured on models that fit.",
                "percentunit",
                ('max(memtail_accuracy_ratio{EXPERIMENT, examples="in_subset"})', ""),
                thresholds=((None, RED), (0.9, ORANGE), (0.98, GREEN)),
                decimals=1,
            ),
            number(
                "Memorized examples",
                "Training examples with a memorization of at least 0.25.",
                "short",
                ('max(memtail_memorized_examples{EXPERIMENT, threshold="0.25"})', ""),
            ),
            number(
                "High-influence pairs",
                "Pairs of a training and a test example of one class in the published scores, with memorization and influence that count.",
                "short",
                ("max(memtail_high_influence_pairs{EXPERIMENT})", ""),
            ),
        ],
        "Progress": [
            course(
                "Trials by state",
                "Where all trials that are asked for stand; it is done when all are committed.",
                "short",
                ("max by (state) (memtail_trials{EXPERIMENT})", "{{state}}"),
                stacked=True,
                colors={"committed": GREEN, "training": BLUE, "queued": ORANGE, "waiting": GRAY, "dead": RED},
            ),
            course(
                "Trials per second",
                "Trials committed by all workers.",
                "count:trials/s",
                ("sum(rate(memtail_trials_trained_total{EXPERIMENT}[$__rate_interval]))", "trials"),
            ),
            course(
                "Seconds per trial",
                "Seconds of a shard's training for each of its trials, on one device.",
                "s",
                ("histogram_quantile(0.95, sum by (le) (rate(memtail_trial_seconds_bucket{EXPERIMENT}[$__rate_interval])))", "95% at most"),
                ("histogram_quantile(0.5, sum by (le) (rate(memtail_trial_seconds_bucket{EXPERIMENT}[$__rate_interval])))", "median"),
            ),
        ],
        "Accuracy and error": [
            course(
                "Accuracy",
                "Mean accuracy of the models: on what they were trained on, on what they were not, and on the test set. What separates the "
                "first two is memorization.",
                "percentunit",
                ("max by (examples) (memtail_accuracy_ratio{EXPERIMENT})", "{{examples}}"),
                least=None,
                most=1,
            ),
            course(
                "Standard error of memorization",
                "Quantiles over the training examples. All fall as one over the root of the number of trials; the bound is the largest "
                "that so many trials lead one to expect.",
                "none",
                ("max by (quantile) (memtail_memorization_standard_error{EXPERIMENT})", "quantile {{quantile}}"),
                ("max(memtail_memorization_standard_error_bound{EXPERIMENT})", "bound"),
                logarithmic=True,
                limit=0.05,
                dashed="bound",
            ),
            course(
                "Trials in the scores",
                "Trials that the statistics hold, and those that the published scores count.",
                "short",
                ("max(memtail_trials_folded{EXPERIMENT})", "folded"),
                ("max(memtail_scores_published_trials{EXPERIMENT})", "published"),
            ),
        ],
        "Memorization and influence": [
            density(
                "Training examples by memorization, over time",
                "How the distribution grows sharp as trials arrive: the many at 0 and the few at 1 move apart.",
                "short",
                ("max by (bin) (memtail_memorization_examples{EXPERIMENT})", "{{bin}}"),
                "memorization",
            ),
            bars(
                "Training examples by memorization, now",
                "The same at the end of the time shown, on a logarithmic scale; a bar stands for 0.05 from the value below it.",
                "short",
                ("max by (bin) (memtail_memorization_examples{EXPERIMENT})", "{{bin}}"),
                "bin",
            ),
            course(
                "Memorized examples by threshold",
                "Training examples whose memorization is at least so much.",
                "short",
                ("max by (threshold) (memtail_memorized_examples{EXPERIMENT})", "from {{threshold}} on"),
                width=12,
            ),
            course(
                "High-influence pairs",
                "In the published scores. With few trials chance makes many, which go as the standard error falls.",
                "short",
                ("max(memtail_high_influence_pairs{EXPERIMENT})", "pairs"),
                width=12,
            ),
        ],
        "Results": [words("Where the results are", _RESULTS)],
    }
    made = page("Experiment", "How one experiment goes, and how sharp its scores are.", rows, experiments="one")
    made.with_variable(dashboard.TextBoxVariable("files").label("Score files at").default_value("http://localhost:9001"))
    return made.with_variable(dashboard.TextBoxVariable("pages").label("Pages at").default_value("http://localhost:8080"))
