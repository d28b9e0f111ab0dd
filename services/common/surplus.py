"""Workers that an experiment gives up, because others lack workers: state in Redis between the dispatcher and the workers.

The dispatcher says how many. A worker that is idle, or about to take its next shard, ends if its experiment has more than its share.
"""

from contextlib import suppress

import redis

from services.common.broker import Broker

# Seconds after which a worker that leaves is forgotten: longer than any shard that its other devices may have to finish.
_FORGOTTEN = 86_400

# Takes one of an experiment's places to leave.
_LEAVE = """
local left = tonumber(redis.call('hget', KEYS[1], ARGV[1]) or '0') or 0
if left < 1 then return 0 end
redis.call('hset', KEYS[1], ARGV[1], left - 1)
redis.call('zadd', KEYS[2], ARGV[3], ARGV[2])
return 1
"""


class Surplus:
    """Numbers of workers to give up, by experiment.

    All methods but `leaving` raise `redis.RedisError` while Redis is unreachable or holds something else under their keys.

    Args:
        broker: of the settings' Redis.
        seconds: time until numbers that the dispatcher does not repeat are forgotten.
    """

    def __init__(self, broker: Broker, seconds: float) -> None:
        self._broker, self._redis, self._seconds = broker, broker.redis, seconds
        self._surplus, self._leaving = broker.prefix + "surplus", broker.prefix + "leaving"
        self._leave = self._redis.register_script(_LEAVE)

    def offer(self, numbers: dict[str, int]) -> None:
        """Replace the numbers of workers that are to leave."""
        pipeline = self._redis.pipeline()
        pipeline.delete(self._surplus)
        if numbers:
            pipeline.hset(self._surplus, items=[part for item in numbers.items() for part in item])
            pipeline.pexpire(self._surplus, int(self._seconds * 1000))
        pipeline.execute()

    def leave(self, experiment: str, host: str) -> bool:
        """Return whether a worker on a host is to end; it then must."""
        return bool(self._leave(keys=[self._surplus, self._leaving], args=[experiment, host, self._broker.time()]))

    def leaving(self) -> set[str]:
        """Return the hosts of the workers that leave, and of those that left within a day."""
        with suppress(redis.ResponseError):
            self._redis.zremrangebyscore(self._leaving, "-inf", self._broker.time() - _FORGOTTEN)
            return set(map(str, self._redis.zrange(self._leaving, 0, -1)))
        self._redis.delete(self._leaving)  # it holds something else
        return set()
