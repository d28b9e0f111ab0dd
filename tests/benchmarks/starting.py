"""Start-up times of the command line, as whole processes."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import memtail
from tests.benchmarks.bench import Row

REPETITIONS = 9


def start() -> list[Row]:
    """Measure `memtail --help`, and `memtail top` on the scores of a small run."""
    with tempfile.TemporaryDirectory() as folder:
        experiment = memtail.Experiment.parse(
            {"name": "start", "dataset": {"name": "digits"}, "training": {"epochs": 1}, "subsets": {"trials": 40}}
        )
        memtail.run(experiment, folder)
        command = [str(Path(sys.executable).with_name("memtail"))]
        return [
            Row("start-help", "start", "0.3 s", _times([*command, "--help"]), note="memtail --help"),
            Row("start-top", "start", "0.5 s", _times([*command, "top", "start", "--store", folder]), note="memtail top"),
        ]


def _times(command: list[str]) -> list[float]:
    times = []
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return times


ROWS: dict[str, Callable[[], list[Row]]] = {"start": start}
