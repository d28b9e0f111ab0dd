"""Dispatcher and aggregator beside finished experiments, on a folder and a simulated clock: what they send, keep and ask the store."""

from collections import Counter
from contextlib import contextmanager

import pytest
import structlog

from memtail.datasets.staged_dataset import stage
from memtail.errors import UnreachableError
from memtail.execution import retention
from memtail.execution.aggregation import Aggregation, Pace
from memtail.execution.declare import declare as declare_record
from memtail.experiment_store import MAX_ATTEMPTS, Control, ExperimentStore, Finished
from memtail.scores.pointer import latest_version
from memtail.scores.publish import publish
from memtail.storage import keys
from memtail.storage.identity import make_identity
from memtail.storage.local import LocalStore
from memtail.trials import Shard
from services.aggregator import aggregator as module
from services.aggregator import metrics
from services.aggregator.aggregator import Aggregator
from services.common.settings import ServiceSettings
from services.dispatcher.dispatcher import Dispatcher
from tests.support.batches import commit
from tests.unit.execution.test_discards import STEPS, discard
from tests.unit.services.dispatcher.test_dispatcher import Broker

PER_SHARD = 4


class CountingStore(LocalStore):
    """Counts requests by method and by the kind of object: the last folder of the prefix, or the name of the file."""

    def __init__(self, root):
        super().__init__(root)
        self.requests = Counter()


def _counted(method):
    def call(self, key, *arguments, **options):
        self.requests[method, key.rstrip("/").rpartition("/")[2]] += 1
        return getattr(LocalStore, method)(self, key, *arguments, **options)

    return call


for method in ("get", "put", "put_if_absent", "list", "folders", "exists", "delete", "upload", "download"):
    setattr(CountingStore, method, _counted(method))


class Clock:
    """Replaces `time.monotonic`."""

    now = 1e6

    def __call__(self):
        return self.now


class Services:
    """A dispatcher and an aggregator, of which the test makes passes."""

    def __init__(self, store, clock):
        self.store, self.clock, self.broker = store, clock, Broker()
        self.settings = ServiceSettings(store=store.address, identity=make_identity(store))
        self.restart()

    def restart(self):
        self.dispatcher, self.aggregator = Dispatcher(self.store, self.broker, self.settings), Aggregator(self.store, self.settings)

    def one_pass(self, seconds=2.0):
        self.clock.now += seconds
        self.aggregator.catch_up()
        self.broker.messages.clear()
        actions = self.dispatcher.reconcile()
        if self.aggregator._drawing:
            self.aggregator._drawing.join()
        return [assignment.shard for assignment in actions.send]

    def hour(self, seconds=60.0):
        """Make passes for an hour, and return the requests by method and kind, without those of an empty store: the listing of names."""
        self.store.requests.clear()
        for _ in range(round(3600 / seconds)):
            self.one_pass(seconds)
        return Counter({key: count for key, count in self.store.requests.items() if key != ("folders", "experiments")})


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("services.dispatcher.dispatcher.time.monotonic", clock)
    return clock


@pytest.fixture
def services(tmp_path, monkeypatch, digits, clock):
    store = CountingStore(tmp_path / "store")
    stage(digits, store)
    monkeypatch.setattr(module, "publish_report", lambda store, name: None)
    return Services(store, clock)


@pytest.fixture
def submit(services, declare, digits):
    """Register an experiment and commit its first shards, by default all of them."""

    def submitted(name="done", shards=2, trials=None, **parts):
        execution = {"trials_per_shard": PER_SHARD, "device": "cpu"}
        experiment = declare(trials or PER_SHARD * shards, name=name, execution=execution, subsets={"design": "balanced"}, **parts)
        experiment_store = ExperimentStore(services.store, name)
        experiment_store.register(declare_record(experiment, digits, PER_SHARD))
        commit(experiment_store, *map(shard, range(shards)))
        return experiment_store

    return submitted


