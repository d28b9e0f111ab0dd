"""Jobs of experiments that are missing from the bucket."""

from services.dispatcher.absence import PATIENCE, Absences
from services.dispatcher.worker_sets import Changes, WorkerSet


def job(name, running, workers=None, winding_down=False):
    return WorkerSet(f"{name}-1", name, 1, workers or running, running, winding_down)


class Passes:
    """Passes of a dispatcher, a minute apart."""

    def __init__(self, sets, elastic=True):
        self.now, self.sets, self.elastic = 0.0, {each.name: each for each in sets}, elastic
        self.absences = Absences(lambda: self.now)

    def run(self, *listed, minutes=1):
        """Run passes, apply their changes, and return the last one's."""
        for _ in range(minutes):
            changes = Changes()
            self.missing = self.absences.remove(self.sets.values(), set(listed), self.elastic, changes)
            for name in changes.delete:
                del self.sets[name]
            for name, workers in changes.shrink.items():
                self.sets[name] = job(name.removesuffix("-1"), workers)
            self.now += 60
        return changes


MINUTES = int(PATIENCE // 60)


def test_busy_workers_of_a_removed_experiment_are_deleted_late_and_a_few_at_a_time():
    passes = Passes([job("a", 40), job("b", 60)])
    passes.run("a", "b")
    assert passes.run("b", minutes=MINUTES) == Changes()
    assert passes.missing == 40
    assert passes.run("b") == Changes(shrink={"a-1": 30})
    assert passes.run("b", minutes=3) == Changes(shrink={"a-1": 6})
    assert passes.run("b") == Changes(delete=["a-1"])
    assert passes.run("b") == Changes()
    assert passes.missing == 0


def test_an_empty_listing_deletes_no_busy_workers():
    passes = Passes([job("a", 500), job("b", 500), job("c", 0, 5)])
    passes.run("a", "b", "c")
    assert passes.run(minutes=MINUTES + 1) == Changes(delete=["c-1"])
    assert passes.run(minutes=1000) == Changes()


def test_a_dispatcher_that_starts_with_another_bucket_deletes_no_busy_workers():
    passes = Passes([job("a", 500), job("b", 500)])
    assert passes.run("others", minutes=1000) == Changes()
    assert passes.missing == 1000


def test_an_experiment_that_comes_back_in_time_keeps_its_workers():
    passes = Passes([job("a", 40), job("b", 60)])
    passes.run("a", "b")
    for _ in range(5):
        assert passes.run("b", minutes=MINUTES) == Changes()
        passes.run("a", "b")


def test_jobs_that_cannot_be_reduced_are_deleted_whole_or_end_by_themselves():
    suspended = Passes([job("a", 40), job("b", 50), job("c", 10)], elastic=False)
    suspended.run("a", "b", "c")
    assert suspended.run("b", minutes=MINUTES) == Changes()
    assert suspended.run("b") == Changes(delete=["c-1"])  # a tenth
    assert suspended.run("b", minutes=4) == Changes()  # then a tenth of 90 per minute
    assert suspended.run("b") == Changes(delete=["a-1"])
    ending = Passes([job("a", 40, winding_down=True), job("b", 60)])
    ending.run("a", "b")
    assert ending.run("b", minutes=100) == Changes()
