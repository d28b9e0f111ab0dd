"""Experiments that services train in tests, with networks that fail or wait."""

from collections.abc import Callable
from typing import Any

from memtail.spec import Experiment

TRIALS, PER_SHARD = 24, 4
SHARDS = TRIALS // PER_SHARD

Declare = Callable[..., Experiment]


def faulty(declare: Declare, how: str, always: bool = False, **parts: Any) -> Experiment:
    """Declare an experiment in which one shard fails once, or all shards always fail; see `tests.support.faulty_models`."""
    model = {"name": "tests.support.faulty_models:faulty", "options": {"how": how, "always": always}}
    # few shards if all fail, since each is tried three times
    execution = {"trials_per_shard": TRIALS // 2 if always else PER_SHARD, "device": "cpu"}
    return declare(TRIALS, **{"name": f"{how}-always" if always else how, "model": model, "execution": execution, **parts})


def gated(declare: Declare, **parts: Any) -> Experiment:
    """Declare an experiment whose shards wait for `Gate`."""
    model = {"name": "tests.support.faulty_models:gated", "options": {"trials": PER_SHARD}}
    return declare(TRIALS, **{"model": model, "execution": {"trials_per_shard": PER_SHARD, "device": "cpu"}, **parts})
