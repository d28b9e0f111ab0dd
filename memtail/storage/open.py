"""Opens a store by its address: a folder, or the URL of a bucket."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from memtail.errors import StoreError
from memtail.storage import ObjectStore, Observer
from memtail.storage.local import LocalStore

if TYPE_CHECKING:
    from memtail.storage.s3 import S3Store


def open_store(
    address: str | Path, *, verify: bool = True, patience: float = 120.0, timeout: float = 60.0, observe: Observer | None = None
) -> ObjectStore:
    """Open a store.

    Args:
        address: a folder, which need not exist, or the URL of a bucket on the server of `S3Settings`: `s3://BUCKET` or
            `s3://BUCKET/PREFIX`.
        verify: whether to verify by writing that a bucket keeps the contract. Readers, whose key may not write, need not.
        patience: seconds for which a request to a server is retried.
        timeout: seconds to wait for each of its responses.
        observe: is called after each request to a server.

    Raises:
        StoreError: the address is not valid, or its server cannot be used.
    """
    if not is_url(address):
        return LocalStore(address)
    scheme, separator, _ = str(address).partition("://")
    if not separator or scheme not in _OPENERS:
        raise _invalid(address)
    return _OPENERS[scheme](str(address), verify=verify, patience=patience, timeout=timeout, observe=observe)


def open_bucket(address: str, patience: float = 120.0, timeout: float = 60.0, observe: Observer | None = None) -> "S3Store":
    """Open `s3://BUCKET/PREFIX` without a request to its server.

    Args:
        address: of the bucket.
        patience: seconds for which a request is retried.
        timeout: seconds to wait for each response.
        observe: is called after each request.

    Raises:
        StoreError: the address is not valid.
    """
    scheme, _, rest = address.partition("://")
    if scheme != "s3":
        raise _invalid(address)
    try:
        from memtail.storage.s3 import S3Store
    except ModuleNotFoundError as error:
        raise StoreError(f"{address}: this needs {error.name}, which is not installed: pip install 'memtail[services]'") from None
    bucket, _, prefix = rest.partition("/")
    return S3Store(bucket, prefix.strip("/"), patience=patience, timeout=timeout, observe=observe)


def is_url(address: str | Path) -> bool:
    """Return whether an address is a URL rather than a folder, also a URL that lost a slash by becoming a `Path`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(address)) is not None


def _invalid(address: str | Path) -> StoreError:
    return StoreError(f"{address} is not the address of a store: give a folder, or s3://BUCKET/PREFIX as text")


class _Opener(Protocol):
    def __call__(self, address: str, *, verify: bool, patience: float, timeout: float, observe: Observer | None) -> ObjectStore: ...


def _open_s3(address: str, *, verify: bool, patience: float, timeout: float, observe: Observer | None) -> ObjectStore:
    store = open_bucket(address, patience, timeout, observe)
    if verify:
        store.verify_contract()
    return store


# Openers by the scheme of the URL. A further store is an entry here.
_OPENERS: dict[str, _Opener] = {"s3": _open_s3}