def shard(number):
    return Shard(PER_SHARD * number, PER_SHARD * (number + 1) - 1)


@contextmanager
def outage(store, method, kind):
    """Make a store unreachable for one method and one kind of object, so that a client is cut off between two steps."""

    def fail(key, *arguments):
        if kind in key:
            raise UnreachableError("store: no answer")
        return getattr(type(store), method)(store, key, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, method, fail)
        with pytest.raises(UnreachableError):
            yield


def span(each):
    return each.first, each.last


def remove_batches(experiment_store):
    for key in list(experiment_store.store.list(keys.trials(experiment_store.name))):
        experiment_store.store.delete(key)


@pytest.mark.parametrize("restarted", [False, True])
def test_batches_that_expire_after_the_end_are_not_trained_again_and_the_scores_stay(services, submit, restarted):
    experiment_store = submit()
    services.one_pass()
    published = latest_version(services.store, "done")
    assert published.summary.accumulated_trials == 2 * PER_SHARD
    remove_batches(experiment_store)
    if restarted:
        services.restart()
    assert [services.one_pass(seconds=61.0) for _ in range(5)] == [[]] * 5
    assert latest_version(services.store, "done") == published


def test_a_finished_experiment_holds_no_statistics_and_is_seldom_looked_at(services, submit):
    submit()
    services.one_pass()
    services.one_pass(61.0)
    assert not services.aggregator._experiments
    assert services.hour().total() <= 2 * 60 + 10
    services.restart()
    services.one_pass()
    assert not services.aggregator._experiments


@pytest.mark.parametrize("restarted", [False, True])
def test_changes_bring_a_finished_experiment_back_within_a_minute(services, submit, restarted):
    experiment_store = submit()
    record = experiment_store.read_record()
    for _ in range(3):
        services.one_pass(61.0)
    if restarted:
        services.restart()
        services.one_pass()
    experiment_store.register(record.with_trials(3 * PER_SHARD))
    assert services.one_pass(61.0) == [shard(2)]
    commit(experiment_store, shard(2))
    for _ in range(3):
        services.one_pass(61.0)
    assert latest_version(services.store, "done").summary.accumulated_trials == 3 * PER_SHARD
    assert not services.aggregator._experiments
    experiment_store.discard(shard(0), "bad")
    assert services.one_pass(61.0) == [shard(0)]
    commit(experiment_store, shard(0))
    for _ in range(3):
        services.one_pass(61.0)
    assert latest_version(services.store, "done").discards == 2
    assert not services.aggregator._experiments
    remove_batches(experiment_store)
    experiment_store.reopen("resumed")
    assert services.one_pass(61.0) == [shard(0), shard(1), shard(2)]


@pytest.mark.parametrize(("method", "kind"), [("delete", "finished.json"), ("put", "changes/")])
@pytest.mark.parametrize("repeated", [False, True])
def test_an_extension_that_is_cut_off_takes_effect_if_repeated_and_else_within_a_day(services, submit, method, kind, repeated):
    experiment_store = submit()
    record = experiment_store.read_record()
    for _ in range(3):
        services.one_pass(61.0)
    with outage(services.store, method, kind):
        experiment_store.register(record.with_trials(3 * PER_SHARD))
    if repeated:
        experiment_store.register(record.with_trials(3 * PER_SHARD))
    else:
        services.one_pass(86400.0)
    services.one_pass(61.0)
    assert services.one_pass(61.0) == [shard(2)]


@pytest.mark.parametrize(("method", "kind"), [("put", "-removed"), ("delete", "finished.json"), ("put", "changes/")])
@pytest.mark.parametrize("repeated", [False, True])
def test_a_discard_that_is_cut_off_takes_effect_if_repeated_and_else_within_a_day(services, submit, method, kind, repeated):
    experiment_store = submit()
    for _ in range(3):
        services.one_pass(61.0)
    with outage(services.store, method, kind):
        experiment_store.discard(shard(0), "bad")
    if repeated:
        experiment_store.discard(shard(0), "bad")
    else:
        services.one_pass(86400.0)
    services.one_pass(61.0)
    assert services.one_pass(61.0) == [shard(0)]
    assert experiment_store.discards() == (2 if repeated or kind != "-removed" else 1)


