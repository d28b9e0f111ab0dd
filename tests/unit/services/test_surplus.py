"""Numbers of workers to give up, on a real Redis."""

import pytest

from services.common.broker import Broker
from services.common.settings import ServiceSettings
from services.common.surplus import Surplus
from tests.support.cluster import RedisServer


@pytest.fixture
def surplus():
    server = RedisServer()
    server.start()
    yield Surplus(Broker(ServiceSettings(store="-", broker=server.url)), 60)
    server.stop()


def test_the_offered_number_of_workers_leaves(surplus):
    surplus.offer({"a": 2, "b": 1})
    assert [surplus.leave("a", f"host-{number}") for number in range(4)] == [True, True, False, False]
    assert surplus.leaving() == {"host-0", "host-1"}
    surplus.offer({"a": 1})
    assert not surplus.leave("b", "host-9")
    assert surplus.leave("a", "host-2")
    surplus.offer({})
    assert not surplus.leave("a", "host-3")


@pytest.mark.parametrize("value", ["x", "-1", "1e999", ""])
def test_any_number_in_redis_costs_no_more_than_workers(surplus, value):
    surplus._redis.hset("memtail2:surplus", "a", value)
    assert surplus.leave("a", "host") in (True, False)


def test_other_types_in_redis_are_replaced(surplus):
    surplus._redis.set("memtail2:surplus", "x")
    surplus._redis.set("memtail2:leaving", "x")
    assert surplus.leaving() == set()
    surplus.offer({"a": 1})
    assert surplus.leave("a", "host")
