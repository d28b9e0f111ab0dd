"""Object stores: the contract that every store keeps. The other modules of this package implement it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from memtail.errors import ObjectNotFound, UnreachableError

__all__ = ["ObjectNotFound", "ObjectStore", "Observer", "Stored", "UnreachableError"]

#: Is called after each request to a server, retries included, with the operation (get, put, list, head, delete), its outcome (ok, absent,
#: exists, refused, failed), its seconds, and the bytes of an object that it read or wrote. It must not raise.
Observer = Callable[[str, str, float, int], None]


@dataclass(frozen=True)
class Stored:
    """An object in an inventory.

    Attributes:
        key: of the object.
        bytes: its size.
        modified: time of its last writing, as Unix time by the store's clock.
    """

    key: str
    bytes: int
    modified: float


class ObjectStore(Protocol):
    """Flat map from keys to immutable bytes, on a disk or in a bucket.

    A key is a relative path with `/` between its parts (see `memtail.storage.keys.check`). Every store guarantees:

    * Atomicity: a reader sees all of an object or none of it, also when the writer is killed half-way.
    * Visibility: once a write has returned, every later `get`, `exists` and listing sees it, in any process on any machine.
    * Durability: once a write has returned, the object survives a crash of the writer.
    * First writer wins: of any number of concurrent `put_if_absent` of one key exactly one returns True. The store decides, not the caller.
    * No lost update: of any number of concurrent `put_if_match` of one key with one tag at most one writes.
    * Tags: an object keeps its tag until it is replaced by another one. `get_tagged`, `list_tagged` and `put_if_match` use the same.
      They are compared, not interpreted; a bucket may keep the tag of an object that is replaced by equal bytes.
    * Order: listings yield in ascending order.

    Every method may be called from any thread and any process, also one forked from the process that opened the store. A store on a network
    retries transient failures; the rest is raised as `StoreError`: `ObjectNotFound` where the key does not exist, `UnreachableError` where
    the server is at fault, a plain `StoreError` for a key that is not valid. `memtail.testing.ObjectStoreContract` tests all of this.

    Attributes:
        address: opens the store again with `open_store`; `{address}/{key}` names an object in messages.
    """

    @property
    def address(self) -> str:
        """Address that opens the store again."""
        ...

    def get(self, key: str, limit: int | None = None) -> bytes:
        """Return an object's bytes.

        Args:
            key: of the object.
            limit: refuse, without reading it, an object of more bytes.

        Raises:
            ObjectNotFound: no object has the key.
            ForeignObjectError: the object is larger than `limit`.
            StoreError: the store cannot be read.
        """
        ...

    def get_tagged(self, key: str, limit: int | None = None) -> tuple[bytes, str]:
        """Return an object's bytes and their tag, for `put_if_match`.

        Args:
            key: of the object.
            limit: refuse, without reading it, an object of more bytes.

        Raises:
            ObjectNotFound: no object has the key.
            ForeignObjectError: the object is larger than `limit`.
            StoreError: the store cannot be read.
        """
        ...

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """Return consecutive bytes of an object, without reading the others.

        Args:
            key: of the object.
            offset: of the first byte, 0 or more.
            length: number of bytes, 0 or more.

        Returns:
            Fewer than `length` bytes only where the object ends before; none if it ends at or before `offset`.

        Raises:
            ObjectNotFound: no object has the key.
            StoreError: the store cannot be read.
        """
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object.

        Args:
            key: of the object.
            data: its bytes.

        Raises:
            StoreError: the store cannot be written.
        """
        ...

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write an object unless its key exists.

        Args:
            key: of the object.
            data: its bytes.

        Returns:
            True if this call wrote the object.

        Raises:
            StoreError: the store cannot be written.
        """
        ...

    def put_if_match(self, key: str, data: bytes, tag: str) -> bool:
        """Replace an object if it still has a tag: read with `get_tagged`, change, write, and begin again where this returns False.

        Args:
            key: of the object.
            data: its bytes.
            tag: of the object to replace.

        Returns:
            True if this call wrote the object; False if the object has another tag or does not exist. After a lost response, a write that
            another one has replaced since is reported as False too: a change must bear being applied twice.

        Raises:
            StoreError: the store cannot be written.
        """
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the keys that start with a prefix, ascending.

        Args:
            prefix: of the keys; it may end within a part.

        Raises:
            StoreError: the store cannot be read.
        """
        ...

    def list_tagged(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Yield the keys that start with a prefix, ascending, each with the tag of its object.

        Args:
            prefix: of the keys; it may end within a part.

        Raises:
            StoreError: the store cannot be read.
        """
        ...

    def inventory(self, prefix: str) -> Iterator[Stored]:
        """Yield the objects whose keys start with a prefix, ascending by key, with their sizes and ages.

        Args:
            prefix: of the keys; it may end within a part.

        Raises:
            StoreError: the store cannot be read.
        """
        ...

    def folders(self, prefix: str) -> Iterator[str]:
        """Yield the names of the folders directly below a prefix, ascending and each once, without listing their content.

        Args:
            prefix: empty, or ends with `/`.

        Raises:
            StoreError: the store cannot be read.
        """
        ...

    def exists(self, key: str) -> bool:
        """Return whether an object has the key.

        Args:
            key: of the object.

        Raises:
            StoreError: the store cannot be read.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove an object, if it exists.

        Args:
            key: of the object.

        Raises:
            StoreError: the store cannot be written.
        """
        ...

    def upload(self, key: str, path: Path, start: int = 0, length: int | None = None) -> None:
        """Write or replace an object with the content of a file, or a part of it, without holding it in memory.

        Args:
            key: of the object.
            path: of the file.
            start: offset of the first byte.
            length: number of bytes, which the file must have; None for all from `start` on.

        Raises:
            StoreError: the file cannot be read, or the store cannot be written.
        """
        ...

    def download(self, key: str, path: Path) -> None:
        """Write an object to a file, which appears whole or not at all.

        Args:
            key: of the object.
            path: of the file; its folders are made.

        Raises:
            ObjectNotFound: no object has the key.
            StoreError: the store cannot be read, or the file cannot be written.
        """
        ...

    def local_path(self, key: str) -> Path | None:
        """Return the path of an object's file on this machine, so that readers need no copy; None if objects are not files.

        Args:
            key: of the object, or a prefix without its last `/` for the folder. It need not exist.

        Raises:
            StoreError: the key is not valid.
        """
        ...

    def sweep(self) -> None:
        """Remove temporary files of writers that were killed. Writes in progress are not affected.

        Raises:
            StoreError: the store cannot be written.
        """
        ...
