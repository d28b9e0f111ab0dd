"""Shares of experiments in the fleet. Pure functions, no I/O."""

from collections.abc import Collection, Iterable

from services.dispatcher.worker_jobs import Demand


def target_workers(demands: Iterable[Demand], running: dict[str, int], max_workers: int, per_worker: dict[str, int]) -> dict[str, int]:
    """Divide the fleet among experiments: each gets min(its maximum, its outstanding shards) workers while the fleet's maximum lasts.

    Experiments with a higher priority are served first, and those of equal priority get equal numbers. None takes running workers from
    another; `surplus_workers` says how many end by themselves.

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


def surplus_workers(
    demands: Collection[Demand], running: dict[str, int], max_workers: int, per_worker: dict[str, int], stuck: Collection[str]
) -> dict[str, int]:
    """Count the workers beyond the share of their experiment that are to end, so that others get theirs; largest excess first.

    Args:
        demands: demands of all experiments.
        running: running workers, by experiment.
        max_workers: maximum of all experiments together.
        per_worker: shards that a worker trains at a time, by experiment.
        stuck: experiments whose workers cannot start; others give up nothing for them.
    """
    shares = target_workers(demands, {}, max_workers, per_worker)
    lacking = {name: share - running.get(name, 0) for name, share in shares.items() if name not in stuck}
    # a single worker is not worth an exchange, but for an experiment that has none
    needed = sum(lack for name, lack in lacking.items() if lack > (name in running and running[name] > 0))
    needed -= max_workers - sum(running.values())
    excess = {name: running.get(name, 0) - share for name, share in shares.items()}
    surplus: dict[str, int] = {}
    while needed > 0 and (largest := max(excess, key=excess.__getitem__, default="")) and excess[largest] > 0:
        excess[largest] -= 1
        needed -= 1
        surplus[largest] = surplus.get(largest, 0) + 1
    return surplus
