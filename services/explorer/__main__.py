"""`python -m services.explorer`."""

from memtail.explorer.server import TokenError, configured_token, listen, serve
from memtail.settings import EXPLORER_TOKEN_VARIABLE
from memtail.storage.open import open_store
from services.common.metrics import count_request
from services.common.process import Heartbeat, start
from services.common.process import serve as serve_health
from services.common.settings import ServiceSettings

# Seconds until a page request fails when the bucket does not answer.
_STORE_TIMEOUT = 20.0
_PORT = 8080


def _explore(settings: ServiceSettings) -> None:
    token = configured_token()
    if token is None:
        raise TokenError(f"{EXPLORER_TOKEN_VARIABLE} is not set, and other machines can reach the explorer: set it, or a file with _FILE")
    heartbeat = Heartbeat(timeout=120)
    serve_health(settings.port, heartbeat)
    store = open_store(settings.store, verify=False, patience=_STORE_TIMEOUT, timeout=_STORE_TIMEOUT / 2, observe=count_request)
    with listen("", settings.explorer_port or _PORT) as listening:
        serve(store, token, listening, log_requests=True, heartbeat=heartbeat.record)


if __name__ == "__main__":
    start(_explore)
