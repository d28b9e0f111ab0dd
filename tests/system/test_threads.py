"""Compiled kernels on numba's own threading layer, which is not thread-safe."""

import os
import subprocess
import sys


def test_threads_may_count_concurrently_on_a_threading_layer_that_is_not_thread_safe():
    count = """
import threading
import numpy as np
from memtail.estimators.influence import Influence
from memtail.statistics import cooccurrence
words = np.zeros((63, 50_000), np.uint64)
def work():
    for _ in range(40):
        both = cooccurrence(words[:, :1], words)
        Influence(both, np.ones(1, np.int64), np.ones(50_000, np.int64), 4000).value
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    environment = {**os.environ, "NUMBA_THREADING_LAYER": "workqueue", "NUMBA_NUM_THREADS": "2"}
    ended = subprocess.run([sys.executable, "-c", count], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
