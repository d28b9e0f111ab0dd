"""The pointer to the published scores, `scores/latest.json`: small, and read without the modules that read and write scores."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from memtail.scores.summary import ScoreSummary
from memtail.storage import ObjectNotFound, ObjectStore, keys

#: Versions kept: the current one, and the previous one for readers that have begun to read it.
KEPT_VERSIONS = 2


@dataclass(frozen=True)
class ScorePointer:
    """The content of `latest.json`. Its schema is that of its summary.

    Attributes:
        version: of the scores; versions sort by number of trials.
        published: ISO 8601, UTC.
        files: names of the version's files, ascending.
        summary: of the version.
        discards: number of records of discards before its trial batches were listed.
    """

    version: str
    published: str
    files: tuple[str, ...]
    summary: ScoreSummary
    discards: int = 0

    @property
    def order(self) -> tuple[int, int]:
        """Sorts pointers of one experiment: the one of more discards, then of more trials, is the later one."""
        return self.discards, self.summary.accumulated_trials

    def only(self, files: Iterable[str]) -> Self:
        """Return this pointer with those of some files that the version has."""
        return replace(self, files=tuple(file for file in files if file in self.files))

    def to_dict(self) -> dict[str, Any]:
        """The values in the order of the file, for `json.dumps`; without discards as 0.1.0 writes them."""
        content = {**asdict(self), "summary": self.summary.to_dict()}
        if not self.discards:
            del content["discards"]
        return content

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read the file's text; unknown keys are ignored.

        Raises:
            ValueError, KeyError, TypeError: the text is not a pointer.
        """
        content = json.loads(text)
        summary = ScoreSummary.from_dict(content["summary"])
        return cls(content["version"], content["published"], tuple(content["files"]), summary, content.get("discards", 0))


def latest_version(store: ObjectStore, name: str) -> ScorePointer | None:
    """The pointer to an experiment's latest scores; None if there is none, or a damaged one, which the next publication replaces.

    Raises:
        StoreError: the store cannot be read.
    """
    try:
        return ScorePointer.from_json(store.get(keys.latest_scores(name)))
    except (ObjectNotFound, ValueError, KeyError, TypeError):
        return None


def superseded(versions: Iterable[str], current: str) -> list[str]:
    """List the versions to remove: those before the current one, without the latest `KEPT_VERSIONS` - 1 of them."""
    earlier = sorted(version for version in versions if version < current)
    return earlier[: max(0, len(earlier) - KEPT_VERSIONS + 1)]
