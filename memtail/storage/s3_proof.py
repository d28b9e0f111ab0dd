"""Proof that an S3 server answers conditional writes as the contract of the store requires."""

import uuid
from contextlib import suppress

from minio.error import MinioException

from memtail.errors import StoreError
from memtail.storage import ObjectNotFound, keys
from memtail.storage.s3_client import Client, Connection
from memtail.storage.s3_errors import TRANSIENT_STATUS, status_of

#: Token of one call of a conditional write, stored with the object, by which the call recognises its own write.
WRITER = "x-amz-meta-writer"


def prove_answers(client: Client, prefix: str) -> str | None:
    """Make conditional writes one after the other; the object is removed again.

    Args:
        client: of the bucket.
        prefix: of the store's objects in the bucket.

    Returns:
        The fault of the server; None if its answers are those of S3.

    Raises:
        StoreError: the server cannot be used.
    """
    key, writer = keys.probe(), uuid.uuid4().hex
    name = prefix + key

    def write(condition: str, value: str) -> int:
        """Return the status of a conditional write."""

        def answer(connection: Connection) -> int:
            try:
                connection.signed("PUT", name, body=b"0123456789", headers={WRITER: writer, condition: value})
            except MinioException as error:
                status = status_of(error)
                if status is None or status in TRANSIENT_STATUS or status in (400, 401, 403, 404):
                    raise
                return status
            return 200

        return client.run(key, "written", answer)

    def head(connection: Connection) -> tuple[str, str]:
        """Return writer and ETag of the object."""
        found = connection.s3.stat_object(bucket_name=connection.bucket, object_name=name)
        return (found.metadata or {}).get(WRITER) or "", found.etag or ""

    def byte(connection: Connection) -> bytes:
        with connection.opened(name, {"Range": "bytes=1-1"}) as response:
            return response.read(2)

    try:
        first = write("If-None-Match", "*")
        try:
            kept, tag = client.run(key, "checked", head)
        except ObjectNotFound:
            kept, tag = "", ""
        if first != 200 and kept != writer:  # else a request whose response was lost, or which a proxy repeated, wrote it
            return _FAULTS.get(first) or f"it refuses a conditional write of a new object (status {first})"
        if (status := write("If-None-Match", "*")) != 412:
            return _fault(status, "If-None-Match: *")
        if kept != writer:
            return "it does not keep the metadata of an object"
        if (status := write("If-Match", f'"{"0" * 32}"')) != 412:
            return _fault(status, "If-Match with another ETag")
        if (status := write("If-Match", f'"{tag}"')) != 200:
            return _FAULTS.get(status) or f"it refuses a conditional write with the ETag of the object (status {status})"
        if client.run(key, "read", byte) != b"1":
            return "it does not return the range of an object that is asked for"
        return None
    finally:
        with suppress(StoreError):
            client.run(key, "removed", lambda connection: connection.s3.remove_object(bucket_name=connection.bucket, object_name=name))


_FAULTS = {501: "it does not implement conditional writes (status 501)"}


def _fault(status: int, condition: str) -> str:
    if status == 200:
        return f"it overwrites an object in spite of {condition}, or answers as if it did (status 200)"
    return _FAULTS.get(status) or f"it answers a write that {condition} forbids with status {status} instead of 412"
