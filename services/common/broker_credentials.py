"""User and password of Redis, read again for each connection where a file holds them, so that a rotated password needs no restart."""

import re
from typing import Any

import redis
from redis.connection import parse_url
from redis.credentials import CredentialProvider, UsernamePasswordCredentialProvider

from memtail.errors import StoreError
from memtail.settings import BROKER_VARIABLE, in_file, secret

# kombu makes the provider by its name
_NAME = f"{__name__}:FileCredentials"


class FileCredentials(CredentialProvider):
    """User and password from the file named by `MEMTAIL_BROKER_FILE`. The address in it counts at the start of the process only."""

    def get_credentials(self) -> Any:
        """Read the file. Raises: redis.AuthenticationError: it holds no URL of Redis; a later connection tries again."""
        try:
            parts = parse_url(secret(BROKER_VARIABLE) or "")  # type: ignore[no-untyped-call]
        except StoreError as error:
            raise redis.AuthenticationError(str(error)) from None
        except ValueError:  # its message may contain a part of the password
            raise redis.AuthenticationError(f"{BROKER_VARIABLE}_FILE names a file without a Redis URL") from None
        provider = UsernamePasswordCredentialProvider(parts.get("username"), parts.get("password"))
        return provider.get_credentials()  # type: ignore[no-untyped-call]


def client_arguments(url: str) -> dict[str, Any]:
    """Return the arguments of `redis.Redis.from_url`."""
    return {"url": _address(url), "credential_provider": FileCredentials()} if in_file(BROKER_VARIABLE) else {"url": url}


def celery_url(url: str) -> str:
    """Return Celery's `broker_url`."""
    if not in_file(BROKER_VARIABLE):
        return url
    address = _address(url)
    return f"{address}{'&' if '?' in address else '?'}credential_provider={_NAME}"


def _address(url: str) -> str:
    """Remove user and password, which a client does not accept beside a provider."""
    return re.sub(r"^(\w+://)[^/?#]*@", r"\1", url)
