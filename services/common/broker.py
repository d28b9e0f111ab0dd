"""What goes through Redis: assignments of shards to workers, leases, and who leads.

Nothing here needs to survive. An assignment that is lost is sent again by the dispatcher, one that arrives twice finds the shard committed
or leased, and leases of the living are renewed within seconds after Redis has come back empty. All times are Redis's own, so that no
clock of a worker matters.
"""

import json
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import redis
from celery import Celery
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memtail.spec import NAME
from memtail.trials import Shard
from services.common.settings import ServiceError, ServiceSettings

#: The task that workers run.
TASK = "memtail.train_shard"

#: The header of a message that says when it was sent, by Redis's clock.
SENT_HEADER = "memtail_sent"

#: What reading an entry of a queue may raise that is no assignment.
UNREADABLE = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)

_PREFIX = "memtail:"
_LEASE = f"{_PREFIX}lease:"
_QUEUE = "shards"
_STARTS = f"{_PREFIX}starts"
_LEADER = f"{_PREFIX}leader"

# With a lease goes the number of times that the shard was begun and has not ended in order: each leaves one behind whose worker vanished.
_ACQUIRE = """
if not redis.call('set', KEYS[1], ARGV[1], 'nx', 'px', ARGV[2]) then return 0 end
return redis.call('hincrby', KEYS[2], ARGV[3], 1)
"""
# A lease is renewed, or taken back after Redis was emptied, unless another holds it.
_RENEW = """
local holder = redis.call('get', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('set', KEYS[1], ARGV[1], 'px', ARGV[2])
return 1
"""
# It is given back only by its holder, or by the worker whose process the holder was.
_RELEASE = """
local holder = redis.call('get', KEYS[1])
if not holder or string.sub(holder, 1, #ARGV[1]) ~= ARGV[1] then return 0 end
if ARGV[2] and redis.call('hincrby', KEYS[2], ARGV[2], -1) <= 0 then redis.call('hdel', KEYS[2], ARGV[2]) end
return redis.call('del', KEYS[1])
"""


class Assignment(BaseModel):
    """A shard to train: what a message holds, and all it holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    experiment: Annotated[str, Field(pattern=NAME.pattern)]
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    first: Annotated[int, Field(ge=0)]
    last: Annotated[int, Field(ge=0)]

    @property
    def shard(self) -> Shard:
        """The shard."""
        return Shard(self.first, self.last)

    @property
    def id(self) -> str:
        """`NAME/FIRST-LAST`: what it is called in the broker and in logs."""
        return f"{self.experiment}/{self.first}-{self.last}"


def parse_id(text: str) -> tuple[str, Shard] | None:
    """The experiment and the shard of an assignment's id; None if it is none."""
    experiment, _, span = text.rpartition("/")
    first, _, last = span.partition("-")
    return (experiment, Shard(int(first), int(last))) if first.isdecimal() and last.isdecimal() else None


@dataclass(frozen=True)
class BrokerLoad:
    """What Redis has to carry: messages that wait, bytes of memory, connections."""

    waiting: int
    memory: int
    clients: int


def queue_of(settings: ServiceSettings, experiment: str = "") -> str:
    """Where the assignments of an experiment wait: in a queue of its own where it has workers of its own, else in one with all others.

    By default that of the settings' experiment.
    """
    own = experiment or settings.experiment
    return f"{_QUEUE}.{own}" if settings.fleet or settings.experiment else _QUEUE


