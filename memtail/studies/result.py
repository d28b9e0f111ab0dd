"""Result of a study in the store, under `experiments/<name>/studies/<study>/`.

* `result.json`: the fields of `StudyResult`, without the store and the name.
* `result.parquet`: all measurements, one row per setting.
* `figure.svg`, `figure.png`.

`result.json` is written last: a folder without it holds no result yet. Reading a result imports neither torch nor matplotlib.
"""

import io
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from memtail.errors import StoreError
from memtail.experiment_store import ExperimentStore
from memtail.scores.pointer import latest_version
from memtail.scores.summary import ScoreSummary
from memtail.storage import ObjectNotFound, ObjectStore, keys

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULT = "result.json"
TABLE = "result.parquet"
FIGURE = "figure.{}"

SCHEMA = 1
# Largest result read, in bytes.
_MOST_BYTES = 1 << 22
_FIELDS = ("study", "title", "findings", "trials", "experiments", "settings", "measured", "finished")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class StudyResult:
    """Result of one study of an experiment.

    Attributes:
        store, name: the store and the experiment that hold the result.
        study: name of the result's folder.
        title: title, one line.
        findings: sentences with the measured numbers and their errors.
        trials: number of trained models that the result rests on.
        experiments: the experiments that trained them.
        settings: arguments of the study, and the version of the scores as `scores`.
        measured: the numbers of the findings.
        finished: time of the result, UTC, ISO 8601.
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
        """Prefix of the keys of its objects."""
        return keys.study(self.name, self.study)

    @property
    def of_scores(self) -> str | None:
        """Version of its experiment's scores that it rests on; None if not recorded."""
        scores = self.settings.get("scores")
        return scores.get(self.name) if isinstance(scores, dict) else scores

    def of_few_trials(self) -> list[ScoreSummary]:
        """Read the summaries of the scores that it rests on, of those experiments whose scores are of few trials. Raises: StoreError."""
        scores = self.settings.get("scores")
        pointers = [latest_version(self.store, name) for name in (scores if isinstance(scores, dict) else [self.name])]
        return [pointer.summary for pointer in pointers if pointer and pointer.summary.few_trials]

    def figure_svg(self) -> bytes:
        """Read the figure as an SVG file. Raises: ObjectNotFound, StoreError."""
        return self.store.get(self.prefix + FIGURE.format("svg"))

    def table(self) -> dict[str, Any]:
        """Read the columns of `result.parquet`. Raises: ObjectNotFound, StoreError."""
        import pyarrow as pa
        import pyarrow.parquet

        key = self.prefix + TABLE
        try:
            columns = pyarrow.parquet.read_table(io.BytesIO(self.store.get(key))).to_pydict()
        except pa.ArrowException as error:
            raise StoreError(f"{key}: is damaged ({error}): run the study again") from None
        return dict(columns)

    def to_json(self) -> dict[str, Any]:
        """Return the fields of `result.json`."""
        return {"schema": SCHEMA, **{each: getattr(self, each) for each in _FIELDS}}


def load_results(store: ObjectStore, name: str) -> list[StudyResult]:
    """Read the results of all studies of an experiment, in the order of their names.

    Raises:
        StoreError: the store cannot be read, or a result is damaged (the message names it).
    """
    results = []
    for study in store.folders(keys.studies(name)):
        key = keys.study(name, study) + RESULT
        try:
            results.append(_read(store, name, key))
        except ObjectNotFound:  # still being written
            continue
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{key}: is damaged ({error}): remove it, then run the study again") from None
    return results


def _read(store: ObjectStore, name: str, key: str) -> StudyResult:
    fields = json.loads(store.get(key, limit=_MOST_BYTES))
    if (schema := fields.pop("schema")) != SCHEMA:
        raise StoreError(f"{key}: is of schema {schema}, this memtail reads {SCHEMA}: use the memtail that wrote it")
    return StudyResult(**fields, store=store, name=name)


def write_result(result: StudyResult, table: dict[str, Any], figure: "Figure") -> None:
    """Write a result to its store, replacing an earlier one.

    Args:
        result: content of `result.json`.
        table: columns of `result.parquet`, of equal length.
        figure: the drawn figure.

    Raises:
        StoreError: the store cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet

    from memtail.figures.style import encoded

    columns = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(table), columns)
    result.store.put(result.prefix + TABLE, columns.getvalue())
    for kind, data in encoded(figure).items():
        result.store.put(result.prefix + FIGURE.format(kind), data)
    result.store.put(result.prefix + RESULT, json.dumps(result.to_json(), indent=1).encode())
    if result.store.exists(keys.finished(result.name)):
        ExperimentStore(result.store, result.name).mark_changed()  # the aggregator then draws the report again
