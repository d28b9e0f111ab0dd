"""Environment variables of the library and of the command line."""

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

from platformdirs import user_cache_path

from memtail.errors import StoreError

#: Folder or bucket with the results: the default of --store.
STORE_VARIABLE = "MEMTAIL_STORE"
#: URL of Redis with its password, for the services and for `memtail doctor`; with `_FILE` at its end, the file that holds it.
BROKER_VARIABLE = "MEMTAIL_BROKER"
#: Token of the explorer.
EXPLORER_TOKEN_VARIABLE = "MEMTAIL_EXPLORER_TOKEN"  # noqa: S105 - the name of a variable


# Most digits of a number: far more than any use has, and few enough to be read quickly.
_COUNT_DIGITS = 18


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


def _count_from_environment(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    if text.isascii() and text.isdecimal() and len(text) <= _COUNT_DIGITS and int(text):
        return int(text)
    raise StoreError(f"{variable} is '{text}': give a whole number above 0")


@dataclass(frozen=True)
class Settings:
    """Folders on this machine. Each construction reads the environment, so that a process may change it.

    Attributes:
        cache: `MEMTAIL_CACHE`: folder of downloads, prepared datasets and fetched scores; the user's cache folder by default.
        data: `MEMTAIL_DATA`: folder in which datasets are searched before the cache.
        node: `MEMTAIL_NODE`: name of the machine, or of the cluster's node, in failure records; the host's by default.
        cache_limit: `MEMTAIL_CACHE_LIMIT`: maximum size in GiB of prepared and fetched datasets, as bytes; by default what the cache's
            volume has room for, less 5%.
        code: `MEMTAIL_CODE`: in a worker, folder of users' training code: functions are searched there before the Python path, and files of
            commands are relative to it; the current folder by default.
    """

    cache: Path = field(default_factory=lambda: _from_environment("MEMTAIL_CACHE", None) or user_cache_path("memtail"))
    data: Path | None = field(default_factory=lambda: _from_environment("MEMTAIL_DATA", None))
    node: str = field(default_factory=lambda: os.environ.get("MEMTAIL_NODE") or socket.gethostname())
    cache_limit: int | None = field(default_factory=lambda: _bytes_from_environment("MEMTAIL_CACHE_LIMIT"))
    code: Path | None = field(default_factory=lambda: _from_environment("MEMTAIL_CODE", None))

    def places(self, root: Path | None) -> list[Path]:
        """Return the folders that are searched for a dataset, in order; `root` is the first."""
        return [place for place in (root, self.data, self.cache) if place is not None]


@dataclass(frozen=True)
class Limits:
    """Maximum size of an experiment. Larger ones are refused when they are declared, and not read by any command or service.

    A typing error could otherwise exhaust the services, which serve all experiments: the dispatcher holds about 250 bytes per shard, and
    looks at each shard in every pass. The defaults are 250 times the trials of the paper, and 50 MB of the memory. Set the same
    values for all services and clients.

    Attributes:
        trials: `MEMTAIL_MAX_TRIALS`: maximum number of trials of an experiment; 1,000,000 by default.
        shards: `MEMTAIL_MAX_SHARDS`: maximum number of shards of an experiment; 200,000 by default.
    """

    trials: int = field(default_factory=lambda: _count_from_environment("MEMTAIL_MAX_TRIALS", 1_000_000))
    shards: int = field(default_factory=lambda: _count_from_environment("MEMTAIL_MAX_SHARDS", 200_000))


@dataclass(frozen=True)
class S3Settings:
    """Access to an S3 server. Keys are not in the repr.

    Each key can be in a file: a variable with `_FILE` at its end names it. The file is read for each request, so that a rotated key is used
    at once. For services and runs a session token, which expires, must be in a file, and so must its keys. Without a key, credentials come
    from AWS's configuration file, or from the identity of the pod, container or instance.

    Attributes:
        endpoint: `MEMTAIL_S3_ENDPOINT`: URL of the server; AWS by default.
        access_key: `MEMTAIL_S3_ACCESS_KEY`, `AWS_ACCESS_KEY_ID`: access key.
        secret_key: `MEMTAIL_S3_SECRET_KEY`, `AWS_SECRET_ACCESS_KEY`: secret key.
        session_token: `MEMTAIL_S3_SESSION_TOKEN`, `AWS_SESSION_TOKEN`: session token of temporary keys.
        region: `MEMTAIL_S3_REGION`, `AWS_REGION`: region of the bucket; requested from the server by default.
        ca_file: `MEMTAIL_S3_CA_FILE`: certificate of a private certificate authority.
        addressing: `MEMTAIL_S3_ADDRESSING`: `path` (ENDPOINT/BUCKET) or `virtual` (BUCKET.ENDPOINT); `virtual` for AWS and `path` for other
            servers by default.
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
        """Return the environment's settings.

        Raises:
            StoreError: half of a key is missing, or a file that should hold it cannot be read.
        """
        variables = cls.key_variables()
        access, key, token = map(secret, variables)
        if (access is None) != (key is None):
            present, missing = variables[:2] if access else variables[1::-1]
            raise StoreError(f"{present} is set, but {missing} is not: set both or neither")
        return cls(
            endpoint=os.environ.get("MEMTAIL_S3_ENDPOINT") or cls.endpoint,
            access_key=access,
            secret_key=key,
            session_token=token,
            region=os.environ.get("MEMTAIL_S3_REGION") or os.environ.get("AWS_REGION") or None,
            ca_file=_from_environment("MEMTAIL_S3_CA_FILE", None),
            addressing=os.environ.get("MEMTAIL_S3_ADDRESSING") or None,
        )

    @classmethod
    def refuse_expiring_key(cls) -> None:
        """Refuse a key that ends before a long-lived process does, and that nobody can replace in its environment.

        Raises:
            StoreError: a session token is not in a file.
        """
        variables = cls.key_variables()
        if secret(variables[2]) and not all(map(in_file, variables)):
            files = ", ".join(f"{variable}_FILE" for variable in variables)
            raise StoreError(
                f"{variables[2]} is set, but a session token expires before a service or a run ends: name files with the keys and the "
                f"token in {files}"
            )

    @staticmethod
    def key_variables() -> tuple[str, str, str]:
        """Return the variables of access key, secret key and session token: those of AWS if the others hold no key."""
        variables = ("MEMTAIL_S3_ACCESS_KEY", "MEMTAIL_S3_SECRET_KEY", "MEMTAIL_S3_SESSION_TOKEN")
        if any(map(secret, variables[:2])):
            return variables
        return ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


@dataclass(frozen=True)
class ExplorerSettings:
    """Access to the explorer. The token is not in the repr.

    Attributes:
        token: `MEMTAIL_EXPLORER_TOKEN`: token that browsers and scripts must send; `MEMTAIL_EXPLORER_TOKEN_FILE` names a file with it.
    """

    token: str | None = field(default=None, repr=False)

    @classmethod
    def from_environment(cls) -> "ExplorerSettings":
        """Return the environment's settings.

        Raises:
            StoreError: the token's file cannot be read.
        """
        return cls(token=secret(EXPLORER_TOKEN_VARIABLE))


def in_file(variable: str) -> bool:
    """Return whether a file holds the variable's value: it may be replaced while the process lives."""
    return not os.environ.get(variable) and bool(os.environ.get(f"{variable}_FILE"))


def secret(variable: str) -> str | None:
    """Return a variable's value, or the content of the file named by the variable with the suffix `_FILE`; None if neither is set.

    Each call reads the file: a long-lived process that calls it when a secret is refused gets the rotated one.

    Raises:
        StoreError: the file cannot be read.
    """
    if not in_file(variable):
        return os.environ.get(variable) or None
    path = os.environ[f"{variable}_FILE"]
    try:
        return Path(path).read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        raise StoreError(f"{variable}_FILE names {path}, which cannot be read: name a file that holds {variable}") from None


def use_deterministic_cublas() -> None:
    """Set cuBLAS to a fixed workspace, which equal bits need, unless the environment sets it. cuBLAS reads it at its first use."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