@pytest.mark.parametrize("finished", [False, True])
@STEPS
def test_a_shard_that_is_discarded_while_the_services_look_is_trained_again_and_counted_once(services, submit, step, finished):
    experiment_store = submit()
    for _ in range(3 if finished else 0):
        services.one_pass(61.0)
    discard(experiment_store, (step, lambda: services.one_pass(61.0)), shard=shard(1))
    assert [shard(1)] in [services.one_pass(61.0) for _ in range(2)]
    commit(experiment_store, shard(1))
    for _ in range(60):  # listings are repeated after a multiple of the real time that they take
        services.one_pass(61.0)
    assert latest_version(services.store, "done").summary.accumulated_trials == 2 * PER_SHARD
    assert experiment_store.finished(experiment_store.read_record())


def test_an_experiment_that_another_process_finished_and_whose_batches_expired_is_left_alone(services, submit, digits):
    experiment_store = submit(shards=2, trials=4 * PER_SHARD)
    services.one_pass(61.0)
    assert services.aggregator._experiments["done"].aggregation.trials == 2 * PER_SHARD
    commit(experiment_store, shard(2), shard(3))
    run = Aggregation(experiment_store, experiment_store.read_record(), digits, Pace(1, 1, first_at_once=True))
    run.accumulate_new()
    run.publish()
    assert run.finish()
    remove_batches(experiment_store)
    assert [services.one_pass(61.0) for _ in range(3)] == [[]] * 3
    assert not services.aggregator._experiments
    assert services.aggregator._finished["done"].version == run.pointer.version
    assert metrics.ACCUMULATED.labels(experiment="done")._value.get() == 4 * PER_SHARD


def test_a_batch_that_was_replaced_by_hand_is_counted_within_a_day(services, submit):
    experiment_store = submit()
    services.one_pass()
    before = latest_version(services.store, "done")
    services.store.delete(keys.trial_batch("done", 0, PER_SHARD - 1))
    commit(experiment_store, shard(0), diverged=True)
    services.one_pass(86400.0)
    services.one_pass(61.0)
    after = latest_version(services.store, "done")
    assert (after.summary.trials, before.summary.trials) == (PER_SHARD, 2 * PER_SHARD)


def test_a_study_that_ends_after_its_experiment_is_drawn(services, submit, monkeypatch):
    drawn = []
    experiment_store = submit()
    monkeypatch.setattr(module, "publish_report", lambda store, name: drawn.append(name))
    monkeypatch.setattr(module, "is_current", lambda store, name: bool(drawn))
    services.one_pass()
    services.one_pass()  # the experiment may have ended while it was drawn, and then has another look at its report
    assert drawn == ["done"]
    monkeypatch.setattr(module, "is_current", lambda store, name: False)
    services.one_pass(61.0)
    assert drawn == ["done"]
    experiment_store.mark_changed()
    services.one_pass(61.0)
    services.one_pass()
    assert drawn == ["done", "done"]
    assert not list(services.store.list(keys.changes()))


def test_metrics_of_a_finished_experiment_stay_until_they_expire(services, submit):
    submit()
    services.one_pass()
    shown = {"experiment": "done"}
    assert metrics.ACCUMULATED.labels(**shown)._value.get() == 2 * PER_SHARD
    services.restart()
    services.one_pass()
    assert metrics.ACCUMULATED.labels(**shown)._value.get() == 2 * PER_SHARD
    assert metrics.PUBLISHED_TRIALS.labels(**shown)._value.get() == 2 * PER_SHARD
    services.one_pass(services.settings.linger_seconds + 1)
    assert not [sample for sample in metrics.ACCUMULATED.collect()[0].samples if sample.labels == shown]


