"""Tests. Compiled numba kernels are cached between runs, in a folder named by a hash of their source."""

import hashlib
import os
from pathlib import Path

from platformdirs import user_cache_path


def _kernels() -> Path:
    sources = (path.read_bytes() for path in sorted((Path(__file__).parents[1] / "memtail").rglob("*.py")))
    digest = hashlib.sha256(b"".join(source for source in sources if b"numba" in source)).hexdigest()
    return user_cache_path("memtail-tests") / f"numba-{digest[:16]}"


os.environ.setdefault("NUMBA_CACHE_DIR", str(_kernels()))
