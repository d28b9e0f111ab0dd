"""Row about the services: equal trials by a dispatcher, a worker and an aggregator on real servers, and by `memtail run`."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import memtail
from memtail import datasets
from memtail.execution.run_state import RunState
from memtail.processes import cores
from memtail.spec import Experiment
from tests.benchmarks.bench import Row
from tests.support.cluster import QUICK, Cluster
from tests.support.servers import MinioServer

# Enough trials that the time of a pass before the first shard and after the last one, two seconds in total, is small.
REPETITIONS, TRIALS, PER_SHARD = 2, 10_000, 50
_POLL_SECONDS = 0.5  # requests for the pointer to the scores take time from training


def service() -> list[Row]:
    """Measure the time per trial; on both sides one process per core trains.

    Ours is the time from submission to the published scores of all trials. The start of processes counts on neither side.
    """
    model, dataset = {"name": "mlp", "hidden": [256]}, {"name": "digits"}
    execution = {"device": "cpu", "trials_per_shard": PER_SHARD}
    spec = {"dataset": dataset, "model": model, "training": {"epochs": 30}, "execution": execution}
    ours, embedded = [], []
    settings = dict.fromkeys(QUICK, "") | {"MEMTAIL_DEVICES": ",".join(["cpu"] * cores())}  # the defaults, as in real use
    with (
        tempfile.TemporaryDirectory() as folder,
        MinioServer(Path(folder)) as minio,
        Cluster(Path(folder), minio, **settings) as cluster,
    ):
        for name in ("dispatcher", "worker", "aggregator"):
            cluster.start(name)
        for repetition in range(REPETITIONS + 1):
            trials = TRIALS if repetition else 2 * PER_SHARD  # the first repetition warms up
            experiment = Experiment.parse({"name": f"run-{repetition}", "subsets": {"trials": trials, "seed": repetition}, **spec})
            began = time.perf_counter()
            experiment_store = cluster.submit(experiment, datasets.prepare(experiment.dataset))
            cluster.until_published(experiment_store, trials, 600, _POLL_SECONDS)
            ours.append((time.perf_counter() - began) / trials)
            embedded.append(_embedded(experiment, Path(folder, "embedded")) / trials)
    note = f"digits, MLP 256, {TRIALS} trials in shards of {PER_SHARD} from submission to scores; baseline: memtail run"
    return [Row("service", "trial", "0.95x", ours[1:], embedded[1:], "memtail run", note=note)]


def _embedded(experiment: Experiment, store: Path) -> float:
    """Return the seconds of `memtail run` from the start of training to the scores."""
    training: list[float] = []

    def watch(state: RunState) -> None:
        if not training and state.progress:
            training.append(time.perf_counter())

    memtail.run(experiment, store, on_progress=watch)
    return time.perf_counter() - training[0]


ROWS: dict[str, Callable[[], list[Row]]] = {"service": service}
