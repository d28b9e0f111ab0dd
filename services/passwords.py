"""`python -m services.passwords`: the name of `services.tools.make_passwords` in 0.1.0, kept for old deployments.

With FOLDER alone, it also writes the files that Redis and its clients read in 0.1.0.
"""

import sys
from pathlib import Path

from services.tools.make_passwords import main, write

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(main(*sys.argv[1:]))
    _folder = Path(sys.argv[1])
    main(str(_folder), str(_folder / "services"))
    write(_folder / "redis.conf", (_folder / "services" / "redis" / "redis.conf").read_text())
    write(_folder / "broker", f"redis://:{(_folder / 'redis').read_text()}@redis:6379/0")
