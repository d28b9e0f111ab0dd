"""Benchmarks: each row measures memtail and a baseline alternately in one run.

    make bench            all rows
    make bench ROW=digits-mlp
    make bench ROW=list

Times are medians over the repetitions, with the smallest and largest; ratios are the baseline's median over ours. Training rows carry
the median accuracies of both sides. memtail trains in warm processes, one per core with one thread each; baselines use torch with as many
threads as there are cores.
"""

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).with_name("results.json")


@dataclass
class Row:
    """One line of the table. Times are in seconds per `unit`; `ours` and `baseline` hold one figure per repetition."""

    name: str
    unit: str
    target: str
    ours: list[float]
    baseline: list[float] = field(default_factory=list)
    baseline_name: str = ""
    peak_mib: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Speed-up: median time of the baseline over that of memtail."""
        return statistics.median(self.baseline) / statistics.median(self.ours) if self.baseline else None


def machine() -> str:
    """Return the processor, and the number of cores used."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores"


def show(rows: list[Row]) -> None:
    """Print the table."""
    table = Table(title=machine(), title_justify="left")
    for column in ("row", "ours", "baseline", "ratio", "target", "peak MiB", "note"):
        table.add_column(column, overflow="fold")
    for row in rows:
        ratio = f"{row.ratio:.2f}x {row.baseline_name}" if row.ratio else "-"
        peak = f"{row.peak_mib:.0f}" if row.peak_mib is not None else "-"
        table.add_row(row.name, _spread(row.ours, row.unit), _spread(row.baseline, row.unit), ratio, row.target, peak, row.note)
    Console(width=180).print(table)


def _spread(times: list[float], unit: str) -> str:
    if not times:
        return "-"
    scale, name = (1.0, "s") if statistics.median(times) >= 1 else (1e3, "ms")
    low, middle, high = (value * scale for value in (min(times), statistics.median(times), max(times)))
    return f"{middle:.3g} {name}/{unit} ({low:.3g} to {high:.3g})"


def main(wanted: str) -> None:
    """Measure the rows whose names start with `wanted`; all if it is empty."""
    from tests.benchmarks import confining, counting, coverage, dispatching, exploring, restarting, serving, stability, starting, training

    benches: dict[str, Callable[[], list[Row]]] = {
        **training.ROWS,
        **counting.ROWS,
        **starting.ROWS,
        **dispatching.ROWS,
        **serving.ROWS,
        **exploring.ROWS,
        **restarting.ROWS,
        **confining.ROWS,
        **coverage.ROWS,
        **stability.ROWS,
    }
    if wanted == "list":
        print("\n".join(benches))
        return
    chosen = {name: bench for name, bench in benches.items() if name.startswith(wanted)}
    if not chosen:
        sys.exit(f"there is no row '{wanted}': {', '.join(benches)}")
    rows: list[Row] = []
    for name, bench in chosen.items():
        print(f"measuring {name}", file=sys.stderr, flush=True)
        rows += bench()
    show(rows)
    results: dict[str, Any] = {"machine": machine(), "rows": [{**asdict(row), "ratio": row.ratio} for row in rows]}
    RESULTS.write_text(json.dumps(results, indent=1))
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
