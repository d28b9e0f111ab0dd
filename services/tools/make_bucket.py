"""`python -m services.tools.make_bucket [FOLDER]`: creates the bucket of MEMTAIL_STORE if it does not exist.

FOLDER has the key of the server's administrator, `s3-access-key`, and the secret key of each component, `s3-secret-key-COMPONENT`. If that
is the key in use, the server is the bundled one: it gets a user and a policy for each component (see `services.tools.rights`).
"""

import sys
from pathlib import Path
from urllib.parse import urlsplit

import structlog
from minio import MinioAdmin
from minio.credentials.providers import StaticProvider
from minio.error import MinioAdminException

from memtail.settings import S3Settings
from memtail.storage.open import open_bucket
from services.common.process import start
from services.common.settings import ServiceError, ServiceSettings
from services.tools.rights import RIGHTS, s3_policy, user

log = structlog.get_logger()


def _make(settings: ServiceSettings) -> None:
    store = open_bucket(settings.store)
    log.info("bucket created" if store.make_bucket() else "bucket exists", store=store.address)
    s3, folder = S3Settings.from_environment(), Path(sys.argv[1]) if sys.argv[1:] else None
    if folder and s3.access_key == (folder / "s3-access-key").read_text().strip():
        bucket, _, prefix = settings.store.removeprefix("s3://").partition("/")
        try:
            _make_users(s3, bucket, prefix, folder)
        except MinioAdminException as error:
            raise ServiceError(f"{s3.endpoint}: users cannot be made ({error}): use a server with MinIO's interface for that") from None
        log.info("users made", users=[user(component) for component in RIGHTS])


def _make_users(s3: S3Settings, bucket: str, prefix: str, folder: Path) -> None:
    """Make the users, or change their passwords and policies."""
    url = urlsplit(s3.endpoint)
    administrator = StaticProvider(access_key=s3.access_key or "", secret_key=s3.secret_key or "")
    server = MinioAdmin(endpoint=url.netloc, credentials=administrator, secure=url.scheme == "https", region=s3.region or "")
    for component in RIGHTS:
        server.policy_add(user(component), policy=s3_policy(component, bucket, prefix, conditional=False))
        server.user_add(user(component), (folder / f"s3-secret-key-{component}").read_text().strip())
        try:
            server.attach_policy([user(component)], user=user(component))
        except MinioAdminException as error:
            if "PolicyChangeAlreadyApplied" not in str(error):
                raise


if __name__ == "__main__":
    start(_make)
