"""Which process gets which shard, with futures in place of processes."""

from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from memtail.execution import pool
from memtail.execution.pool import Task, Workers
from memtail.execution.shard_task import ShardOutcome, ShardResult
from memtail.trials import Shard

SHARDS = [Shard(first, first) for first in range(12)]


class Pool:
    """A pool whose process does what the test says."""

    def __init__(self):
        self.work, self.ended, self.dead = [], False, False
        self._processes = {}

    def submit(self, function, task, shard):
        if self.dead:
            raise BrokenProcessPool("its process has died")
        future = Future()
        self.work.append((shard, future))
        return future

    def finish(self, *, result=None, usable=True):
        shard, future = self.work.pop(0)
        future.set_result(result or ShardResult(shard, ShardOutcome.COMMITTED, process_usable=usable))

    def die(self):
        self.dead = True
        while self.work:
            self.work.pop(0)[1].set_exception(BrokenProcessPool())

    def shutdown(self, **_):
        self.ended = True

    @property
    def shards(self):
        return [shard for shard, _ in self.work]


@pytest.fixture
def workers(monkeypatch):
    monkeypatch.setattr(Workers, "_pool", lambda self, index: Pool())
    monkeypatch.setattr(pool, "check_script", lambda pool: None)

    def start(devices):
        return Workers(Task(None, Path(), "", device=""), devices)

    return start


def fill(workers, shards):
    while shards and workers.takes(len(shards)):
        workers.start(shards.pop(0))


def held(workers):
    return [pool.shards for pool in workers._pools]


def test_a_process_of_a_cpu_has_one_shard(workers):
    processes, waiting = workers(["cpu", "cpu"]), SHARDS.copy()
    fill(processes, waiting)
    assert held(processes) == [[SHARDS[0]], [SHARDS[1]]]
    assert waiting == SHARDS[2:]


def test_a_process_of_an_accelerator_has_its_next_shards_too(workers):
    processes, waiting = workers(["cuda:0", "cuda:1"]), SHARDS.copy()
    fill(processes, waiting)
    assert held(processes) == [SHARDS[0:6:2], SHARDS[1:6:2]]
    processes._pools[1].finish()
    assert [result.shard for result in processes.finished(0)] == [SHARDS[1]]
    fill(processes, waiting)
    assert held(processes) == [SHARDS[0:6:2], [SHARDS[3], SHARDS[5], SHARDS[6]]]


def test_each_has_one_next_shard_where_there_are_few(workers):
    processes, waiting = workers(["cuda:0", "cuda:1"]), SHARDS[:5]
    fill(processes, waiting)
    assert held(processes) == [[SHARDS[0], SHARDS[2]], [SHARDS[1], SHARDS[3]]]
    processes._pools[0].finish()
    processes.finished(0)
    fill(processes, waiting)
    assert held(processes) == [[SHARDS[2], SHARDS[4]], [SHARDS[1], SHARDS[3]]]


def test_the_last_shards_go_to_whoever_is_idle_first(workers):
    processes, waiting = workers(["cuda:0", "cuda:1", "cuda:2"]), SHARDS[:5]
    fill(processes, waiting)
    assert held(processes) == [[SHARDS[0]], [SHARDS[1]], [SHARDS[2]]]
    processes._pools[2].finish()
    processes.finished(0)
    fill(processes, waiting)
    assert held(processes) == [[SHARDS[0]], [SHARDS[1]], [SHARDS[3]]]


def test_a_death_fails_the_first_shard_only(workers):
    processes = workers(["cuda:0"])
    fill(processes, SHARDS[:2])
    (first,) = processes._pools
    first.die()
    (lost,) = processes.finished(0)
    assert (lost.shard, lost.outcome, lost.attempt) == (SHARDS[0], ShardOutcome.FAILED, 0)
    assert held(processes) == [[SHARDS[1]]]
    assert processes._pools[0] is not first
    assert processes.running == [SHARDS[1]]


def test_a_shard_for_a_process_that_has_just_died_goes_to_its_successor(workers):
    processes = workers(["cuda:0"])
    processes.start(SHARDS[0])
    processes._pools[0].die()
    processes.start(SHARDS[1])
    (lost,) = processes.finished(0)
    assert (lost.shard, lost.outcome) == (SHARDS[0], ShardOutcome.FAILED)
    assert held(processes) == [[SHARDS[1]]]


def test_a_death_after_a_result_fails_the_shard_after_it(workers):
    processes = workers(["cuda:0"])
    fill(processes, SHARDS[:2])
    processes._pools[0].finish()
    processes._pools[0].die()
    results = processes.finished(0)
    assert [(result.shard, result.outcome) for result in results] == [
        (SHARDS[0], ShardOutcome.COMMITTED),
        (SHARDS[1], ShardOutcome.FAILED),
    ]
    assert not processes.running


@pytest.mark.parametrize("answered", [False, True], ids=["not begun", "refused by the process"])
def test_the_next_shard_of_an_unusable_process_goes_to_its_successor(workers, answered):
    processes = workers(["cuda:0"])
    fill(processes, SHARDS[:2])
    (first,) = processes._pools
    first.finish(usable=False)
    if answered:
        first.work.pop()[1].set_result(None)
    (result,) = processes.finished(0)
    assert result.shard == SHARDS[0]
    assert first.ended
    assert held(processes) == [[SHARDS[1]]]
    processes._pools[0].finish()
    assert [result.shard for result in processes.finished(0)] == [SHARDS[1]]


def test_an_unusable_process_trains_nothing(monkeypatch):
    class Unusable:
        usable = False

    monkeypatch.setattr(pool, "_trainers", {"cuda:9": Unusable()})
    assert pool._train(Task(None, Path(), "", device="cuda:9"), SHARDS[0]) is None


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_thousands_of_shards_are_handed_to_a_process_that_does_not_ask_for_the_next(workers, monkeypatch, device):
    class Trainer:
        usable = False

    processes = workers([device])
    monkeypatch.setattr(pool, "_trainers", {device: Trainer()})
    monkeypatch.setattr(pool, "_known", [])
    monkeypatch.setattr(pool, "_upcoming", processes._upcoming[0])
    for first in range(3000):  # a pipe holds some hundreds
        processes.start(Shard(first, first))
        processes._running.clear()
        pool._train(Task(None, Path(), "", device=device), Shard(first, first))
    assert len(pool._known) <= 1


def test_a_process_knows_which_shard_comes_then(workers, monkeypatch):
    processes = workers(["cuda:0"])
    fill(processes, SHARDS[:3])
    monkeypatch.setattr(pool, "_known", [])
    assert pool._following(SHARDS[0]) is None  # in a process without a queue
    monkeypatch.setattr(pool, "_upcoming", processes._upcoming[0])
    assert [pool._following(shard) for shard in SHARDS[:3]] == [SHARDS[1], SHARDS[2], None]
    processes.start(SHARDS[3])
    assert pool._following(SHARDS[2]) == SHARDS[3]
