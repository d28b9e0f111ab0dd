"""Whatever an experiment's objects hold, the dispatcher's loop does not end, and the other experiments are served."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memtail.errors import UnsupportedError
from memtail.execution.declare import declare as declare_record
from memtail.execution.progress import progress_of
from memtail.experiment_store import ExperimentStore, record_action, recorded_actions
from memtail.storage import keys
from memtail.storage.local import LocalStore
from services.common.settings import ServiceSettings
from services.dispatcher.dispatcher import Dispatcher
from tests.unit.services.dispatcher.test_dispatcher import Broker

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths to all values of a JSON document."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


def replaced(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a JSON document with another value at a path."""
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[path[0]] = replaced(content[path[0]], path[1:], value)
    return copy


@pytest.fixture
def record(declare, digits):
    execution = {"trials_per_shard": 4, "device": "cpu"}
    return replace(declare_record(declare(8, execution=execution, subsets={"design": "balanced"}), digits, 4), owner="somebody")


@pytest.fixture
def store(record, tmp_path):
    made = LocalStore(tmp_path)
    ExperimentStore(made, "healthy").register(record)
    return made


def served(store):
    dispatcher = Dispatcher(store, Broker(), ServiceSettings(store="-"))
    return {assignment.experiment for assignment in dispatcher.reconcile().send}


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_in_a_record(store, record, data):
    content = json.loads(record.to_bytes())
    path = data.draw(st.sampled_from(places(content)))
    changed = replaced(content, path, data.draw(JSON))
    store.put(keys.experiment("changed"), json.dumps(changed).encode())
    assert "healthy" in served(store)


@pytest.mark.parametrize(("trials", "per_shard"), [(3_000_000, 4), (10**30, 1), (10**30, 10**29), (900_000, 1)])
def test_an_experiment_that_is_too_large_is_passed_over_with_a_notice(store, record, trials, per_shard):
    content = json.loads(record.to_bytes())
    content["experiment"]["subsets"]["trials"], content["trials_per_shard"] = trials, per_shard
    store.put(keys.experiment("changed"), json.dumps(content).encode())
    assert served(store) == {"healthy"}
    (line,) = ExperimentStore(store, "changed").notices()["dispatcher"].lines
    assert "are allowed" in line
    with pytest.raises(UnsupportedError, match="are allowed"):
        progress_of(store, "changed")
    store.put(keys.experiment("changed"), record.to_bytes())
    assert served(store) == {"healthy", "changed"}
    assert not ExperimentStore(store, "changed").notices()


@given(content=JSON | st.fixed_dictionaries({"state": JSON, "priority": JSON}))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_in_a_control(store, record, content):
    ExperimentStore(store, "changed").register(record)
    store.put(keys.control("changed"), json.dumps(content).encode())
    assert "healthy" in served(store)


ACTION = {"action": "pause", "details": "", "when": "", "user": "", "host": "", "memtail": ""}


@given(content=JSON | st.fixed_dictionaries(dict.fromkeys(ACTION, JSON)) | st.just(ACTION))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_in_a_record_of_an_action(store, content):
    record_action(store, "healthy", "pause")
    store.put(keys.audit("healthy", "0"), json.dumps(content).encode())
    *_, last = recorded_actions(store, "healthy")
    assert last.action == "pause"
    assert "healthy" in served(store)


@given(content=st.binary(max_size=20))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_in_records_controls_failures_and_notices(store, record, content):
    for key in (
        keys.experiment("bytes"),
        keys.control("other"),
        *(keys.failure("other", first, first, 1) for first in range(6)),
        keys.notice("other", "dispatcher"),
        keys.latest_scores("other"),
    ):
        store.put(key, content)
    ExperimentStore(store, "other").register(record)
    assert "healthy" in served(store)
