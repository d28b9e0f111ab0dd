"""Small objects beside the record: the control set by an experiment's owner, notices of services, failed attempts."""

from dataclasses import dataclass
from typing import Literal

from memtail.trials import Shard


@dataclass(frozen=True)
class Control:
    """What its owner asks of an experiment on a cluster.

    Attributes:
        state: "running", "paused" (nothing new is begun) or "cancelled" (what is being trained is dropped, too).
        priority: shards of the experiments with the highest are trained first.
    """

    state: Literal["running", "paused", "cancelled"] = "running"
    priority: int = 0


@dataclass(frozen=True)
class Notice:
    """What a service has to say about an experiment at present.

    Attributes:
        lines: for people.
        final: whether there will never be scores as it is.
    """

    lines: tuple[str, ...]
    final: bool = False


@dataclass(frozen=True)
class Failure:
    """One failed attempt at a shard."""

    shard: Shard
    attempt: int
    error: str
    traceback: str
    when: str
