"""The record of an experiment's end, `finished.json`: all its trials are in the published scores.

Before it exists, the trial batches in the store decide what is trained. Afterwards a batch that is missing was removed on purpose, by a
lifecycle rule or to free space, and changes nothing.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Self

from pydantic import Field, TypeAdapter, ValidationError

from memtail.errors import ForeignObjectError
from memtail.spec import Experiment
from memtail.trials import Shard

SCHEMA = 1


def bounds(experiment: Experiment) -> dict[str, Any] | None:
    """Return `subsets.until` as JSON, None without; bounds that are not declared are left out."""
    until = experiment.subsets.until
    return None if until is None else until.model_dump(mode="json", exclude_defaults=True)


@dataclass(frozen=True)
class Finished:
    """The end of an experiment.

    Attributes:
        fingerprint: of the experiment.
        trials: number of trials in the scores, diverged ones included: all that were declared.
        digest: SHA-256 (hex) of the counted bits.
        version: of the published scores.
        score_schema: schema of the published scores.
        discards: number of records of discards before its trial batches were listed.
        when: time in UTC, ISO 8601.
        batches: the tag of each trial batch that counts, by FIRST-LAST.
        verify: the share of the shards that was to be verified; 1 in a record that does not say.
        until: the bounds `subsets.until` at which it ended, None without; empty in a record that does not say.
        archived: time at which the trial batches were removed by `memtail archive`; None if they were not.
    """

    fingerprint: str
    trials: int
    digest: str
    version: str
    score_schema: int
    discards: int
    when: str
    batches: dict[Annotated[str, Field(pattern=r"^\d+-\d+$")], str]
    verify: float = 1.0
    until: dict[str, Any] | None = field(default_factory=dict)
    archived: str | None = None

    def holds_for(self, experiment: Experiment) -> bool:
        """Return whether an experiment as it is declared now has ended: with as many trials and verified shards, and at these bounds."""
        until = bounds(experiment)
        enough = self.trials >= experiment.subsets.trials and self.verify >= experiment.execution.verify
        return enough and (until is None or self.until in (until, {}))

    @property
    def shards(self) -> list[Shard]:
        """The shards of the batches that count."""
        return [Shard(*map(int, span.split("-"))) for span in self.batches]

    def to_bytes(self) -> bytes:
        """The content as JSON."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> Self:
        """Read the content; unknown keys are ignored. Raises: ForeignObjectError: it is damaged, or of another schema."""
        try:
            content = json.loads(data)
            if content["schema"] != SCHEMA:
                raise ForeignObjectError(f"{source}: has schema {content['schema']}, this memtail reads {SCHEMA}")
            return TypeAdapter(cls).validate_python(content)
        except (ValidationError, ValueError, KeyError, TypeError):
            raise ForeignObjectError(f"{source}: is damaged") from None
