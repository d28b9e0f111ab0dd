"""`memtail watch` on a terminal."""

import os
import pty
import signal
import subprocess

from memtail.execution.declare import declare as declare_record
from memtail.experiment_store import ExperimentStore
from memtail.storage.local import LocalStore
from memtail.trials import Shard
from tests.support.batches import commit
from tests.support.cli import MEMTAIL


def test_on_a_terminal_watch_draws_bars_and_ctrl_c_ends_it_quietly(declare, digits, tmp_path):
    submitted = ExperimentStore(LocalStore(tmp_path / "store"), "digits")
    submitted.register(declare_record(declare(12, subsets={"design": "balanced"}), digits, 4))
    commit(submitted, Shard(0, 3))
    terminal, end = pty.openpty()
    arguments = [*MEMTAIL, "watch", "--store", submitted.store.address]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(arguments, stdin=end, stdout=end, stderr=subprocess.PIPE, env=environment)
    os.close(end)
    shown = b""
    while b"4/12 trials" not in shown or b"running" not in shown:
        shown += os.read(terminal, 1 << 16)
    assert "━".encode() in shown
    assert b"\x1b[" in shown
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    os.close(terminal)
    assert (process.returncode, errors) == (130, b"")
