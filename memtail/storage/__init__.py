"""Where results live: the contract of an object store, and the stores that keep it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from memtail.errors import ObjectNotFound, UnreachableError

__all__ = ["ObjectNotFound", "ObjectStore", "UnreachableError"]


class ObjectStore(Protocol):
    """A flat map from keys to immutable bytes, kept on a disk or in a bucket.

    A key is a relative path with `/` between its parts. What every store guarantees:

    * Atomicity: a reader sees the whole of an object or none of it, also when the writer is killed half-way.
    * Visibility: once a write has returned, every later `get`, `exists`, `list` and `folders` anywhere sees it.
    * Durability: once a write has returned, the object survives a crash of the writer.
    * `put_if_absent` is decided by the store: of any number of concurrent calls for one key exactly one returns True.
    * `list` and `folders` yield in ascending order.

    Every method may be called from any thread and any process. A store on a network retries what a retry may mend; what is left is
    raised as `StoreError`: `ObjectNotFound` where the key does not exist, `UnreachableError` where the server is at fault.

    Attributes:
        address: what `open_store` takes to open it again; `{address}/{key}` names an object to people.
    """

    @property
    def address(self) -> str: ...

    def get(self, key: str, limit: int | None = None) -> bytes:
        """The object's bytes, refused unread if they are more than `limit`. Raises: ObjectNotFound, StoreError."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object. Raises: StoreError."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write an object unless there is one; True if this call wrote it. Raises: StoreError."""
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """The keys that start with `prefix`, ascending. Raises: StoreError."""
        ...

    def folders(self, prefix: str) -> Iterator[str]:
        """The names of the folders right below `prefix`: what keys go on with before their next `/`, each once, ascending.

        What lies in them is not listed. `prefix` is empty or ends with a `/`. Raises: StoreError.
        """
        ...

    def exists(self, key: str) -> bool:
        """Whether there is an object under the key. Raises: StoreError."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; no error if there is none. Raises: StoreError."""
        ...

    def upload(self, key: str, path: Path) -> None:
        """Write or replace an object with the content of a file, without holding it in memory. Raises: StoreError."""
        ...

    def download(self, key: str, path: Path) -> None:
        """Write an object to a file, which appears whole or not at all. Raises: ObjectNotFound, StoreError."""
        ...
