"""The environment variables that the library reads."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from platformdirs import user_cache_path

from memtail.errors import StoreError

#: The folder or bucket that holds the results, as the command line's --store.
STORE_VARIABLE = "MEMTAIL_STORE"
#: Redis's URL with its password, or with `_FILE` at its end the file that holds it: of the services, and looked at by the doctor.
BROKER_VARIABLE = "MEMTAIL_BROKER"
#: What whoever looks at the explorer must give.
EXPLORER_TOKEN_VARIABLE = "MEMTAIL_EXPLORER_TOKEN"


def _from_environment(variable: str, default: Path | None) -> Path | None:
    value = os.environ.get(variable)
    return Path(value).expanduser().absolute() if value else default


def _bytes_from_environment(variable: str) -> int | None:
    text = os.environ.get(variable)
    if not text:
        return None
    try:
        return int(float(text) * 2**30)
    except (ValueError, OverflowError):
        raise StoreError(f"{variable} is '{text}': give a number of GiB") from None


@dataclass(frozen=True)
class Settings:
    """Read anew at each construction, so that a process may change its environment.

    `MEMTAIL_DATA`: a folder in which datasets are looked for. `MEMTAIL_CACHE`: where downloads and prepared datasets are kept.
    `MEMTAIL_CACHE_LIMIT`: GiB that the datasets brought from a bucket may take there.
    """

    cache: Path = field(default_factory=lambda: _from_environment("MEMTAIL_CACHE", None) or user_cache_path("memtail"))
    data: Path | None = field(default_factory=lambda: _from_environment("MEMTAIL_DATA", None))
    cache_limit: int | None = field(default_factory=lambda: _bytes_from_environment("MEMTAIL_CACHE_LIMIT"))

    def places(self, root: Path | None) -> list[Path]:
        """The folders in which a dataset is looked for, in order."""
        return [place for place in (root, self.data, self.cache) if place is not None]


@dataclass(frozen=True)
class S3Settings:
    """How an S3 server is reached. No key is shown when it is printed.

    `MEMTAIL_S3_ENDPOINT`: its URL. `MEMTAIL_S3_ACCESS_KEY`, `MEMTAIL_S3_SECRET_KEY` and, with temporary keys,
    `MEMTAIL_S3_SESSION_TOKEN`; else `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and `AWS_SESSION_TOKEN`. Each of these may be given as
    the name of a file that holds it, in the variable with `_FILE` at its end. `MEMTAIL_S3_REGION`, `AWS_REGION`: asked from the server if
    not set. `MEMTAIL_S3_CA_FILE`: the certificate of the authority that signed the server's, if this machine does not trust it.
    `MEMTAIL_S3_ADDRESSING`: `path` (ENDPOINT/BUCKET) or `virtual` (BUCKET.ENDPOINT), which is how AWS is addressed if not set.
    """

    endpoint: str = "https://s3.amazonaws.com"
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    region: str | None = None
    ca_file: Path | None = None
    addressing: str | None = None

    @classmethod
    def from_environment(cls) -> "S3Settings":
        """Those that the environment holds. Raises: StoreError: half of a key is missing, or a file that holds one."""
        variables = ("MEMTAIL_S3_ACCESS_KEY", "MEMTAIL_S3_SECRET_KEY", "MEMTAIL_S3_SESSION_TOKEN")
        access, key, token = map(secret, variables)
        if access is key is None:
            variables = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
            access, key, token = map(secret, variables)
        if (access is None) != (key is None):
            there, missing = variables[:2] if access else variables[1::-1]
            raise StoreError(f"{there} is set, but {missing} is not: set both or neither")
        return cls(
            endpoint=os.environ.get("MEMTAIL_S3_ENDPOINT") or cls.endpoint,
            access_key=access,
            secret_key=key,
            session_token=token,
            region=os.environ.get("MEMTAIL_S3_REGION") or os.environ.get("AWS_REGION") or None,
            ca_file=_from_environment("MEMTAIL_S3_CA_FILE", None),
            addressing=os.environ.get("MEMTAIL_S3_ADDRESSING") or None,
        )


@dataclass(frozen=True)
class ExplorerSettings:
    """How the explorer is reached. The token is not shown when it is printed.

    `MEMTAIL_EXPLORER_TOKEN`, or the file that `MEMTAIL_EXPLORER_TOKEN_FILE` names: what whoever looks must give; nothing if not set.
    """

    token: str | None = field(default=None, repr=False)

    @classmethod
    def from_environment(cls) -> "ExplorerSettings":
        """Those that the environment holds. Raises: StoreError: the file cannot be read."""
        return cls(token=secret(EXPLORER_TOKEN_VARIABLE))


def secret(variable: str) -> str | None:
    """A variable's value, or the content of the file that the variable with `_FILE` at its end names."""
    path = os.environ.get(f"{variable}_FILE")
    if os.environ.get(variable) or not path:
        return os.environ.get(variable) or None
    try:
        return Path(path).read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        raise StoreError(f"{variable}_FILE names {path}, which cannot be read: name a file that holds {variable}") from None
