"""Number of processes to start, the set-up of each, and signals that end them."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

from memtail.errors import SpecError

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
# Seconds after which a signal is sent again whose exception was dropped.
_AGAIN_SECONDS = 0.05
_PR_SET_DUMPABLE = 4  # from linux/prctl.h
# Exit code of a process whose import of the script starts a run, by which the process that started it knows the cause.
_SCRIPT_RUNS = 70


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def follow_parent() -> None:
    """Leave Ctrl-C, which reaches the whole process group, to the parent; end when the parent ends, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def end_if_imported() -> None:
    """End this process if it is one of a run that imports the run's script, as multiprocessing does, and so would start the run again."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # multiprocessing's mark of such a process
        sys.exit(_SCRIPT_RUNS)


def check_script(broken: "ProcessPoolExecutor") -> None:
    """Check that a pool's process did not end because the script starts a run when it is imported.

    Raises:
        SpecError: it did.
    """
    processes = list((broken._processes or {}).values())
    broken.shutdown()  # waits for the thread that collects the exit codes
    if any(process.exitcode == _SCRIPT_RUNS for process in processes):
        raise SpecError(
            f"{sys.argv[0]} starts a run as soon as it is imported, and the processes of the run import it: "
            'put the call under `if __name__ == "__main__":`'
        ) from None


def hide() -> None:
    """Keep other processes of the user from reading this one's memory, environment and open files; call it before user code is started.

    Only Linux does that. Those of the superuser still can, unless Landlock confines them.
    """
    prctl(_PR_SET_DUMPABLE, 0)


def prctl(option: int, value: int) -> None:
    """Change a property of this process, where the system has such calls."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def resend_dropped(signals: Mapping[type[BaseException], int]) -> None:
    """Send a signal again if the interpreter drops the exception of its handler, which ran in a destructor or a callback from C.

    Args:
        signals: numbers of the signals by the exceptions that their handlers raise.
    """
    report = sys.unraisablehook

    def drop(dropped: "sys.UnraisableHookArgs") -> None:
        if number := signals.get(dropped.exc_type):
            timer = threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()
        else:
            report(dropped)

    sys.unraisablehook = drop


def keep_memory() -> None:
    """Have the C library keep freed memory for the next training step, which would otherwise fault in every page again."""
    with suppress(OSError, AttributeError):  # only glibc has mallopt
        library = ctypes.CDLL(None)
        for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            library.mallopt(parameter, 1 << 30)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
