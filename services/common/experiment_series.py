"""How long the series of an experiment are there: until some time after it has ended, so that the last scrapes see how."""

import time
from collections.abc import Collection, Iterable

from prometheus_client.metrics import MetricWrapperBase


class ExperimentSeries:
    """The series of experiments in some metrics.

    Args:
        metrics: which have a label `experiment`.
        linger: seconds for which the series of an experiment that has ended stay.

    Attributes:
        shown: the experiments that have series.
    """

    def __init__(self, metrics: Iterable[MetricWrapperBase], linger: float) -> None:
        self._metrics, self._linger = tuple(metrics), linger
        self._ended: dict[str, float] = {}  # when it was found of each
        self.shown: set[str] = set()

    def note(self, experiment: str, ended: bool = False) -> None:
        """An experiment goes on, or has ended."""
        if not ended:
            self._ended.pop(experiment, None)
        elif experiment in self._ended:
            return
        else:
            self._ended[experiment] = time.monotonic()
        self.shown.add(experiment)

    def expire(self) -> None:
        """Remove the series of experiments that ended long enough ago."""
        now = time.monotonic()
        self._remove({name for name in self.shown if now - self._ended.get(name, now) >= self._linger})

    def keep_only(self, experiments: Collection[str]) -> None:
        """Remove those of all other experiments, and forget that there were any."""
        self._remove(self.shown.difference(experiments))
        self._ended = {name: when for name, when in self._ended.items() if name in experiments}

    def _remove(self, experiments: set[str]) -> None:
        for name in experiments:
            for metric in self._metrics:
                metric.remove_by_labels({"experiment": name})
        self.shown -= experiments
