"""`python -m services.worker`."""

import os

from services.common.process import start
from services.common.settings import ServiceSettings
from services.worker.app import Worker
from services.worker.visible_gpus import worker_devices


def _work(settings: ServiceSettings) -> int:
    return Worker(settings, worker_devices(settings.devices)).run()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # CPU training uses one thread per process, and one process per core
    start(_work)
