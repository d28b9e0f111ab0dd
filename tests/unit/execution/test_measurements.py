"""What is measured of a run before it."""

import pytest

from memtail.datasets import prepare
from memtail.execution.measurements import _as_compiled


@pytest.mark.parametrize(
    ("epochs", "execution", "compiled"),
    [(1, {}, "auto"), (10**9, {}, True), (10**9, {"compile": False}, False), (1, {"compile": True}, True)],
)
def test_a_network_is_compiled_in_a_short_training_if_it_is_in_the_whole_one(declare, epochs, execution, compiled):
    experiment = declare(training={"epochs": epochs}, execution=execution)
    assert _as_compiled(experiment, prepare(experiment.dataset)).execution.compile == compiled
