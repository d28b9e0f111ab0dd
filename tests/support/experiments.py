"""Experiments that services train in tests: their trials, and networks that go wrong or wait."""

from collections.abc import Callable
from typing import Any

from memtail.spec import Experiment

TRIALS, PER_SHARD = 24, 4
SHARDS = TRIALS // PER_SHARD

Declare = Callable[..., Experiment]


def faulty(declare: Declare, how: str, always: bool = False, **parts: Any) -> Experiment:
    """An experiment of which a shard goes wrong once, or all always; see `tests.support.faulty_models`."""
    model = {"name": "tests.support.faulty_models:faulty", "options": {"how": how, "always": always}}
    # what always fails is in few shards, each of which is tried three times
    execution = {"trials_per_shard": TRIALS // 2 if always else PER_SHARD, "device": "cpu"}
    return declare(TRIALS, **{"name": f"{how}-always" if always else how, "model": model, "execution": execution, **parts})


def gated(declare: Declare, **parts: Any) -> Experiment:
    """An experiment whose shards wait for `Gate`."""
    model = {"name": "tests.support.faulty_models:gated", "options": {"trials": PER_SHARD}}
    return declare(TRIALS, **{"model": model, "execution": {"trials_per_shard": PER_SHARD, "device": "cpu"}, **parts})
