"""Lifetime of the metric series of experiments: until some time after their end, so that Prometheus scrapes the final values."""

import time
from collections.abc import Collection, Iterable

from prometheus_client.metrics import MetricWrapperBase


class ExperimentSeries:
    """Removes the series of ended and deleted experiments from metrics.

    Args:
        metrics: metrics with a label `experiment`.
        linger: seconds after the end of an experiment until its series are removed.

    Attributes:
        shown: names of the experiments that have series.
    """

    def __init__(self, metrics: Iterable[MetricWrapperBase], linger: float) -> None:
        self._metrics, self._linger = tuple(metrics), linger
        self._ended: dict[str, float] = {}  # when the end was first noticed, by experiment
        self.shown: set[str] = set()

    def update(self, experiment: str, ended: bool = False) -> None:
        """Register an experiment, or its end."""
        if not ended:
            self._ended.pop(experiment, None)
        elif experiment in self._ended:
            return
        else:
            self._ended[experiment] = time.monotonic()
        self.shown.add(experiment)

    def expire(self) -> None:
        """Remove the series of experiments that ended more than `linger` seconds ago."""
        now = time.monotonic()
        self._remove({name for name in self.shown if now - self._ended.get(name, now) >= self._linger})

    def keep_only(self, experiments: Collection[str]) -> None:
        """Remove the series of all other experiments."""
        self._remove(self.shown.difference(experiments))
        self._ended = {name: when for name, when in self._ended.items() if name in experiments}

    def _remove(self, experiments: set[str]) -> None:
        for name in experiments:
            for metric in self._metrics:
                metric.remove_by_labels({"experiment": name})
        self.shown -= experiments
