"""Seconds of training by phase."""

import time

import pytest
import torch

from memtail.trainers.images.profiling import Phases


def test_the_seconds_of_a_phase_are_summed():
    phases = Phases(torch.device("cpu"))
    for phase in ("data", "evaluation", "data"):
        with phases.measure(phase):
            time.sleep(0.02)
    seconds = phases.seconds()
    assert list(seconds) == ["data", "evaluation"]
    assert 0.04 <= seconds["data"] < 2
    assert 0.02 <= seconds["evaluation"] < 1


class Device:
    """A queue of work, with a clock of its own, which works only when it is waited for or told to."""

    def __init__(self, monkeypatch):
        self.now, self.queue, self.waits = 0.0, [], 0
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))

    def work(self, *, items=10**9):
        for _ in range(min(items, len(self.queue))):
            self.queue.pop(0)()

    def compute(self, seconds):
        self.queue.append(lambda: setattr(self, "now", self.now + seconds))


class Event:
    def __init__(self, device):
        self.device, self.at = device, None

    def record(self, stream):
        assert stream is self.device
        stream.queue.append(lambda: setattr(self, "at", self.device.now))

    def query(self):
        return self.at is not None

    def synchronize(self):
        if not self.query():
            self.device.waits += 1
            self.device.work()

    def elapsed_time(self, stop):
        return 1000 * (stop.at - self.at)


@pytest.mark.parametrize("finished", [0, 7, 10**9], ids=["nothing done meanwhile", "some", "everything"])
def test_a_cuda_device_measures_its_own_work_and_waits_for_no_measurement(monkeypatch, finished):
    device = Device(monkeypatch)
    phases = Phases(torch.device("cuda:1"))
    for _ in range(3):
        device.compute(5)  # of no phase
        for phase, seconds in (("data", 1), ("forward/backward", 2)):
            with phases.measure(phase):
                device.compute(seconds)
        device.work(items=finished)
        assert device.waits == 0
    assert phases.seconds() == {"data": 3, "forward/backward": 6}
    assert device.waits <= 1
    assert not phases._queued
