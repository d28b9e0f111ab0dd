"""Decisions of the dispatcher, without servers."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from memtail.experiment_store import Control, missing_shards
from memtail.trials import Shard
from services.dispatcher.reconcile import Actions, View, reconcile, shards_missing

LIMITS = {"max_starts": 3, "max_queued": 100}


def view(name="a", trials=40, per_shard=4, committed=(), **parts):
    return View(name, "0" * 64, dict.fromkeys(shards_missing(trials, per_shard, set(committed))), **parts)


def decide(views, queued=(), busy=(), starts=None, **limits) -> Actions:
    return reconcile(views, list(queued), set(busy), starts or {}, **(LIMITS | limits))


def spans(assignments):
    return [(assignment.experiment, assignment.first, assignment.last) for assignment in assignments]


def test_shards_are_sent_unless_committed_dead_leased_or_queued():
    one = view(committed=[Shard(0, 3)], attempts=Counter({Shard(4, 7): 3, Shard(8, 11): 2}))
    queued, leased = one.assignment(Shard(12, 15)), one.assignment(Shard(16, 19))
    actions = decide([one], [queued], {leased.id})
    assert spans(actions.send) == [("a", first, first + 3) for first in (8, 20, 24, 28, 32, 36)]
    assert not actions.clear
    assert not actions.lost
    assert actions.dead == {"a": [Shard(4, 7)]}
    assert actions.outstanding == {"a": 8}


def test_the_last_shard_may_be_shorter():
    assert spans(decide([view(trials=6)]).send) == [("a", 0, 3), ("a", 4, 5)]


def test_no_more_are_queued_than_allowed():
    one = view(trials=4000)
    queued = [one.assignment(Shard(first, first + 3)) for first in range(0, 360, 4)]
    actions = decide([one], queued)
    assert spans(actions.send) == [("a", first, first + 3) for first in range(360, 400, 4)]


def test_urgent_experiments_go_first_and_overtake_queued_ones():
    low, high = view("low"), view("high", trials=8, control=Control(priority=1))
    queued = [low.assignment(shard) for shard in low.missing]
    actions = decide([low, high], queued)
    assert actions.clear
    assert spans(actions.send)[:3] == [("high", 0, 3), ("high", 4, 7), ("low", 0, 3)]
    again = decide([low, high], actions.send)
    assert not again.clear
    assert not again.send


def test_paused_and_cancelled_experiments_leave_the_queue():
    for state in ("paused", "cancelled"):
        stopped, going = view("stopped", control=Control(state)), view("going", trials=4)
        actions = decide([stopped, going], [stopped.assignment(Shard(0, 3))])
        assert actions.clear
        assert spans(actions.send) == [("going", 0, 3)]
        assert actions.outstanding["stopped"] == 10
    gone = decide([view("going", trials=4)], [view("gone").assignment(Shard(0, 3))])
    assert gone.clear
    assert spans(gone.send) == [("going", 0, 3)]


def test_repeatedly_lost_workers_count_as_a_failure():
    one = view(trials=8)
    first, second = (one.assignment(shard) for shard in one.missing)
    actions = decide([one], [], {second.id}, {first.id: 3, second.id: 3})
    assert spans(actions.lost) == [("a", 0, 3)]
    assert not actions.send
    assert spans(decide([one], [], set(), {first.id: 2}).send) == [("a", 0, 3), ("a", 4, 7)]


@given(
    trials=st.integers(1, 60),
    per_shard=st.integers(1, 9),
    extended=st.integers(0, 30),
    kept=st.sets(st.integers(0, 60)),
)
def test_missing_shards_equal_those_of_the_general_rule_also_after_an_extension(trials, per_shard, extended, kept):
    grid = [shard for i, shard in enumerate(missing_shards(trials, per_shard, [])) if i in kept]
    assert shards_missing(trials + extended, per_shard, set(grid)) == missing_shards(trials + extended, per_shard, grid)


def test_an_experiment_for_workers_of_another_version_leaves_the_queue_to_others():
    foreign, own = view("a-foreign", trials=400, supported=False), view("b-own")
    actions = decide([foreign, own])
    assert spans(actions.send)[:11] == [("a-foreign", first, first + 3) for first in range(0, 40, 4)] + [("b-own", 0, 3)]
    assert len(actions.send) == 20
    assert actions.outstanding == {"a-foreign": 100, "b-own": 10}
    assert not decide([foreign, own], actions.send).send