def test_an_experiment_that_is_removed_and_submitted_again_starts_over(services, submit):
    experiment_store = submit()
    for _ in range(2):
        services.one_pass(61.0)
    for key in list(services.store.list("experiments/done/")):
        services.store.delete(key)
    services.one_pass(5.0)
    submit(shards=1)
    remove_batches(experiment_store)
    assert services.one_pass(5.0) == [shard(0)]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("cut_off", [False, True])
def test_another_experiment_under_the_name_of_a_finished_one_is_trained(services, submit, left, cut_off):
    """Also if a thread of the aggregator left an object of the first one, or if the client lost the store after it wrote the record."""
    submit()
    for _ in range(3):
        services.one_pass(61.0)
    retention.remove(services.store, "done", retention.planned_removal(services.store, "done"))
    if left:
        services.store.put(keys.report("done", "v") + "report.html", b"")
        services.one_pass(61.0)
    if cut_off:
        with outage(services.store, "put", "changes/"):
            submit(training={"epochs": 3}, shards=0, trials=2 * PER_SHARD)
        services.one_pass(86400.0)
    else:
        submit(training={"epochs": 3}, shards=0, trials=2 * PER_SHARD)
    services.one_pass(61.0)
    assert services.one_pass(61.0) == [shard(0), shard(1)]


def test_a_finished_experiment_of_which_only_other_objects_are_left_is_forgotten_and_no_error(services, submit):
    submit()
    for _ in range(3):
        services.one_pass(61.0)
    services.store.delete(keys.experiment("done"))
    passed_over = metrics.PASSED_OVER._value.get()
    services.one_pass(86400.0)
    services.one_pass(2.0)
    assert not services.aggregator._finished
    assert metrics.PASSED_OVER._value.get() == passed_over


def test_an_experiment_that_is_removed_while_its_scores_are_written_is_forgotten_and_no_error(services, submit, monkeypatch):
    experiment_store = submit()
    passed_over = metrics.PASSED_OVER._value.get()

    def removed_before(*arguments):
        experiment_store.set_control(Control("cancelled"))
        retention.remove(services.store, "done", retention.planned_removal(services.store, "done"))
        return publish(*arguments)

    monkeypatch.setattr("memtail.execution.aggregation.publish", removed_before)
    services.one_pass()
    assert not services.aggregator._experiments
    assert not list(services.store.list("experiments/"))
    assert metrics.PASSED_OVER._value.get() == passed_over


def test_a_hundred_finished_experiments_cost_fewer_than_200_requests_an_hour(services, submit):
    submit("model", 1)
    services.one_pass()
    model = ExperimentStore(services.store, "model")
    finished, pointer = model.finished(model.read_record()), services.store.get(keys.latest_scores("model"))
    for number in range(100):
        experiment_store = submit(f"e-{number}", 1)
        tags = {each.span: tag for each, tag in experiment_store.committed_tags().items()}
        services.store.put(keys.latest_scores(experiment_store.name), pointer)
        experiment_store.set_finished(Finished(**{**vars(finished), "batches": tags}))
    services.one_pass(5.0)
    for _ in range(100):  # a pass looks at one report at least
        if all(each.reported for each in services.aggregator._finished.values()):
            break
        services.one_pass()
    requests = services.hour(seconds=4.0)
    assert 100 < requests.total() < 200, requests
    assert services.store.requests["folders", "experiments"] <= 2 * 3600 / 5


