"""`python -m services.aggregator`."""

from memtail.storage.open import open_store
from services.aggregator.aggregator import Aggregator
from services.aggregator.explorer import Explorer
from services.common.metrics import count_request
from services.common.process import Heartbeat, serve, start
from services.common.settings import ServiceSettings


def _aggregate(settings: ServiceSettings) -> None:
    heartbeat = Heartbeat(timeout=900)
    serve(settings.port, heartbeat)
    after_pass = [heartbeat.record]
    if settings.explorer_port:
        explorer = Explorer(settings.store, settings.explorer_port)
        explorer.ensure_running()
        after_pass.append(explorer.ensure_running)

    def end_pass() -> None:
        for action in after_pass:
            action()

    Aggregator(open_store(settings.store, observe=count_request), settings, heartbeat.record).run(end_pass)


if __name__ == "__main__":
    start(_aggregate)
