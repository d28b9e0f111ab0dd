"""`python -m services.tools.make_bucket`: makes the bucket that MEMTAIL_STORE names, unless it is there."""

import structlog

from memtail.storage.open import open_bucket
from services.common.process import start
from services.common.settings import ServiceSettings

log = structlog.get_logger()


def _make(settings: ServiceSettings) -> None:
    store = open_bucket(settings.store)
    log.info("bucket made" if store.make_bucket() else "bucket was there", store=store.address)


if __name__ == "__main__":
    start(_make)
