"""The local copy of Kubernetes objects, with an API server that misbehaves."""

import threading
import time
from types import SimpleNamespace

import pytest
from kubernetes.client import ApiClient
from kubernetes.client.exceptions import ApiException

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


@pytest.mark.parametrize("ends", [ApiException(status=410, reason="Expired"), ApiException(status=403, reason="Forbidden"), None])
def test_a_watch_that_ends_at_once_is_restarted_after_pauses_that_grow(monkeypatch, ends):
    attempts, over = [], threading.Event()
    monkeypatch.setattr(watch_cache, "wait_random_exponential", lambda **_: lambda state: attempts.append(state.attempt_number) or 0.01)

    class Watch:
        def stream(self, *_, **__):
            if ends:
                raise ends
            return iter(())

    def list_objects(**_):
        if over.is_set():
            threading.Event().wait()
        return {"items": [], "metadata": {"resourceVersion": "1"}}

    monkeypatch.setattr("services.dispatcher.watch_cache.watch.Watch", Watch)
    WatchCache("jobs", list_objects, "namespace", "selector", parse_job)
    _until(lambda: len(attempts) >= 4)
    assert attempts[:4] == [1, 2, 3, 4]
    monkeypatch.setattr(watch_cache, "_LASTING", 0.0)
    _until(lambda: attempts[-1] == 1)
    over.set()


def _until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
