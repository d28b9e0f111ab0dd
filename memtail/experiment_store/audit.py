"""The audit trail of an experiment: who submitted or changed it, when, and from where. One object per action, never replaced.

It says what clients state about themselves; a client with the key of the bucket could state anything. For proof use the access log of the
bucket.
"""

import getpass
import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version

from pydantic import TypeAdapter, ValidationError

from memtail.errors import ForeignObjectError
from memtail.storage import ObjectNotFound, ObjectStore, keys

# Limit in bytes of a record.
_LARGEST = 1 << 16


@dataclass(frozen=True)
class Action:
    """One action of a person.

    Attributes:
        action: the command: submit, pause, resume, cancel, priority, retry, discard, archive.
        details: what it changed, in one line; may be empty.
        when: time in UTC, ISO 8601, by the client's clock.
        user: name of the operating system's user.
        host: name of the host.
        memtail: version of memtail.
    """

    action: str
    details: str
    when: str
    user: str
    host: str
    memtail: str


def record_action(store: ObjectStore, name: str, action: str, details: str = "") -> None:
    """Record an action of this process's user on an experiment. Raises: StoreError: the store cannot be written."""
    now = datetime.now(UTC)
    done = Action(action, details, now.isoformat(timespec="seconds"), _user(), socket.gethostname(), version("memtail"))
    key = keys.audit(name, f"{now:%Y%m%dT%H%M%S.%fZ}-{uuid.uuid4().hex[:8]}")
    store.put_if_absent(key, json.dumps(asdict(done), indent=1).encode())


def recorded_actions(store: ObjectStore, name: str) -> Iterator[Action]:
    """Read the actions on an experiment, the earliest first; damaged records are skipped."""
    for key in store.list(keys.audits(name)):
        with suppress(ObjectNotFound, ForeignObjectError, ValidationError):
            yield TypeAdapter(Action).validate_json(store.get(key, limit=_LARGEST))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user need not have a name
        return f"uid {os.getuid()}"
