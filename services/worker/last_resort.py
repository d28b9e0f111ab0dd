"""Ends a worker that was told to stop while its broker is gone, as when a release is uninstalled.

Celery tries to connect until it is killed, and the training processes try to save their checkpoints. Without the broker no shard can be
handed back, and its lease ends by itself.
"""

import os
import signal
import threading
import time
from contextlib import suppress

import redis
from billiard import active_children

from services.common.broker import Broker

# Seconds without the broker after which the worker ends, in which its processes may save their checkpoints; and between two attempts.
_PATIENCE, _PAUSE = 15.0, 2.0


def end_without_broker(broker: Broker) -> None:
    """End this process and its children once the broker has been unreachable for a while; returns at once."""
    threading.Thread(target=_watch, args=(broker,), daemon=True).start()


def _watch(broker: Broker) -> None:
    reached = time.monotonic()
    while time.monotonic() - reached < _PATIENCE:
        with suppress(redis.RedisError):
            broker.redis.ping()
            reached = time.monotonic()
        time.sleep(_PAUSE)
    for child in active_children():
        with suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
    os._exit(0)
