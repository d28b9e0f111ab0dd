"""`python -m services.aggregator`."""

from memtail.storage.opening import open_store
from services.aggregator.aggregator import Aggregator
from services.metrics import count_request
from services.process import Heartbeat, serve, start
from services.settings import ServiceSettings


def _aggregate(settings: ServiceSettings) -> None:
    heartbeat = Heartbeat(patience=900)
    serve(settings.port, heartbeat)
    Aggregator(open_store(settings.store, observe=count_request), settings).run(heartbeat.beat)


if __name__ == "__main__":
    start(_aggregate)
