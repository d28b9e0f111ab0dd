"""Landlock: a Linux process gives up access to files and to other processes, for itself and all that it starts (see landlock(7)).

Landlock allows, and does not deny: to leave out a folder, all others are allowed, one by one. So nothing new can be made directly in the
folders that lead to one that is left out, and names in it, permissions and times stay visible and changeable, which Landlock does not
control. A process in such a domain cannot read the memory, the environment or the open files of processes outside.
"""

import ctypes
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from memtail.processes import prctl

# System calls, with equal numbers on all processors.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_PATH_BENEATH = 1
_PR_SET_NO_NEW_PRIVS = 38
# First version with REFER, without which no file can be moved to another folder; with TRUNCATE; with _SCOPE_SIGNAL.
_FIRST_VERSION, _TRUNCATE_VERSION, _SCOPE_VERSION = 2, 3, 6
# Bits of linux/landlock.h. Execution, listings and device controls are left free.
_WRITE_FILE, _READ_FILE, _REFER, _TRUNCATE = 1 << 1, 1 << 2, 1 << 13, 1 << 14
_REMOVE_AND_MAKE = sum(1 << bit for bit in range(4, 13))
_OF_FILES = _WRITE_FILE | _READ_FILE | _TRUNCATE
_SCOPE_SIGNAL = 1 << 1


class Access(IntEnum):
    """Access to a folder, and to all below it that has no access of its own."""

    NONE = 0
    READ = _READ_FILE
    ALL = _READ_FILE | _WRITE_FILE | _REMOVE_AND_MAKE | _REFER | _TRUNCATE


def version() -> int:
    """Return the version of Landlock in the kernel; 0 if there is none that can be used."""
    try:
        found = _call(_CREATE_RULESET, None, 0, 1)
    except OSError:
        return 0
    return found if found >= _FIRST_VERSION else 0


def restrict(accesses: Mapping[Path, Access]) -> None:
    """Restrict this thread, and all threads and processes that it starts from now on; call it before libraries start theirs.

    Args:
        accesses: access to some folders and files, which need not exist; all others stay as they are.

    Raises:
        OSError: the kernel has no Landlock that can be used, or refuses.
    """
    known = int(Access.ALL) if version() >= _TRUNCATE_VERSION else Access.ALL & ~_TRUNCATE
    scope = _SCOPE_SIGNAL if version() >= _SCOPE_VERSION else 0
    attributes = struct.pack("=QQQ", known, 0, scope)
    rules = _call(_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        root = _Node(Access.ALL)
        for path, access in accesses.items():
            root.add(Path(os.path.realpath(path)).parts[1:], access)
        for name, allowed in root.rules("/", Access.ALL):
            _allow(rules, name, allowed & known)
        prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _call(_RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)


@dataclass
class _Node:
    """A part of a path, with the access that was given to it, if any."""

    access: Access | None = None
    below: dict[str, "_Node"] = field(default_factory=dict)

    def add(self, parts: tuple[str, ...], access: Access) -> None:
        if parts:
            self.below.setdefault(parts[0], _Node()).add(parts[1:], access)
        else:
            self.access = access

    def rules(self, path: str, inherited: Access) -> Iterator[tuple[str, Access]]:
        """Yield what is to be allowed: this path, or what is in it if some of that has an access of its own."""
        access = inherited if self.access is None else self.access
        if not self.below:
            yield path, access
            return
        try:
            names = {entry.name for entry in os.scandir(path)}
        except PermissionError:  # a folder that can be entered and not listed, such as the home folders of some clusters
            names = set(self.below)
        except OSError:
            return
        for name in names:
            yield from self.below.get(name, _Node()).rules(os.path.join(path, name), access)


def _allow(rules: int, path: str, access: int) -> None:
    """Allow access to a path. A path that is gone, or that Landlock cannot name, stays forbidden."""
    try:
        opened = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        kind = os.fstat(opened).st_mode
        access &= -1 if stat.S_ISDIR(kind) else _OF_FILES
        if access and not stat.S_ISLNK(kind):
            _call(_ADD_RULE, rules, _PATH_BENEATH, struct.pack("=Qi", access, opened), 0)
    except OSError:
        return
    finally:
        os.close(opened)


def _call(number: int, *arguments: "int | bytes | None") -> int:
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    result = int(syscall(ctypes.c_long(number), *(ctypes.c_long(each) if isinstance(each, int) else each for each in arguments)))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
