"""Guardian of a trainer process: starts it as its child, and ends it and all that it started, in whatever sessions and groups.

It ends when the process with credentials closes the pipe that is its standard input, or dies, or when the trainer process does; and how the
latter ended, it ends. It is the only one that kills and cleans up, so that nothing is left behind however a process ended. It runs no user
code, and, where the kernel has Landlock, user code can neither signal nor trace it.
"""

import ctypes
import json
import os
import resource
import select
import shutil
import signal
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from memtail.processes import prctl
from memtail.trainers import landlock

# Of linux/prctl.h.
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
# Capabilities with which a superuser could read other processes or the disk: CAP_SYS_MODULE, CAP_SYS_RAWIO, CAP_SYS_PTRACE, CAP_SYS_ADMIN,
# CAP_MKNOD, CAP_PERFMON, CAP_BPF and CAP_CHECKPOINT_RESTORE. Version of their calls in linux/capability.h.
_DROPPED = sum(1 << bit for bit in (16, 17, 19, 21, 27, 38, 39, 40))
_CAPABILITY_VERSION = 0x20080522
# Added to how readily the kernel kills the trainer process, and what it starts, for want of memory, in thousandths of the memory: rather
# than the process with credentials, in a container or on a workstation.
_VICTIM = 500


def main() -> NoReturn:
    """Guard a trainer process.

    The last argument is a JSON object: `connection`, the number of a socket; `scratch`, a folder that is removed in the end; and
    `accesses`, access by path, as `landlock.restrict` takes it, or null.
    """
    arguments = json.loads(sys.argv[-1])
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    woken, waking = os.pipe()
    os.set_blocking(waking, False)
    guardian, trainer = os.getpid(), os.fork()
    if not trainer:
        os.close(woken)
        os.close(waking)
        _train(arguments, guardian)
    os.close(arguments["connection"])
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
    exit_codes: dict[int, int] = {}
    _reap(exit_codes)
    while trainer not in exit_codes and 0 not in select.select([0, woken], [], [])[0]:
        os.read(woken, 1 << 16)
        _reap(exit_codes)
    _end_all(trainer, exit_codes)
    _remove(arguments["scratch"])
    code = exit_codes.get(trainer, 1)
    if code < 0:
        with suppress(OSError):  # of SIGKILL, which has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _train(arguments: dict[str, Any], guardian: int) -> NoReturn:
    """Become the trainer process."""
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guardian:
        os._exit(1)
    os.setpgid(0, 0)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.close(nothing)
    _be_victim()
    _drop_capabilities()
    if arguments["accesses"] is not None:
        # before numpy and torch, whose threads would stay free
        landlock.restrict({Path(path): landlock.Access(access) for path, access in arguments["accesses"].items()})
    from memtail.trainers.child import serve

    serve(arguments["connection"])
    sys.exit()


def _be_victim() -> None:
    """Have the kernel kill this process, rather than others, for want of memory."""
    path = Path("/proc/self/oom_score_adj")
    with suppress(OSError):  # Linux
        path.write_text(str(min(int(path.read_text()) + _VICTIM, 1000)))


def _drop_capabilities() -> None:
    """Drop what the superuser does not need for training; programs that it starts would get it back only without Landlock."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION, 0), 8)
    data = ctypes.create_string_buffer(24)
    with suppress(OSError, AttributeError):  # Linux
        library = ctypes.CDLL(None)
        if library.capget(header, data) == 0:
            words = struct.unpack("=6I", data.raw)
            kept = [word & ~(_DROPPED >> 32 * (index // 3)) & 0xFFFFFFFF for index, word in enumerate(words)]
            library.capset(header, struct.pack("=6I", *kept))


def _end_all(trainer: int, exit_codes: dict[int, int]) -> None:
    """Kill all descendants: those of a dead process become children of this one, and are killed in the next round."""
    with suppress(ProcessLookupError, PermissionError):  # where a process cannot adopt others, the trainer's group is what is known
        os.killpg(trainer, signal.SIGKILL)
    while True:
        for child in _children():
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            child, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return
        exit_codes[child] = os.waitstatus_to_exitcode(status)
        _reap(exit_codes)


def _reap(exit_codes: dict[int, int]) -> None:
    """Take note of the children that have ended."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            exit_codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])


def _children() -> list[int]:
    children, own = [], str(os.getpid())
    for path in Path("/proc").glob("[0-9]*/stat"):  # Linux
        with suppress(OSError):
            if path.read_text(errors="replace").rpartition(")")[2].split()[1] == own:
                children.append(int(path.parent.name))
    return children


def _remove(scratch: str) -> None:
    for folder, _, _ in os.walk(scratch):
        with suppress(OSError):
            Path(folder).chmod(0o700)  # user code may have locked it
    shutil.rmtree(scratch, ignore_errors=True)
