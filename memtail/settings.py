"""The environment variables that the library reads."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from platformdirs import user_cache_path

#: The folder that holds the results, as the command line's --store.
STORE_VARIABLE = "MEMTAIL_STORE"


def _from_environment(variable: str, default: Path | None) -> Path | None:
    value = os.environ.get(variable)
    return Path(value).expanduser().absolute() if value else default


@dataclass(frozen=True)
class Settings:
    """Read anew at each construction, so that a process may change its environment.

    `MEMTAIL_DATA`: a folder in which datasets are looked for. `MEMTAIL_CACHE`: where downloads and prepared datasets are kept.
    """

    cache: Path = field(default_factory=lambda: _from_environment("MEMTAIL_CACHE", None) or user_cache_path("memtail"))
    data: Path | None = field(default_factory=lambda: _from_environment("MEMTAIL_DATA", None))

    def places(self, root: Path | None) -> list[Path]:
        """The folders in which a dataset is looked for, in order."""
        return [place for place in (root, self.data, self.cache) if place is not None]
