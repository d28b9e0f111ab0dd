"""Proof that a store keeps the two guarantees of its contract on which concurrent writers depend."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from memtail.errors import StoreError
from memtail.storage import ObjectStore, keys

#: Concurrent writers of one key.
WRITERS = 16
# The first round also opens the connections, so that the requests of the second one arrive at once.
_ROUNDS = 2
# Timeout for the start of all writers.
_START_SECONDS = 60.0


def prove_races(one: ObjectStore, other: ObjectStore) -> str | None:
    """Let 16 threads write one key at once, half of them by a second client; the objects are removed again.

    Args:
        one: the store.
        other: the same store over connections of its own.

    Returns:
        The fault of the store; None if exactly one writer wins each time.

    Raises:
        StoreError: the store cannot be used.
    """

    def winners(write: Callable[[ObjectStore, bytes], bool]) -> list[bytes]:
        barrier, writers = threading.Barrier(WRITERS, timeout=_START_SECONDS), [str(number).encode() for number in range(WRITERS)]

        def compete(writer: bytes) -> bool:
            barrier.wait()
            return write((one, other)[int(writer) % 2], writer)

        try:
            return [writer for writer, won in zip(writers, pool.map(compete, writers), strict=True) if won]
        except RuntimeError as error:  # a thread cannot start, and the others wait for it
            barrier.abort()
            raise StoreError(
                f"store {one.address} cannot be checked: {WRITERS} threads do not start ({error or type(error).__name__}): "
                f"raise the limit of processes (ulimit -u; pids of a container)"
            ) from error

    with ThreadPoolExecutor(WRITERS) as pool:
        for _ in range(_ROUNDS):
            key = keys.probe()
            try:
                won = winners(lambda store, writer, key=key: store.put_if_absent(key, writer))  # type: ignore[misc]
                data, tag = one.get_tagged(key)
                if won != [data]:
                    return f"it reports success to {len(won)} of {WRITERS} concurrent writers of one new object"
                won = winners(lambda store, writer, key=key, tag=tag: store.put_if_match(key, b"again " + writer, tag))  # type: ignore[misc]
                if [b"again " + writer for writer in won] != [one.get(key)]:
                    return f"it reports success to {len(won)} of {WRITERS} concurrent writers that replace one object with If-Match"
            finally:
                with suppress(StoreError):
                    one.delete(key)
    return None
