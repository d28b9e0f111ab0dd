"""Opening a store by its address: a folder, or `s3://BUCKET/PREFIX`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from memtail.errors import StoreError
from memtail.storage import ObjectStore
from memtail.storage.local import LocalStore

if TYPE_CHECKING:
    from memtail.storage.s3 import Observer, S3Store


def open_store(address: str | Path, *, verify: bool = True, observe: "Observer | None" = None) -> ObjectStore:
    """Open a store.

    Args:
        address: a folder, which need not be there yet, or `s3://BUCKET` or `s3://BUCKET/PREFIX` on the server that `S3Settings` names.
        verify: whether to try out first that a bucket keeps the contract, by writing to it. Whoever only reads, perhaps with a key that
            may do no more, need not.
        observe: is told of each request to a server.

    Raises:
        StoreError: it is no address of a store, or its server cannot be used.
    """
    if not is_url(address):
        return LocalStore(address)
    store = open_bucket(str(address), observe=observe)
    if verify:
        store.verify_contract()
    return store


def open_bucket(address: str, patience: float = 120.0, timeout: float = 60.0, observe: "Observer | None" = None) -> "S3Store":
    """Open `s3://BUCKET/PREFIX` without asking its server.

    Args:
        address: of the bucket.
        patience, timeout: seconds for which a request is tried, and for which each answer is waited.
        observe: is told of each request.

    Raises:
        StoreError: it cannot be the address of a bucket.
    """
    scheme, _, rest = address.partition("://")
    if scheme != "s3":
        raise StoreError(f"{address} is not the address of a store: give a folder, or s3://BUCKET/PREFIX as text")
    try:
        from memtail.storage.s3 import S3Store
    except ModuleNotFoundError as error:
        raise StoreError(f"{address}: this needs {error.name}, which is not installed: pip install 'memtail[services]'") from None
    bucket, _, prefix = rest.partition("/")
    return S3Store(bucket, prefix.strip("/"), patience=patience, timeout=timeout, observe=observe)


def is_url(address: str | Path) -> bool:
    """Whether an address is a URL, also one that lost a slash by becoming a `Path`, and not a folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(address)) is not None
