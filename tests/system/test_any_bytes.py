"""Whatever Redis holds, the dispatcher and the workers go on when it is gone: a forged queue costs time only."""

from contextlib import suppress

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memtail.storage.local import LocalStore
from services.common.broker import Broker
from services.common.settings import ServiceSettings
from services.dispatcher.dispatcher import Dispatcher

NUMBERS = st.sampled_from([b"", b"0", b"-1", b"nan", b"1e9", b"9" * 5000, b"10/3"])
BYTES = st.binary(max_size=20) | NUMBERS
SHARDS = st.sampled_from([b"other/0-3", b"other/4-7", b"other/9-1", b"other/" + b"9" * 30 + b"-" + b"9" * 31, b"/", b"other/-"])
LEASES = st.sampled_from([b"0 x", b"1 ", b"9" * 15 + b" x", b"9" * 5000 + b" x", b"9999999999999 x", b"-1 x", b"1e9 x"])


@pytest.fixture
def broker(server):
    server.client().flushall()
    return Broker(ServiceSettings(store="-", broker=server.url))


@pytest.fixture
def dispatcher(server, broker, tmp_path):
    return Dispatcher(LocalStore(tmp_path), broker, ServiceSettings(store="-", broker=server.url))


@given(
    leases=st.dictionaries(SHARDS | BYTES, BYTES | LEASES, max_size=3),
    queues=st.lists(BYTES | st.sampled_from([b"shards", b"shards.other", b"shards.", b"shards.\xff"]), max_size=3),
    queue=st.lists(BYTES, max_size=3),
    workers=st.lists(BYTES, max_size=3),
    leader=BYTES,
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_values_under_the_keys_of_the_broker(server, broker, dispatcher, leases, queues, queue, workers, leader):
    raw = redis.Redis.from_url(server.url)
    raw.flushall()
    raw.set(f"{broker.prefix}leader", leader)
    for id_, value in leases.items():
        raw.hset(f"{broker.prefix}leases", id_, value)
    for value in queues:
        raw.sadd(f"{broker.prefix}queues", value)
    for value in queue:
        raw.rpush(f"{broker.prefix}shards", value)
    for value in workers:
        raw.zadd(f"{broker.prefix}workers", {value: 1e12})
    dispatcher._reconcile_if_leader()
    assert not broker.lead("another")
    broker.workers()
    broker.load()
    for id_ in leases:
        raw.hdel(f"{broker.prefix}leases", id_)
    dispatcher.reconcile()  # looks at the leases that ended


@pytest.mark.parametrize("key", ["leases", "leader", "shards", "workers", "queues"])
def test_a_key_of_another_type_ends_only_the_pass(server, broker, dispatcher, key):
    raw = redis.Redis.from_url(server.url)
    raw.sadd(f"{broker.prefix}queues", "shards")
    raw.delete(f"{broker.prefix}{key}")
    raw.xadd(f"{broker.prefix}{key}", {"x": "x"})
    with suppress(redis.ResponseError):
        dispatcher._reconcile_if_leader()
