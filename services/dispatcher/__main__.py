"""`python -m services.dispatcher`."""

from memtail.storage.opening import open_store
from services.broker import Broker
from services.dispatcher.dispatcher import Dispatcher
from services.process import Heartbeat, serve, start
from services.settings import ServiceSettings


def _dispatch(settings: ServiceSettings) -> None:
    heartbeat = Heartbeat(patience=300)
    serve(settings.port, heartbeat)
    dispatcher = Dispatcher(open_store(settings.store), Broker(settings), settings)
    try:
        dispatcher.run(heartbeat.beat)
    finally:
        dispatcher.stop()


if __name__ == "__main__":
    start(_dispatch)
