"""Decisions of the dispatcher, without servers."""

from collections import Counter

import pytest
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


def test_a_shard_that_failed_recently_waits_and_stays_outstanding():
    actions = decide([view(trials=8, attempts=Counter({Shard(0, 3): 1}), resting={Shard(0, 3)})])
    assert spans(actions.send) == [("a", 4, 7)]
    assert actions.outstanding == {"a": 2}


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


def test_experiments_of_equal_priority_take_turns():
    large, small = view("a-large", trials=4000), view("b-small", trials=20)
    sent = decide([large, small]).send
    assert [assignment.experiment for assignment in sent[:10]] == ["a-large", "b-small"] * 5
    assert spans(sent)[10:12] == [("a-large", 20, 23), ("a-large", 24, 27)]


def test_an_experiment_without_queued_shards_is_queued_among_those_of_others():
    large, small = view("a-large", trials=4000), view("b-small", trials=200)
    full = decide([large]).send
    actions = decide([large, small], full)
    assert actions.clear
    assert Counter(assignment.experiment for assignment in actions.send) == {"a-large": 50, "b-small": 50}
    assert not decide([large, small], actions.send).clear
    # the rest of its shards waits for room
    assert not decide([large, small], actions.send[4:]).clear


def test_of_a_hundred_workers_those_that_become_free_serve_a_small_experiment_within_the_first_two_hundred():
    """100,000 shards are queued and 100 in training when an experiment of 50 is submitted."""
    large, small = view("a", trials=400_000), view("b", trials=200)
    queued = decide([large], max_queued=2000).send
    busy, queued = {assignment.id for assignment in queued[:100]}, queued[100:]
    actions = decide([large, small], queued, busy, max_queued=2000)
    assert actions.clear
    assert sum(assignment.experiment == "b" for assignment in actions.send[:200]) == 50


def test_a_small_experiment_starts_within_the_next_two_hundred_shards_of_a_hundred_workers():
    """Passes and workers in turns: in each pass 20 of the 100 workers become free and take messages."""
    large, small = view("a", trials=400_000), view("b", trials=200)
    queued, training, started = decide([large], max_queued=2000).send, [], []
    training, queued = queued[:100], queued[100:]
    while len(started) < 200:
        for done in training[:20]:
            del (large if done.experiment == "a" else small).missing[done.shard]
        training = training[20:]
        actions = decide([large, small], queued, {each.id for each in training}, max_queued=2000)
        queued = actions.send if actions.clear else queued + actions.send
        taken, queued = queued[:20], queued[20:]
        training += taken
        started += taken
    assert sum(assignment.experiment == "b" for assignment in started) == 50


@pytest.mark.parametrize("experiments", [3, 30])
def test_experiments_of_equal_priority_get_equal_numbers_of_starts_whenever_they_come(experiments):
    views, queued, started = [], [], Counter()
    for number in range(experiments):
        views.append(view(f"e-{number:02}", trials=4000))
        actions = decide(views, queued)
        queued = actions.send if actions.clear else queued + actions.send
    for _ in range(10):
        taken, queued = queued[:90], queued[90:]
        started.update(assignment.experiment for assignment in taken)
        for assignment in taken:
            del next(each for each in views if each.name == assignment.experiment).missing[assignment.shard]
        actions = decide(views, queued)
        queued = actions.send if actions.clear else queued + actions.send
    assert max(started.values()) - min(started.values()) <= 0.2 * 900 / experiments
    assert len(started) == experiments


def test_of_more_experiments_than_the_queue_holds_each_gets_its_turn():
    views, queued, started = [view(f"e-{number:03}", trials=4000) for number in range(150)], [], Counter()
    for now in range(60):
        actions = decide(views, queued)
        queued = actions.send if actions.clear else queued + actions.send
        taken, queued = queued[:10], queued[10:]
        for assignment in taken:
            served = next(each for each in views if each.name == assignment.experiment)
            served.served_at = now
            del served.missing[assignment.shard]
            started[assignment.experiment] += 1
    assert set(started.values()) == {4}
    assert len(started) == 150


def test_second_trainings_come_last_and_only_where_there_is_room():
    high = view("high", trials=8, committed=[Shard(0, 3)], control=Control(priority=1), unverified=[Shard(0, 3)])
    low = view("low", trials=4)
    actions = decide([low, high])
    assert spans(actions.send) == [("high", 4, 7), ("low", 0, 3), ("high", 0, 3)]
    assert actions.outstanding == {"high": 1, "low": 1}
    assert spans(decide([low, high], max_queued=2).send) == [("high", 4, 7), ("low", 0, 3)]
    assert not decide([low, high], actions.send).send
    assert not decide([low, high], actions.send).clear
    rest = decide([low, high], [low.assignment(Shard(0, 3))], {high.assignment(Shard(4, 7)).id})
    assert spans(rest.send) == [("high", 0, 3)]
    assert not rest.clear


def test_a_second_training_that_is_leased_paused_dead_or_lost_is_not_sent():
    parts = {"trials": 4, "committed": [Shard(0, 3)], "unverified": [Shard(0, 3)]}
    one = view(**parts)
    id_ = one.assignment(Shard(0, 3)).id
    assert decide([one]).send
    assert not decide([one], busy={id_}).send
    assert decide([one], starts={id_: LIMITS["max_starts"]}) == Actions([], False, [], {"a": 0}, {"a": []})
    assert not decide([view(attempts=Counter({Shard(0, 3): 3}), **parts)]).send
    assert not decide([view(control=Control("paused"), **parts)]).send


def test_the_queue_is_not_cleared_for_an_experiment_that_has_no_room_in_it():
    urgent, one, other = view("urgent", trials=4 * 99, control=Control(priority=1)), view("one"), view("other")
    sent = decide([urgent, one, other]).send
    assert [assignment.experiment for assignment in sent[98:]] == ["urgent", "one"]
    assert not decide([urgent, one, other], sent).clear


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
    assert Counter(assignment.experiment for assignment in actions.send) == {"a-foreign": 10, "b-own": 10}
    assert len(actions.send) == 20
    assert actions.outstanding == {"a-foreign": 100, "b-own": 10}
    assert not decide([foreign, own], actions.send).send
