"""`python -m services.tools.healthcheck TARGET`: health check of a container, with exit code 0 if the service is healthy.

TARGET is the URL of a service's /healthz, or the heartbeat file of a worker. Containers run it every few seconds, so it imports only
modules that load quickly.
"""

import sys
import time
import urllib.request
from pathlib import Path

#: Maximum age of a heartbeat in seconds; workers send one every few seconds.
HEARTBEAT_TIMEOUT = 60.0


def main(target: str) -> str | None:
    """Return the reason why a service is unhealthy, or None if it is healthy."""
    try:
        if target.startswith("http"):
            with urllib.request.urlopen(target, timeout=5):  # noqa: S310 - the deployment's own URL
                return None
        age = time.time() - Path(target).stat().st_mtime
    except OSError as error:
        return f"{target}: {error}"
    return None if age < HEARTBEAT_TIMEOUT else f"{target}: last heartbeat {age:.0f} s ago"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
