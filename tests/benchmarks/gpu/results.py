"""Lines of a run, each written at once, and the table that is made of them."""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu.card import Card, Floor

LINES = "results.jsonl"
TABLE = "results.md"


@dataclass(frozen=True)
class Figure:
    """A figure of a row.

    Attributes:
        what: what was measured.
        value: the figure, in `unit`.
        unit: of value and floor.
        floor: floor of the work, where it has one.
        goal: what was to be reached.
        note: what else is to be known, such as accuracies.
    """

    what: str
    value: float
    unit: str = "s"
    floor: Floor | None = None
    goal: str = ""
    note: str = ""


class Results:
    """Lines of JSON in a folder, and the table beside them. Every line is on disk when its method returns.

    Args:
        folder: created if it is missing; lines of an earlier run are replaced.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._began, self.lines = folder, time.monotonic(), list[dict[str, Any]]()
        (folder / LINES).write_text("")

    def card(self, card: Card) -> None:
        """Write what is known of the card."""
        self._write({"row": "card", **asdict(card)})

    def figure(self, row: str, figure: Figure) -> None:
        """Write a figure, with its ratio to the floor."""
        line: dict[str, Any] = {"row": row, "what": figure.what, "value": figure.value, "unit": figure.unit}
        if figure.floor:
            line |= {"floor": asdict(figure.floor), "of_floor": figure.value / figure.floor.seconds}
        self._write(line | {"goal": figure.goal, "note": figure.note})

    def ended(self, row: str, seconds: float, error: str | None) -> None:
        """Write that a row has ended, by an error or not."""
        self._write({"row": row, "row_seconds": round(seconds, 1), "error": error})

    def _write(self, line: dict[str, Any]) -> None:
        line["at"] = round(time.monotonic() - self._began, 1)
        self.lines.append(line)
        with (self._folder / LINES).open("a") as file:
            file.write(json.dumps(line) + "\n")
        (self._folder / TABLE).write_text(table(self.lines))


def read(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a run, also of one that was cut off within a line."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def table(lines: Iterable[dict[str, Any]]) -> str:
    """Return the Markdown table of a run, complete or not."""
    head, rows, failed = [], [], []
    for line in lines:
        if line["row"] == "card":
            measured = ", ".join(f"{name} {value}" for name, value in line["measured"].items())
            ceilings = f"{line['bytes_per_second'] / 1e12:.3g} TB/s, {line['operations_per_second'] / 1e12:.3g} TFLOP/s in bfloat16"
            head.append(f"{line['name']}, {line['software']}. Ceilings: {ceilings}; measured: {measured}.\n")
        elif "what" in line:
            floor = line.get("floor")
            shown = f"{floor['by_operations']:.3g} FLOP, {floor['by_bytes']:.3g} bytes" if floor else ""
            ratio = f"{line['of_floor']:.3g}" if floor else ""
            value = f"{line['value']:.4g} {line['unit']}".strip()
            rows.append(f"| {line['row']} | {line['what']} | {value} | {shown} | {ratio} | {line['goal']} | {line['note']} |")
        elif line.get("error"):
            failed.append(f"* {line['row']}, after {line['row_seconds']} s: {line['error']}")
    columns = ["| row | measured | value | floor | times the floor | goal | note |", "|---|---|---|---|---|---|---|"]
    return "\n".join([*head, *columns, *rows, *(["", "Failed:", "", *failed] if failed else [])]) + "\n"
