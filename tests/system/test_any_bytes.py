"""Whatever Redis holds, the dispatcher and the workers go on when it is gone: a forged queue costs time only."""

from contextlib import suppress

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memtail.storage.local import LocalStore
from services.common.broker import PREFIX, Broker
from services.common.settings import ServiceSettings
from services.dispatcher.dispatcher import Dispatcher
from tests.support.cluster import RedisServer

NUMBERS = st.sampled_from([b"", b"0", b"-1", b"nan", b"1e9", b"9" * 5000, b"10/3"])
BYTES = st.binary(max_size=20) | NUMBERS
SHARDS = st.sampled_from([b"other/0-3", b"other/4-7", b"other/9-1", b"other/" + b"9" * 30 + b"-" + b"9" * 31, b"/", b"other/-"])


@pytest.fixture(scope="module")
def server():
    made = RedisServer()
    made.start()
    yield made
    made.stop()


@pytest.fixture
def dispatcher(server, tmp_path):
    server.client().flushall()
    services = ServiceSettings(store="-", broker=server.url)
    return Dispatcher(LocalStore(tmp_path), Broker(services), services)


@given(
    hashes=st.dictionaries(SHARDS | BYTES, BYTES, max_size=3),
    leases=st.dictionaries(SHARDS, BYTES, max_size=3),
    queue=st.lists(BYTES, max_size=3),
    workers=st.lists(BYTES, max_size=3),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_values_under_the_keys_of_the_broker(server, dispatcher, hashes, leases, queue, workers):
    raw = redis.Redis.from_url(server.url)
    raw.flushall()
    for field, value in hashes.items():
        raw.hset(f"{PREFIX}starts", field, value)
    for shard, value in leases.items():
        raw.set(f"{PREFIX}lease:".encode() + shard, value)
    for value in queue:
        raw.rpush(f"{PREFIX}shards", value)
    for value in workers:
        raw.zadd(f"{PREFIX}workers", {value: 1e12})
    dispatcher.reconcile()
    Broker(ServiceSettings(store="-", broker=server.url)).workers()
    for id_ in leases:
        raw.delete(f"{PREFIX}lease:".encode() + id_)
    dispatcher.reconcile()  # looks at the leases that ended


@pytest.mark.parametrize("key", ["starts", "leader", "shards", "workers", "lease:other/0-3"])
def test_a_key_of_another_type_ends_only_the_pass(server, dispatcher, key):
    raw = redis.Redis.from_url(server.url)
    raw.sadd(f"{PREFIX}{key}", "x")
    with suppress(redis.ResponseError):
        dispatcher.reconcile()
