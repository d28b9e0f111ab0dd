"""`python -m services.worker`."""

import os

from services.common.process import start
from services.common.settings import ServiceSettings
from services.worker.app import Worker


def _work(settings: ServiceSettings) -> int:
    return Worker(settings, settings.devices.split(",")).run()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # training on a CPU computes on one thread; processes fill the cores
    start(_work)
