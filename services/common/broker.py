"""State in Redis: assignments of shards to workers, leases, and the leader election of dispatchers.

All of it may be lost. The dispatcher resends a lost assignment, a worker drops a duplicate because its shard is committed or leased, and
running workers renew their leases within seconds after Redis restarts empty. `memtail.broker` has the scripts, and the prefix of all keys.
"""

import base64
import json
import re
import ssl
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Self

import redis
from celery import Celery
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from memtail import broker as scripts
from memtail.broker import key_prefix
from memtail.spec import NAME
from memtail.storage.keys import LAST_TRIAL
from memtail.trials import Shard
from services.common.broker_credentials import celery_url, client_arguments
from services.common.settings import ServiceError, ServiceSettings

#: Celery task that workers run.
TASK = "memtail.train_shard"

#: Message header with the time of sending, by Redis's clock.
SENT_HEADER = "memtail_sent"

#: Exceptions raised while decoding a malformed queue entry.
MALFORMED = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)

_QUEUE = "shards"
# Share of its memory that Redis may use until no messages are sent: a worker that starts, a lease and the leadership need the rest.
_MESSAGES_SHARE = 0.8
# Messages sent between two looks at the memory of Redis: some 100 KB.
_CHUNK = 100


class Assignment(BaseModel):
    """A shard to train: the complete payload of a message."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    experiment: Annotated[str, Field(pattern=NAME.pattern)]
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    first: Annotated[int, Field(ge=0)]
    last: Annotated[int, Field(le=LAST_TRIAL)]

    @model_validator(mode="after")
    def _is_not_empty(self) -> Self:
        if self.first > self.last:
            raise ValueError("the first trial is after the last")
        return self

    @property
    def shard(self) -> Shard:
        """Shard to train."""
        return Shard(self.first, self.last)

    @property
    def id(self) -> str:
        """Identifier in the broker and in logs: `NAME/FIRST-LAST`."""
        return f"{self.experiment}/{self.first}-{self.last}"


class WorkerPlace(NamedTuple):
    """Where a worker runs, and what it takes.

    Attributes:
        queue: the queue that it takes messages from.
        node: name of its machine, or of the cluster's node.
        host: name of its host; in a cluster, of its pod.
    """

    queue: str
    node: str
    host: str


def parse_id(text: str) -> tuple[str, Shard] | None:
    """Split an assignment's id into experiment and shard; None if `text` is not an id."""
    experiment, _, span = text.rpartition("/")
    match = re.fullmatch(r"([0-9]{1,8})-([0-9]{1,8})", span)
    shard = match and Shard(int(match[1]), int(match[2]))
    return (experiment, shard) if shard and shard.first <= shard.last else None


@dataclass(frozen=True)
class BrokerLoad:
    """Load of Redis.

    Attributes:
        waiting: messages in all queues.
        memory: bytes in use.
        memory_limit: bytes that it may use; 0 without a limit of its own.
        clients: open connections.
    """

    waiting: int
    memory: int
    memory_limit: int
    clients: int


def queue_name(settings: ServiceSettings, experiment: str = "") -> str:
    """Name the queue of an experiment's assignments: one per experiment where workers are started per experiment, else one shared queue.

    Args:
        settings: of the services.
        experiment: by default the settings' experiment.
    """
    name = experiment or settings.experiment
    return f"{_QUEUE}.{name}" if settings.fleet or settings.experiment else _QUEUE


