"""`python -m services.aggregator`."""

from services.aggregator.aggregator import Aggregator
from services.common.metrics import count_request
from services.common.process import Heartbeat, open_when_allowed, serve, start
from services.common.settings import ServiceError, ServiceSettings


def _aggregate(settings: ServiceSettings) -> None:
    if settings.explorer_port:
        raise ServiceError(
            "MEMTAIL_EXPLORER_PORT is set, but the aggregator serves no explorer: set it for python -m services.explorer only"
        )
    heartbeat = Heartbeat(timeout=900)
    serve(settings.port, heartbeat)
    Aggregator(open_when_allowed(settings.store, count_request), settings, heartbeat.record).run(heartbeat.record)


if __name__ == "__main__":
    start(_aggregate)
