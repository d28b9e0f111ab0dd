"""Pointer to the latest report, `report/latest.json`: small, and read without anything that draws."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from memtail.errors import StoreError
from memtail.storage import ObjectNotFound, ObjectStore, keys

#: Schema of the pointer. The file of schema 1 has no key `schema`; later schemas must have it.
SCHEMA = 1


@dataclass(frozen=True)
class ReportPointer:
    """Pointer to one version of a report.

    Attributes:
        version: folder of the version, `<trials>-<digest of the files>`.
        files: names of its files.
        page: name of the page, one of `files`.
        scores: version of the scores shown.
        studies: time at which each study shown was finished, by study.
        different: number of shards, as shown, of which two trainings differ.
    """

    version: str
    files: list[str]
    page: str
    scores: str
    studies: dict[str, str]
    different: int = 0

    @property
    def trials(self) -> str:
        """Trials of the scores, zero-padded, so that they order as text."""
        return self.version.partition("-")[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in the order of the file."""
        return asdict(self)

    def to_json(self) -> str:
        """Return the text of the file."""
        return json.dumps(self.to_dict(), indent=1)


_ADAPTER = TypeAdapter(ReportPointer)


def latest_report(store: ObjectStore, name: str) -> ReportPointer | None:
    """Read the pointer to the latest report, ignoring unknown fields.

    Returns:
        None if there is no pointer, or a damaged one, which the next report replaces.

    Raises:
        StoreError: the store cannot be read, or the pointer has a later schema.
    """
    key = keys.latest_report(name)
    try:
        fields = json.loads(store.get(key))
        schema = fields.get("schema", SCHEMA)
        if schema == SCHEMA:
            return _ADAPTER.validate_python(fields)
    except (ObjectNotFound, ValueError, AttributeError):
        return None
    raise StoreError(f"{key}: is of schema {schema}, this memtail reads {SCHEMA}: use the memtail that wrote it")
