"""Small objects beside the record: the control set by an experiment's owner, notices of services, failed attempts."""

from dataclasses import dataclass
from typing import Literal

from memtail.trials import Shard


@dataclass(frozen=True)
class Control:
    """Control of an experiment by its owner: the object `control.json`.

    Attributes:
        state: "running", "paused" (no shard is started) or "cancelled" (shards in training are dropped too).
        priority: shards of the experiments with the highest priority are trained first.
        tripped: whether the experiment was paused because its first shards failed alike. It is not paused so again, until its failed
            attempts are cleared.
    """

    state: Literal["running", "paused", "cancelled"] = "running"
    priority: int = 0
    tripped: bool = False


@dataclass(frozen=True)
class Notice:
    """Notice of a service about an experiment; the next one of the same service replaces it.

    Attributes:
        lines: text for people.
        final: whether the experiment cannot give scores as it is.
    """

    lines: tuple[str, ...]
    final: bool = False


@dataclass(frozen=True)
class Origin:
    """The process that made an attempt at a shard; what is unknown is empty.

    Attributes:
        node: name of the machine, or of the cluster's node.
        host: name of the host; in a cluster, of the pod.
        device: the device, as torch names it.
        memtail, torch: versions of the software.
    """

    node: str = ""
    host: str = ""
    device: str = ""
    memtail: str = ""
    torch: str = ""


@dataclass(frozen=True)
class Failure:
    """One failed attempt at a shard.

    Attributes:
        shard: the shard.
        attempt: number of the attempt, counted from 1; 0 if the record cannot be read.
        error: the reason, in one line.
        traceback: Python's traceback, empty if there is none.
        when: time in UTC, ISO 8601.
        origin: the process that made the attempt.
    """

    shard: Shard
    attempt: int
    error: str
    traceback: str
    when: str
    origin: Origin = Origin()
