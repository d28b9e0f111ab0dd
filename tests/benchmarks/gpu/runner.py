"""Runs rows one after the other, each in a process of its own, so that a hang or an error of CUDA spoils no other row.

Rows yield figures, which are written as they come. The last line of a row has the error if it failed, ended its process or took too long.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from tests.benchmarks.gpu.card import Card, find_card
from tests.benchmarks.gpu.results import Figure, Results

# A new process has imported everything already. None of this one's threads or contexts could be lost: it calls nothing of CUDA.
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Bench:
    """What rows are given.

    Attributes:
        card: where to measure.
        folder: for their files, which are deleted at the end.
        tiny: whether to take every step at the smallest size.
        measured: values of the figures of earlier rows, by row and by what was measured.
    """

    card: Card
    folder: Path
    tiny: bool
    measured: dict[tuple[str, str], float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: of the row.
        seconds: that it may take, beside what the rows before it have left of theirs.
        measure: yields its figures.
    """

    name: str
    seconds: float
    measure: Callable[[Bench], Iterable[Figure]]


def card_of(device: str, folder: Path) -> Card:
    """Measure the card in a process of its own.

    Raises:
        RuntimeError: the device cannot be used.
    """
    for kind, content in _in_process(lambda: [find_card(device)], folder / "card.log", 120.0):
        if kind == "error":
            raise RuntimeError(content)
        return cast(Card, content)
    raise RuntimeError(f"device {device} gave no answer")


def run_rows(rows: Sequence[Row], bench: Bench, results: Results, logs: Path) -> bool:
    """Measure rows, each in its seconds and in what those before it left of theirs; return whether all were measured.

    Args:
        rows: in their order.
        bench: what they are given.
        results: where figures are written.
        logs: folder of what their processes print.
    """
    ends, complete = time.monotonic(), True
    for row in rows:
        ends += row.seconds
        began, error = time.monotonic(), None
        print(f"{row.name} ...", file=sys.stderr, flush=True)
        for kind, content in _in_process(partial(row.measure, bench), logs / f"{row.name}.log", ends - began):
            if kind == "error":
                error = content
            else:
                bench.measured[row.name, content.what] = content.value
                results.figure(row.name, content)
        results.ended(row.name, time.monotonic() - began, error)
        complete = complete and error is None
    return complete


def _in_process(work: Callable[[], Iterable[Any]], log: Path, seconds: float) -> Iterator[tuple[str, Any]]:
    """Yield ("item", what the work yields), and at last ("error", one line) if it fails."""
    ours, theirs = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_work, args=(work, theirs, log))
    process.start()
    theirs.close()
    ends = time.monotonic() + seconds
    try:
        while True:
            if not ours.poll(max(0.0, ends - time.monotonic())):
                yield "error", f"ended after {seconds:.0f} s"
                return
            kind, content = ours.recv()
            if kind == "end":
                return
            yield kind, content
    except EOFError:
        process.join(timeout=10)
        yield "error", f"its process ended with code {process.exitcode}: see {log.name}"
    finally:
        if process.pid:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
        process.kill()
        process.join()


def _work(work: Callable[[], Iterable[Any]], results: Connection, log: Path) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        for item in work():
            results.send(("item", item))
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        results.send(("error", " ".join(f"{type(error).__name__}: {error}".split())[:400]))
    sys.stdout.flush()
    results.send(("end", None))
    os.kill(os.getpid(), signal.SIGKILL)  # what waits for the device or for another process at the end waits in vain
