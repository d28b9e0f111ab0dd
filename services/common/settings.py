"""Environment variables of the services; those of the object store are in `memtail.settings`."""

import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

from memtail.errors import MemtailError
from memtail.execution.breaker import BREAKER_SHARDS
from memtail.settings import BROKER_VARIABLE, STORE_VARIABLE, S3Settings, secret


class ServiceError(MemtailError):
    """A service is configured wrongly."""


def _variable(name: str, default: Any, **options: Any) -> Any:
    return field(default=default, metadata={"variable": name}, **options)


@dataclass(frozen=True)
class ServiceSettings:
    """Settings of the services. All services of a deployment share the same values.

    Attributes:
        store: `MEMTAIL_STORE`: address of the bucket.
        identity: of the store, which is read from it: the prefix of the keys in Redis follows from it and `store`.
        broker: `MEMTAIL_BROKER` (or the file named by `MEMTAIL_BROKER_FILE`): Redis's URL with its password; not in the repr.
        lease_seconds: duration of a lease; a worker that stops renewing it loses its shard.
        silence_seconds: time without progress after which training counts as hung, and its process is ended; longer if its own pauses are.
        shard_seconds: maximum training time of a shard, after which its process is killed.
        max_starts: number of workers lost on a shard that counts as one failed attempt, as far as one dispatcher saw their leases expire.
        breaker_shards: number of shards that must fail alike, before any is committed, to pause their experiment.
        reconcile_seconds: interval between passes of the dispatcher and of the aggregator.
        resync_seconds: interval between complete listings of the committed batches, and of the finished experiments that were changed.
        max_queued: maximum number of messages in the broker.
        publish_trials, publish_seconds: number of new trials, and interval, after which scores are published; less often where publishing
            would take more than a tenth of the time.
        devices: devices of a worker, separated by commas, with one process each: "cpu", or "cuda:0,cuda:1"; "auto": all visible GPUs,
            else the CPU. Indices are those of the visible GPUs.
        port: port of a service's metrics and health checks.
        linger_seconds: time after the end of an experiment until its metrics are removed: several scrape intervals.
        explorer_port: port of the explorer, 8080 by default; the aggregator, which served the explorer in 0.1.0, refuses it.
        fleet: file that describes how the dispatcher starts workers in a Kubernetes cluster (see `services.dispatcher.worker_jobs`);
            empty: the dispatcher starts no workers.
        experiment: the only experiment that a worker trains; empty: all experiments.
        rest_seconds: idle time after which a worker ends; by default it never ends.
        heartbeat_file: file that a worker touches while it is alive; empty: none.
    """

    store: str = _variable(STORE_VARIABLE, "")
    identity: bytes = _variable("", b"")
    broker: str = _variable(BROKER_VARIABLE, "redis://127.0.0.1:6379/0", repr=False)
    lease_seconds: float = _variable("MEMTAIL_LEASE_SECONDS", 60.0)
    silence_seconds: float = _variable("MEMTAIL_SILENCE_SECONDS", 300.0)
    shard_seconds: float = _variable("MEMTAIL_SHARD_SECONDS", 6 * 3600.0)
    max_starts: int = _variable("MEMTAIL_MAX_STARTS", 10)
    breaker_shards: int = _variable("MEMTAIL_BREAKER_SHARDS", BREAKER_SHARDS)
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
        """Read the environment.

        Raises:
            ServiceError: a number is not positive, or `MEMTAIL_STORE` is not set.
            StoreError: a session token of S3 is not in a file.
        """
        values: dict[str, Any] = {}
        for entry in fields(cls):
            variable = entry.metadata["variable"]
            if not variable:
                continue
            text = secret(variable) if variable == BROKER_VARIABLE else os.environ.get(variable)
            if text:
                values[entry.name] = _parsed(variable, text, type(entry.default))
        S3Settings.refuse_expiring_key()
        settings = cls(**values)
        if not settings.store:
            raise ServiceError(f"{STORE_VARIABLE} is not set: set it to the address of the bucket, s3://BUCKET/PREFIX")
        return settings


def _parsed(variable: str, text: str, kind: type) -> Any:
    try:
        value = kind(text)
        if kind is str or value > 0:
            return value
    except ValueError:
        pass
    raise ServiceError(f"{variable} must be a {'whole ' if kind is int else ''}number above 0, got '{text}'")
