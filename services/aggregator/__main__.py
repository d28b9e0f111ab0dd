"""`python -m services.aggregator`."""

from memtail.storage.open import open_store
from services.aggregator.aggregator import Aggregator
from services.aggregator.explorer import Explorer
from services.common.metrics import count_request
from services.common.process import Heartbeat, serve, start
from services.common.settings import ServiceSettings


def _aggregate(settings: ServiceSettings) -> None:
    heartbeat = Heartbeat(patience=900)
    serve(settings.port, heartbeat)
    beats = [heartbeat.beat]
    if settings.explorer_port:
        explorer = Explorer(settings.store, settings.explorer_port)
        explorer.keep()
        beats.append(explorer.keep)

    def beat() -> None:
        for each in beats:
            each()

    Aggregator(open_store(settings.store, observe=count_request), settings).run(beat)


if __name__ == "__main__":
    start(_aggregate)