def celery_app(settings: ServiceSettings) -> Celery:
    """Create the Celery application: JSON messages, acknowledged after the work, without a result backend."""
    app = Celery("memtail", broker=celery_url(settings.broker), set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        # a full Redis that refuses a write must not end a worker
        broker_channel_error_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # kombu's default for rediss:// URLs accepts any certificate
        broker_use_ssl={"ssl_cert_reqs": ssl.CERT_REQUIRED} if settings.broker.startswith("rediss:") else None,
        broker_transport_options={
            "global_keyprefix": key_prefix(settings.store, settings.identity),
            # Redis redelivers unacknowledged messages after this timeout; longer than any shard, because the dispatcher resends earlier
            "visibility_timeout": settings.shard_seconds + 3600,
            "socket_connect_timeout": 5,
            "socket_timeout": 30,
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
        event_serializer="json",
        result_backend=None,
        task_acks_late=True,
        task_acks_on_failure_or_timeout=True,
        task_default_queue=queue_name(settings),
        task_ignore_result=True,
        task_reject_on_worker_lost=False,
        task_serializer="json",
        task_time_limit=settings.shard_seconds,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_prefetch_multiplier=1,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
    )
    return app


class Broker:
    """Queues, leases and leader election in Redis. All methods raise `redis.RedisError` while Redis is unreachable.

    Args:
        settings: of the services.
        celery: application that sends assignments; a new one by default.

    Raises:
        ServiceError: `settings.broker` is not a Redis URL.
    """

    def __init__(self, settings: ServiceSettings, celery: Celery | None = None) -> None:
        self._celery = celery or celery_app(settings)
        self._settings, self._lease = settings, int(settings.lease_seconds * 1000)
        options: dict[str, Any] = {
            "socket_timeout": 10,
            "socket_connect_timeout": 5,
            "decode_responses": True,
            "encoding_errors": "replace",
        }
        try:
            self.redis = redis.Redis.from_url(**client_arguments(settings.broker), **options)
        except ValueError:  # its message may contain a part of the password
            raise ServiceError("MEMTAIL_BROKER is not a Redis URL: use redis://:PASSWORD@HOST:PORT/0, or rediss:// for TLS") from None
        #: Prefix of all keys.
        self.prefix = key_prefix(settings.store, settings.identity)
        self._leases, self._leader, self._workers, self._queues = (self.prefix + key for key in ("leases", "leader", "workers", "queues"))
        self._acquire, self._renew, self._release, self._expired, self._lead, self._step_down, self._register = map(
            self.redis.register_script,
            (scripts.ACQUIRE, scripts.RENEW, scripts.RELEASE, scripts.EXPIRED, scripts.LEAD, scripts.STEP_DOWN, scripts.REGISTER),
        )

    def send(self, assignments: list[Assignment]) -> list[Assignment]:
        """Append assignments to their queues, as long as Redis has memory for them; returns those that were sent, the first ones."""
        if not assignments or not self._has_room():
            return []
        headers = {SENT_HEADER: self.time()}
        self.redis.sadd(self._queues, *{queue_name(self._settings, assignment.experiment) for assignment in assignments})
        with self._celery.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=5)
            with self._celery.amqp.Producer(connection) as producer:
                for number, assignment in enumerate(assignments):
                    if number and number % _CHUNK == 0 and not self._has_room():
                        return assignments[:number]
                    queue = queue_name(self._settings, assignment.experiment)
                    options = {"queue": queue, "headers": headers, "producer": producer, "retry": False}
                    self._celery.send_task(TASK, kwargs=assignment.model_dump(), **options)
        return assignments

    def _has_room(self) -> bool:
        """Return whether messages leave Redis the memory that others need; one that evicts keys never refuses a write."""
        memory: Any = self.redis.info("memory")
        limit = memory["maxmemory"] if memory.get("maxmemory_policy", "noeviction") == "noeviction" else 0
        return not limit or memory["used_memory"] < _MESSAGES_SHARE * limit

    def time(self) -> float:
        """Return the Unix time of Redis's clock."""
        seconds, microseconds = self.redis.time()
        return float(seconds) + float(microseconds) / 1e6

    def queued(self, queue: str) -> Iterator[Assignment]:
        """Iterate over a queue's assignments that no worker has taken yet; malformed entries are skipped."""
        for message in self.redis.lrange(self.prefix + queue, 0, -1):
            try:
                yield decode_assignment(message)
            except MALFORMED:
                continue

    def waiting(self) -> int:
        """Count the messages in the queue of the settings' experiment, or in the shared queue."""
        return int(self.redis.llen(self.prefix + queue_name(self._settings)))

    def load(self) -> BrokerLoad:
        """Measure the load of Redis."""
        pipeline = self.redis.pipeline(transaction=False)
        for section in ("memory", "clients"):
            pipeline.info(section)
        for queue in self.queues():
            pipeline.llen(self.prefix + queue)
        memory, clients, *lengths = pipeline.execute()
        return BrokerLoad(sum(lengths), memory["used_memory"], memory["maxmemory"], clients["connected_clients"])

    def clear(self, queue: str) -> None:
        """Remove a queue and its messages."""
        self.redis.delete(self.prefix + queue)
        self.redis.srem(self._queues, queue)

    def queues(self) -> set[str]:
        """Return the names of the queues to which assignments were sent since they were cleared."""
        names: Any = self.redis.smembers(self._queues)
        return {name for name in map(str, names) if name.partition(".")[0] == _QUEUE}

    def acquire(self, assignment: Assignment, holder: str) -> bool:
        """Lease a shard to `holder`; False if another holder has the lease."""
        return bool(self._acquire(keys=[self._leases], args=[assignment.id, holder, self._lease]))

    def renew(self, assignment: Assignment, holder: str) -> bool:
        """Renew a lease; False if another holder has it."""
        return bool(self._renew(keys=[self._leases], args=[assignment.id, holder, self._lease]))

    def release(self, assignment: Assignment, holder: str) -> None:
        """Release a lease; `holder` may be a prefix of the holder's name."""
        self._release(keys=[self._leases], args=[assignment.id, holder])

    def leased(self) -> dict[str, str]:
        """Return the holders of all leases that have not expired, by the ids of their assignments; what is no lease is skipped."""
        now, held = self.time() * 1000, {}
        values: Any = self.redis.hgetall(self._leases)
        for id_, value in values.items():
            match = re.fullmatch("([0-9]{1,15}) (.*)", value, re.DOTALL)
            if match and now < int(match[1]) <= now + 10 * self._lease:
                held[str(id_)] = match[2]
        return held

    def take_expired(self) -> dict[str, str]:
        """Remove the leases that expired, because their holders neither renewed nor released them; returns the holders by id."""
        expired = self._expired(keys=[self._leases], args=[self._lease])
        return dict(zip(expired[::2], expired[1::2], strict=True))

    def register_worker(self, node: str, host: str) -> None:
        """Register a worker of the settings' queue for the duration of a lease, and forget those that did not register since."""
        place = WorkerPlace(queue_name(self._settings), node, host)
        self._register(keys=[self._workers], args=[json.dumps(place), self._lease])

    def workers(self, experiment: str = "") -> list[WorkerPlace]:
        """List the workers that registered within the duration of a lease; malformed entries are skipped.

        Args:
            experiment: list those that take its messages; by default of the settings' experiment.
        """
        places = []
        entries: Any = self.redis.zrangebyscore(self._workers, self.time() * 1000 - self._lease, "+inf")
        for entry in entries:
            with suppress(*MALFORMED):
                queue, node, host = map(str, json.loads(entry))
                places.append(WorkerPlace(queue, node, host))
        return [place for place in places if place.queue == queue_name(self._settings, experiment)]

    def lead(self, holder: str) -> bool:
        """Acquire or renew the leadership of dispatchers; False if another dispatcher leads."""
        return bool(self._lead(keys=[self._leader], args=[holder, self._lease]))

    def step_down(self, holder: str) -> None:
        """Release the leadership, so that another dispatcher can take over immediately."""
        self._step_down(keys=[self._leader], args=[holder])


def decode_assignment(message: Any) -> Assignment:
    """Decode a message as stored in Redis. Raises: one of `MALFORMED`."""
    envelope = json.loads(message)
    body = envelope["body"]
    if envelope["properties"].get("body_encoding") == "base64":
        body = base64.b64decode(body)
    try:
        return Assignment.model_validate(json.loads(body)[1])
    except ValidationError as error:
        raise ValueError(str(error)) from None
