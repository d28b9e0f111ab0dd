"""`python -m services.tools.healthcheck WHAT`: exit code 0 if a service lives, for the health checks of containers.

WHAT is the URL of a service's /healthz, or a worker's heartbeat file, which is to have been touched lately. It is run every few seconds,
so it loads nothing that takes long to load.
"""

import sys
import time
import urllib.request
from pathlib import Path

#: Seconds; a worker beats much more often.
PATIENCE = 60.0


def main(what: str) -> str | None:
    """What is wrong with a service; None if nothing is."""
    try:
        if what.startswith("http"):
            with urllib.request.urlopen(what, timeout=5):
                return None
        age = time.time() - Path(what).stat().st_mtime
    except OSError as error:
        return f"{what}: {error}"
    return None if age < PATIENCE else f"{what}: no beat for {age:.0f} s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
