"""The breaker of an experiment: where its first shards all fail alike, the cause is not in them, and the others would fail too."""

import re
from collections import Counter
from collections.abc import Iterable

#: Number of shards that must have failed alike before any is committed.
BREAKER_SHARDS = 5


def common_error(errors: Iterable[str], shards: int) -> str | None:
    """Return the error with which at least `shards` shards failed; None if there is none.

    Args:
        errors: the error of each failed shard, one line. Errors that differ only in numbers are alike.
        shards: number of shards.
    """
    errors = list(errors)
    alike = Counter(_without_numbers(error) for error in errors)
    return next((error for error in errors if alike[_without_numbers(error)] >= shards), None)


def _without_numbers(error: str) -> str:
    return re.sub(r"\d+", "#", error)