def celery_app(settings: ServiceSettings) -> Celery:
    """The Celery application: messages are JSON, are acknowledged when the work is done, and leave no result behind."""
    app = Celery("memtail", broker=settings.broker, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # where the URL says nothing of TLS but rediss, kombu would trust any server
        broker_use_ssl={"ssl_cert_reqs": ssl.CERT_REQUIRED} if settings.broker.startswith("rediss:") else None,
        broker_transport_options={
            "global_keyprefix": _PREFIX,
            # a message is delivered again after this time: longer than any shard, since the dispatcher sends what is lost much sooner
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
        task_default_queue=queue_of(settings),
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
    """Redis, as the services use it. Every method raises `redis.RedisError` while Redis cannot be reached.

    Args:
        settings: of the services.
        celery: the application that sends assignments; made anew by default.
    """

    def __init__(self, settings: ServiceSettings, celery: Celery | None = None) -> None:
        self._celery = celery or celery_app(settings)
        self._settings, self._lease = settings, int(settings.lease_seconds * 1000)
        options = {"socket_timeout": 10, "socket_connect_timeout": 5, "decode_responses": True, "encoding_errors": "replace"}
        try:
            self.redis = redis.Redis.from_url(settings.broker, **options)
        except ValueError:  # what it says may hold a part of the password
            raise ServiceError("MEMTAIL_BROKER is no Redis URL: give redis://:PASSWORD@HOST:PORT/0, or rediss:// for TLS") from None
        self._acquire, self._renew, self._release = map(self.redis.register_script, (_ACQUIRE, _RENEW, _RELEASE))

    def send(self, assignments: list[Assignment]) -> None:
        """Put assignments into their queues."""
        if not assignments:
            return
        headers = {SENT_HEADER: self.time()}
        with self._celery.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=5)
            with self._celery.amqp.Producer(connection) as producer:
                for assignment in assignments:
                    queue = queue_of(self._settings, assignment.experiment)
                    options = {"queue": queue, "headers": headers, "producer": producer, "retry": False}
                    self._celery.send_task(TASK, kwargs=assignment.model_dump(), **options)

    def time(self) -> float:
        """Seconds since 1970, by Redis's clock."""
        seconds, microseconds = self.redis.time()
        return float(seconds) + float(microseconds) / 1e6

    def queued(self, queue: str) -> Iterator[Assignment]:
        """The assignments in a queue, which no worker has taken yet; what is not an assignment is passed over."""
        for message in self.redis.lrange(_PREFIX + queue, 0, -1):
            try:
                yield _assignment(message)
            except UNREADABLE:
                continue

    def waiting(self) -> int:
        """How many messages wait in the queue of the settings' experiment, or of all."""
        return int(self.redis.llen(_PREFIX + queue_of(self._settings)))

    def load(self) -> BrokerLoad:
        """What Redis has to carry."""
        pipeline = self.redis.pipeline(transaction=False)
        for section in ("memory", "clients"):
            pipeline.info(section)
        for queue in self.queues():
            pipeline.llen(_PREFIX + queue)
        memory, clients, *waiting = pipeline.execute()
        return BrokerLoad(sum(waiting), memory["used_memory"], clients["connected_clients"])

    def clear(self, queue: str) -> None:
        """Take all waiting assignments out of a queue."""
        self.redis.delete(_PREFIX + queue)

    def queues(self) -> set[str]:
        """The queues in which something waits."""
        return {str(name).removeprefix(_PREFIX) for name in self.redis.scan_iter(match=f"{_PREFIX}{_QUEUE}*", count=1000)}

    def acquire(self, assignment: Assignment, holder: str) -> bool:
        """Lease a shard to `holder` and count that it is begun, unless another has it."""
        return bool(self._acquire(keys=[_LEASE + assignment.id, _STARTS], args=[holder, self._lease, assignment.id]))

    def renew(self, assignment: Assignment, holder: str) -> bool:
        """Keep a lease; False if another has got it meanwhile."""
        return bool(self._renew(keys=[_LEASE + assignment.id], args=[holder, self._lease]))

    def release(self, assignment: Assignment, holder: str) -> None:
        """Give a lease back, whatever came of it; `holder` may be the beginning of the holder's name."""
        self._release(keys=[_LEASE + assignment.id, _STARTS], args=[holder, assignment.id])

    def leased(self) -> set[str]:
        """The ids of all assignments that are leased."""
        return {str(name).removeprefix(_LEASE) for name in self.redis.scan_iter(match=f"{_LEASE}*", count=1000)}

    def starts(self) -> dict[str, int]:
        """How often each shard was begun and has not ended in order, by the assignments' ids; a leased one counts its present start."""
        return {str(name): int(count) for name, count in self.redis.hgetall(_STARTS).items()}

    def forget_starts(self, ids: list[str]) -> None:
        """Forget how often shards were begun, once that is on record or they are committed."""
        if ids:
            self.redis.hdel(_STARTS, *ids)

    def lead(self, holder: str) -> bool:
        """Become or stay the one dispatcher that acts; False if another is."""
        return bool(self._renew(keys=[_LEADER], args=[holder, self._lease]))

    def step_down(self, holder: str) -> None:
        """Let another lead at once."""
        self._release(keys=[_LEADER], args=[holder])


def _assignment(message: Any) -> Assignment:
    """The assignment in a message as it lies in Redis."""
    import base64

    envelope = json.loads(message)
    body = envelope["body"]
    if envelope["properties"].get("body_encoding") == "base64":
        body = base64.b64decode(body)
    try:
        return Assignment.model_validate(json.loads(body)[1])
    except ValidationError as error:
        raise ValueError(str(error)) from None
