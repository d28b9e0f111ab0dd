"""Learning rate at a step, for each schedule."""

import math
from typing import assert_never

from memtail.spec import Constant, Cosine, Linear, ScheduleSpec, Step


def learning_rate_factor(schedule: ScheduleSpec, step: int, steps: int) -> float:
    """What the optimizer's learning rate is multiplied by at `step` (from 0) of `steps`; 1 at the peak.

    During the first `warmup` of all steps it rises linearly to 1; what follows is the schedule's own.
    """
    warmup = schedule.warmup * steps
    if step + 1 < warmup:
        return (step + 1) / warmup
    done = (step - max(warmup - 1, 0)) / max(steps - max(warmup - 1, 0), 1)
    match schedule:
        case Constant():
            return 1.0
        case Step():
            return schedule.gamma ** sum(step >= milestone * steps for milestone in schedule.milestones)
        case Cosine():
            return 0.5 * (1 + math.cos(math.pi * done))
        case Linear():
            return 1 - done
        case _:
            assert_never(schedule)
