"""The pointer to the published scores, `scores/latest.json`: small, and read without what reads and writes scores."""

import json
from typing import Any

from memtail.storage import ObjectNotFound, ObjectStore, keys

#: Versions kept: the one that the pointer names, and the one of fewer trials before it, which a reader may have begun to read.
KEPT_VERSIONS = 2


def latest_version(store: ObjectStore, name: str) -> dict[str, Any] | None:
    """The pointer: `version`, `published` (UTC), `files`, `summary`; None if nothing was published."""
    try:
        pointer: dict[str, Any] = json.loads(store.get(keys.latest_scores(name)))
        return pointer if {"version", "published", "files", "summary"} <= pointer.keys() else None
    except (ObjectNotFound, ValueError, AttributeError):
        return None  # not there, or damaged: the next publish writes it


def accumulated_trials(summary: dict[str, Any]) -> int:
    """The trials that scores are of, diverged ones included, by their summary."""
    return int(summary["trials"]) + int(summary["diverged"])
