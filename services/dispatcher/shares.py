"""Shares of experiments in the fleet. Pure functions, no I/O."""

from collections.abc import Iterable

from services.dispatcher.worker_jobs import Demand


def target_workers(demands: Iterable[Demand], running: dict[str, int], max_workers: int, per_worker: dict[str, int]) -> dict[str, int]:
    """Divide the fleet among experiments: each gets min(its maximum, its outstanding shards) workers while the fleet's maximum lasts.

    Experiments with a higher priority are served first, and those of equal priority get equal numbers. None takes running workers from
    another.

    Args:
        demands: demands of all experiments.
        running: running workers, by experiment.
        max_workers: maximum of all experiments together.
        per_worker: shards that a worker trains at a time, by experiment.
    """
    left = max_workers - sum(running.values())
    targets, most = {}, {}
    by_priority: dict[int, list[str]] = {}
    for demand in sorted(demands, key=lambda demand: (-demand.priority, demand.experiment)):
        name = demand.experiment
        usable = -(-demand.outstanding // per_worker.get(name, 1)) if demand.state == "running" else 0
        most[name] = min((demand.workers and demand.workers.max) or max_workers, usable)
        targets[name] = min(most[name], running.get(name, 0))
        by_priority.setdefault(demand.priority, []).append(name)
    for names in by_priority.values():
        while left > 0 and (growing := [name for name in names if targets[name] < most[name]]):
            targets[min(growing, key=targets.__getitem__)] += 1
            left -= 1
    return targets
