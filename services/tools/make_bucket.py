"""`python -m services.tools.make_bucket`: creates the bucket of MEMTAIL_STORE if it does not exist."""

import structlog

from memtail.storage.open import open_bucket
from services.common.process import start
from services.common.settings import ServiceSettings

log = structlog.get_logger()


def _make(settings: ServiceSettings) -> None:
    store = open_bucket(settings.store)
    log.info("bucket created" if store.make_bucket() else "bucket exists", store=store.address)


if __name__ == "__main__":
    start(_make)
