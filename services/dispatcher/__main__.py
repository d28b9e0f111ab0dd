"""`python -m services.dispatcher`."""

from dataclasses import replace

from memtail.storage import ObjectStore
from memtail.storage.identity import make_identity
from services.common.broker import Broker
from services.common.metrics import count_request
from services.common.process import Heartbeat, open_when_allowed, serve, start
from services.common.settings import ServiceSettings
from services.common.surplus import Surplus
from services.dispatcher.dispatcher import Dispatcher
from services.dispatcher.fleet import Fleet
from services.dispatcher.metrics import BROKER
from services.dispatcher.worker_jobs import EXPERIMENT_LABEL, FleetSettings


def _dispatch(settings: ServiceSettings) -> None:
    heartbeat = Heartbeat(timeout=300)
    serve(settings.port, heartbeat)
    store = open_when_allowed(settings.store, count_request)
    settings = replace(settings, store=store.address, identity=make_identity(store))
    broker = Broker(settings)
    BROKER.info({"prefix": broker.prefix})
    dispatcher = Dispatcher(store, broker, settings, _fleet(settings, store, broker) if settings.fleet else None)
    try:
        dispatcher.run(heartbeat.record)
    finally:
        dispatcher.stop()


def _fleet(settings: ServiceSettings, store: ObjectStore, broker: Broker) -> Fleet:
    from services.dispatcher.cluster import Cluster

    fleet = FleetSettings.load(settings.fleet)
    selector = f"app.kubernetes.io/instance={fleet.instance},{EXPERIMENT_LABEL}"
    return Fleet(fleet, Cluster(fleet.namespace, selector), store, Surplus(broker, settings.lease_seconds))


if __name__ == "__main__":
    start(_dispatch)
