"""The environment variables that the services read; those of the store are in `memtail.settings`."""

import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

from memtail.errors import MemtailError
from memtail.settings import BROKER_VARIABLE, STORE_VARIABLE, secret


class ServiceError(MemtailError):
    """A service cannot work as it is set up."""


def _variable(name: str, default: Any, **options: Any) -> Any:
    return field(default=default, metadata={"variable": name}, **options)


@dataclass(frozen=True)
class ServiceSettings:
    """How the services work together; every one of them is started with the same.

    Attributes:
        store: `MEMTAIL_STORE`, the bucket's address.
        broker: `MEMTAIL_BROKER` (or the file named by `MEMTAIL_BROKER_FILE`), Redis's URL with its password; not shown when printed.
        lease_seconds: how long a worker that says nothing keeps its shard.
        shard_seconds: the longest that a shard may train before its process is killed.
        max_starts: a shard whose worker has vanished (killed with its whole container) this often is given up too.
        reconcile_seconds: between two looks of the dispatcher at what is to be done.
        resync_seconds: between two listings of all that is committed.
        max_queued: messages that wait in the broker at most.
        publish_trials, publish_seconds: scores are published when so many new trials have been folded, or so much time has passed; more
            rarely where publishing would take more than a tenth of the time.
        devices: of a worker, one process for each, with commas between: "auto", "cpu", or "cuda:0,cuda:1".
        port: of the metrics and health checks of a service.
        linger_seconds: for how long the metrics of an experiment that has ended stay: several intervals between scrapes.
        explorer_port: of the aggregator, where it serves the explorer; not at all if not set.
        fleet: of the dispatcher, the file that says how it makes workers in a Kubernetes cluster (see `services.dispatcher.worker_jobs`).
            It makes none if not set.
        experiment: of a worker, the only experiment that it trains; all if not set.
        rest_seconds: of a worker, for how long there is nothing to do before it ends; it never does if not set.
        heartbeat_file: of a worker, which it touches while it lives; none if not set.
    """

    store: str = _variable(STORE_VARIABLE, "")
    broker: str = _variable(BROKER_VARIABLE, "redis://127.0.0.1:6379/0", repr=False)
    lease_seconds: float = _variable("MEMTAIL_LEASE_SECONDS", 60.0)
    shard_seconds: float = _variable("MEMTAIL_SHARD_SECONDS", 6 * 3600.0)
    max_starts: int = _variable("MEMTAIL_MAX_STARTS", 10)
    reconcile_seconds: float = _variable("MEMTAIL_RECONCILE_SECONDS", 2.0)
    resync_seconds: float = _variable("MEMTAIL_RESYNC_SECONDS", 60.0)
    max_queued: int = _variable("MEMTAIL_MAX_QUEUED", 2000)
    publish_trials: int = _variable("MEMTAIL_PUBLISH_TRIALS", 500)
    publish_seconds: float = _variable("MEMTAIL_PUBLISH_SECONDS", 60.0)
    devices: str = _variable("MEMTAIL_DEVICES", "auto")
    port: int = _variable("MEMTAIL_PORT", 9100)
    linger_seconds: float = _variable("MEMTAIL_LINGER_SECONDS", 600.0)
    explorer_port: int = _variable("MEMTAIL_EXPLORER_PORT", 0)
    fleet: str = _variable("MEMTAIL_FLEET", "")
    experiment: str = _variable("MEMTAIL_EXPERIMENT", "")
    rest_seconds: float = _variable("MEMTAIL_REST_SECONDS", math.inf)
    heartbeat_file: str = _variable("MEMTAIL_HEARTBEAT_FILE", "")

    @classmethod
    def from_environment(cls) -> "ServiceSettings":
        """Those that the environment holds. Raises: ServiceError: a value is no number above 0, or there is no store."""
        values: dict[str, Any] = {}
        for entry in fields(cls):
            variable = entry.metadata["variable"]
            text = secret(variable) if variable == BROKER_VARIABLE else os.environ.get(variable)
            if text:
                values[entry.name] = _parsed(variable, text, type(entry.default))
        settings = cls(**values)
        if not settings.store:
            raise ServiceError(f"{STORE_VARIABLE} is not set: set it to the bucket's address, s3://BUCKET/PREFIX")
        return settings


def _parsed(variable: str, text: str, kind: type) -> Any:
    try:
        value = kind(text)
        if kind is str or value > 0:
            return value
    except ValueError:
        pass
    raise ServiceError(f"{variable} is '{text}': give a {'whole ' if kind is int else ''}number above 0")