@pytest.mark.parametrize("why", ["cancelled", "paused", "given up"])
def test_an_experiment_that_waits_for_its_owner_is_looked_at_ever_more_rarely(services, submit, why):
    experiment_store = submit()
    services.store.delete(keys.trial_batch("done", *span(shard(1))))
    for _ in range(MAX_ATTEMPTS if why == "given up" else 0):
        experiment_store.record_failure(shard(1), "bad")
    if why != "given up":
        experiment_store.set_control(Control(why))
    for _ in range(1800):
        assert not services.one_pass()
    assert services.hour(seconds=2.0).total() < 200 + 2 * 60
    assert services.store.requests["folders", "experiments"] <= 2 * 3600 / 5
    experiment_store.retry()
    experiment_store.set_control(Control())
    experiment_store.mark_changed()
    sent = [services.one_pass() for _ in range(32)]
    assert [shard(1)] in sent
    commit(experiment_store, shard(1))
    for _ in range(60):
        services.one_pass()
    assert latest_version(services.store, "done").summary.accumulated_trials == 2 * PER_SHARD


@pytest.mark.parametrize("how", ["damaged", "of a later version"])
def test_an_experiment_that_cannot_be_read_is_looked_at_ever_more_rarely(services, submit, how):
    submit("other")
    experiment_store = submit()
    for _ in range(3):
        services.one_pass(61.0)
    services.store.delete(keys.trial_batch("done", *span(shard(1))))
    experiment_store.mark_changed()
    key = keys.experiment("done")
    record = services.store.get(key)
    services.store.put(key, b"{" if how == "damaged" else record.replace(b'"schema": 1', b'"schema": 99'))
    with structlog.testing.capture_logs() as logs:
        for _ in range(1800):
            assert not services.one_pass()
    assert sum(line["event"] == "experiment passed over" for line in logs) == 2  # by each service
    passed_over = metrics.PASSED_OVER._value.get()
    requests = services.hour(seconds=2.0)
    assert requests.total() < 200 + 2 * 60, requests
    assert services.store.requests["folders", "experiments"] <= 2 * 3600 / 5
    assert metrics.PASSED_OVER._value.get() == passed_over + 1800  # the alert stays
    assert services.dispatcher._unreadable.keys() == {"done"}
    services.store.put(key, record)
    experiment_store.reopen("it was repaired")
    assert [shard(1)] in [services.one_pass() for _ in range(32)]
    assert not services.dispatcher._unreadable
    commit(experiment_store, shard(1))
    for _ in range(60):
        services.one_pass()
    assert latest_version(services.store, "done").summary.accumulated_trials == 2 * PER_SHARD


def test_an_experiment_that_could_not_be_read_and_is_removed_is_forgotten(services, submit):
    submit()
    services.store.put(keys.experiment("done"), b"{")
    for _ in range(1800):
        services.one_pass()
    for stored in list(services.store.inventory(keys.everything("done"))):
        services.store.delete(stored.key)
    for _ in range(4):
        services.one_pass()
    assert not services.dispatcher._unreadable
    assert not services.aggregator._errors


def test_a_submission_beside_finished_experiments_is_noticed_within_five_seconds(services, submit):
    submit()
    for _ in range(3):
        services.one_pass(61.0)
    services.store.requests.clear()
    for _ in range(3):
        services.one_pass(0.5)
    assert not services.store.requests["folders", "experiments"]
    remove_batches(submit("new"))
    assert [shard(0), shard(1)] in [services.one_pass() for _ in range(3)]


def test_a_shard_that_ends_after_a_pause_is_counted_at_once(services, submit, monkeypatch):
    experiment_store = submit()
    services.store.delete(keys.trial_batch("done", *span(shard(1))))
    experiment_store.set_control(Control("paused"))
    assignment = f"done/{shard(1).first}-{shard(1).last}"
    monkeypatch.setattr(services.broker, "leased", lambda: {assignment: "worker"})
    for _ in range(1800):
        services.one_pass()
    commit(experiment_store, shard(1))
    monkeypatch.setattr(services.broker, "leased", dict)
    services.one_pass()
    assert not services.dispatcher._experiments["done"].view.missing
