"""Learning-rate schedules by name: the factor by which the optimizer's learning rate is multiplied at a step.

A further schedule is an entry here and a class in `memtail.spec`, since its constants are declared and validated there.
"""

import math
from collections.abc import Callable
from typing import Any

from memtail.spec import Constant, Cosine, Linear, ScheduleSpec, Step


def learning_rate_factor(schedule: ScheduleSpec, step: int, steps: int) -> float:
    """Return the factor of the learning rate at `step` (from 0) of `steps`; 1 at the peak.

    During the first `warmup` (a fraction) of all steps it rises linearly to 1; the rest is the schedule's.
    """
    warmup = schedule.warmup * steps
    if step + 1 < warmup:
        return (step + 1) / warmup
    done = (step - max(warmup - 1, 0)) / max(steps - max(warmup - 1, 0), 1)
    return _SCHEDULES[schedule.name](schedule, step, steps, done)


def _constant(schedule: Constant, step: int, steps: int, done: float) -> float:
    return 1.0


def _step(schedule: Step, step: int, steps: int, done: float) -> float:
    return schedule.gamma ** sum(step >= milestone * steps for milestone in schedule.milestones)


def _cosine(schedule: Cosine, step: int, steps: int, done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _linear(schedule: Linear, step: int, steps: int, done: float) -> float:
    return 1 - done


# Each takes its own class of `memtail.spec`, the step, the number of steps, and the share of the steps after the warm-up that is done.
_SCHEDULES: dict[str, Callable[[Any, int, int, float], float]] = {
    "constant": _constant,
    "step": _step,
    "cosine": _cosine,
    "linear": _linear,
}
