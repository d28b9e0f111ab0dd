"""What memtail does on one GPU: all measurements in one run of less than eight minutes, without a network.

    make bench-gpu                                        results in gpu-results/
    make bench-gpu WHEELS=wheels                          on a machine without an installation: see tests/benchmarks/README.md
    make bench-gpu ARGS="resnet9 digits"                  some rows, on the card of device 0
    python -m tests.benchmarks.gpu --dry-run              every row at the smallest size, on the CPU
    python -m tests.benchmarks.gpu --table results.jsonl  the table of an earlier run, also of one that was cut off

Each figure is written at once to results.jsonl, and the table to results.md. The exit code is 1 if a row failed.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from tests.benchmarks.gpu import counts, experiments, networks
from tests.benchmarks.gpu.results import TABLE, Results, read, table
from tests.benchmarks.gpu.runner import Bench, Row, card_of, run_rows

# In the order of their worth; the sum of their seconds is that of the whole run.
ROWS = [
    Row("start", 20, experiments.start),
    Row("tests", 45, counts.tests),
    Row("mnist", 75, experiments.mnist),
    Row("resnet9", 105, networks.resnet9),
    Row("convnet8", 50, networks.convnet8),
    Row("resnet50", 60, networks.resnet50),
    Row("digits", 15, experiments.digits),
    Row("influence", 20, counts.influence),
    Row("forecast", 20, experiments.forecast),
    Row("stacks", 20, networks.stacks),
    Row("computation", 30, experiments.computation),
]
# A processor is slower than a GPU even at the smallest sizes.
_DRY_RUN_FACTOR = 5


def main() -> int:
    """Measure the rows and print the table."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks.gpu", description="Measurements of memtail on one GPU.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(row.name for row in ROWS)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="every row at the smallest size, on the CPU")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the table of an earlier run")
    options = parser.parse_args()
    if options.table:
        print(table(read(options.table)), end="")
        return 0
    names = [row.name for row in ROWS]
    if unknown := [name for name in options.rows if name not in names]:
        parser.error(f"there is no row {', '.join(unknown)}: rows are {', '.join(names)}")
    rows = [row for row in ROWS if row.name in (options.rows or names)]
    if options.dry_run:
        rows = [replace(row, seconds=row.seconds * _DRY_RUN_FACTOR) for row in rows]
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        card = card_of("cpu" if options.dry_run else "cuda:0", options.out)
    except RuntimeError as error:
        print(
            f"tests.benchmarks.gpu: no CUDA device can be used ({error}): run it on a machine with a GPU, or with --dry-run",
            file=sys.stderr,
        )
        return 1
    with tempfile.TemporaryDirectory(prefix="memtail-gpu-") as folder:
        results = Results(options.out)
        results.card(card)
        complete = run_rows(rows, Bench(card, Path(folder), options.dry_run), results, options.out)
    print((options.out / TABLE).read_text(), end="")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
