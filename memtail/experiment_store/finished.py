"""The record of an experiment's end, `finished.json`: all its trials are in the published scores.

Before it exists, the trial batches in the store decide what is trained. Afterwards a batch that is missing was removed on purpose, by a
lifecycle rule or to free space, and changes nothing.
"""

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Self

from pydantic import Field, TypeAdapter, ValidationError

from memtail.errors import ForeignObjectError
from memtail.trials import Shard

SCHEMA = 1


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
    archived: str | None = None

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
