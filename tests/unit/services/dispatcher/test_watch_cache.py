"""The local copy of Kubernetes objects, with an API server that misbehaves."""

import threading
import time
from types import SimpleNamespace

import pytest
from kubernetes.client import ApiClient

from services.dispatcher import metrics, watch_cache
from services.dispatcher.kubernetes_objects import parse_job
from services.dispatcher.watch_cache import ClusterError, WatchCache


@pytest.mark.parametrize("error", [KeyError("status"), TypeError("odd"), RecursionError(), MemoryError()])
def test_any_exception_restarts_the_watch(monkeypatch, error):
    monkeypatch.setattr(watch_cache, "wait_random_exponential", lambda **_: lambda _: 0.01)
    broken = [True]

    def list_objects(**options):
        if broken[0]:
            raise error
        if options.get("resource_version"):
            threading.Event().wait()  # for ever: the thread must not go on after the test
        return SimpleNamespace(to_dict=dict)

    monkeypatch.setattr(ApiClient, "sanitize_for_serialization", lambda *_: {"items": [], "metadata": {"resourceVersion": "1"}})
    interrupted = metrics.WATCH_INTERRUPTIONS.labels("jobs")
    before = interrupted._value.get()
    cache = WatchCache("jobs", list_objects, "namespace", "selector", parse_job)
    _until(lambda: interrupted._value.get() >= before + 3)
    with pytest.raises(ClusterError, match="watch of the API server interrupted"):
        cache.objects()
    broken[0] = False
    _until(lambda: not cache._error)
    assert cache.objects() == []
    assert cache.is_alive()


def _until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
