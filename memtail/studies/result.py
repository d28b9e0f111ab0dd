"""What a study leaves in the store, under `experiments/<name>/studies/<study>/`: written, and read back.

* `result.json`: `study`, `title`, `findings` (sentences for people), `trials` (the trained models that it rests on), `experiments` (those
  that hold these trials), `settings` (what was asked), `measured` (the figures of the findings) and `finished` (UTC).
* `result.parquet`: everything measured, one row per setting.
* `figure.svg`, `figure.png`.

`result.json` is written last: a study without it is not there yet. Reading needs neither torch nor matplotlib.
"""

import io
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from memtail.errors import StoreError
from memtail.storage import ObjectNotFound, ObjectStore, keys

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULT = "result.json"
TABLE = "result.parquet"
FIGURE = "figure.{}"

SCHEMA = 1
# Bytes of the largest result that is read.
_MOST_BYTES = 1 << 22
_FIELDS = ("study", "title", "findings", "trials", "experiments", "settings", "measured", "finished")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class StudyResult:
    """The result of one study of an experiment, as `result.json` holds it.

    Attributes:
        store, name: where it is: the store, and the experiment.
        study: its name.
        title: what it is about, in a line.
        findings: what came out, in sentences with numbers and their errors.
        trials: how many trained models it rests on.
        experiments: the experiments that hold them.
        settings: what was asked of the study.
        measured: the figures of the findings.
        finished: when it was written, UTC, ISO 8601.
    """

    store: ObjectStore = field(repr=False)
    name: str
    study: str
    title: str
    findings: list[str]
    trials: int
    experiments: list[str]
    settings: dict[str, Any]
    measured: dict[str, Any]
    finished: str = field(default_factory=_now)

    @property
    def prefix(self) -> str:
        """The prefix of its objects' keys."""
        return keys.study(self.name, self.study)

    @property
    def of_scores(self) -> str | None:
        """The version of its experiment's scores that it rests on; None if that is not said."""
        scores = self.settings.get("scores")
        return scores.get(self.name) if isinstance(scores, dict) else scores

    def figure_svg(self) -> bytes:
        """The figure, as an SVG file. Raises: ObjectNotFound, StoreError."""
        return self.store.get(self.prefix + FIGURE.format("svg"))

    def table(self) -> dict[str, Any]:
        """The columns of `result.parquet`. Raises: ObjectNotFound, StoreError."""
        import pyarrow as pa
        import pyarrow.parquet

        key = self.prefix + TABLE
        try:
            columns = pyarrow.parquet.read_table(io.BytesIO(self.store.get(key))).to_pydict()
        except pa.ArrowException as error:
            raise StoreError(f"{key}: is damaged ({error}): run the study again") from None
        return dict(columns)

    def to_json(self) -> dict[str, Any]:
        """The content of `result.json`."""
        return {"schema": SCHEMA, **{each: getattr(self, each) for each in _FIELDS}}


def load_results(store: ObjectStore, name: str) -> list[StudyResult]:
    """The results of all studies of an experiment, by the studies' names.

    Raises:
        StoreError: the store cannot be read, or a result is damaged (says which).
    """
    found = []
    for study in store.folders(keys.studies(name)):
        key = keys.study(name, study) + RESULT
        try:
            found.append(_read(store, name, key))
        except ObjectNotFound:  # it is being written
            continue
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{key}: is damaged ({error}): remove it, then run the study again") from None
    return found


def _read(store: ObjectStore, name: str, key: str) -> StudyResult:
    fields = json.loads(store.get(key, limit=_MOST_BYTES))
    if (schema := fields.pop("schema")) != SCHEMA:
        raise StoreError(f"{key}: is of schema {schema}, this memtail reads {SCHEMA}: use the memtail that wrote it")
    return StudyResult(**fields, store=store, name=name)


def write_result(result: StudyResult, table: dict[str, Any], figure: "Figure") -> None:
    """Write a result into its store, in place of an earlier one.

    Args:
        result: what `result.json` is to hold.
        table: the columns of `result.parquet`, each of as many rows.
        figure: as drawn.

    Raises:
        StoreError: the store cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet

    from memtail.figures.style import encoded

    columns = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(table), columns)
    result.store.put(result.prefix + TABLE, columns.getvalue())
    for kind, drawn in encoded(figure).items():
        result.store.put(result.prefix + FIGURE.format(kind), drawn)
    result.store.put(result.prefix + RESULT, json.dumps(result.to_json(), indent=1).encode())
