"""`python -m services.worker`."""

import os

from services.common.process import start
from services.common.settings import ServiceSettings
from services.worker.app import Worker


def _work(settings: ServiceSettings) -> int:
    return Worker(settings, settings.devices.split(",")).run()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # CPU training uses one thread per process, and one process per core
    start(_work)
