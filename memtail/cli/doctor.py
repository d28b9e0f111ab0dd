"""Checks of the installation, the devices, the store and the broker; a failed check names its fix."""

import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from memtail.broker import TRIAL_RUN, key_prefix
from memtail.errors import MemtailError
from memtail.settings import BROKER_VARIABLE, Settings, secret
from memtail.storage.identity import make_identity
from memtail.storage.open import is_url, open_bucket, open_store

if TYPE_CHECKING:
    import redis

# Timeouts of the object store and the broker, and the largest clock difference, in seconds.
_STORE_TIMEOUT = 10.0
_BROKER_TIMEOUT = 5.0
_CLOCK_TOLERANCE = 300.0
_WRITE, _ONE_WINS = "conditional write", "one of several concurrent writers wins"
_ONE_SERVER = "use a single server, or the address that leads to the current master"
_INSTALL = "pip install 'memtail[train]'"


@dataclass(frozen=True)
class Check:
    """Outcome of one check; `fine` is False where something must be fixed."""

    name: str
    fine: bool
    finding: str


def examine(store: str | Path) -> list[Check]:
    """Check the machine as a run would use it."""
    settings = Settings()
    return [
        Check("python", sys.version_info >= (3, 11), f"{platform.python_version()} on {platform.platform()}"),
        *(_package(name) for name in ("memtail", "numpy", "numba", "pyarrow")),
        *_training(),
        Check("dataset folders", True, ", ".join(str(place) for place in settings.places(None))),
        _folder("cache", settings.cache),
        *(_bucket(str(store)) if is_url(store) else [_folder("store", Path(store)), *_store(Path(store))]),
        *_broker(str(store)),
    ]


def _package(name: str) -> Check:
    try:
        return Check(name, True, version(name))
    except PackageNotFoundError:
        return Check(name, False, f"not installed: {_INSTALL}")


def _training() -> list[Check]:
    """Check the training packages; a machine without torch only reads scores, or runs other services."""
    packages = [_package(name) for name in ("torch", "torchvision", "scikit-learn")]
    if not any(package.fine for package in packages):
        return [Check("training", True, f"not on this machine, torch is not installed: {_INSTALL}")]
    return [*packages, *_devices()]


def _devices() -> list[Check]:
    try:
        import torch

        from memtail.trainers.images.devices import available_devices
    except ImportError:
        return [Check("devices", False, "unknown: torch is not installed")]
    chosen = available_devices("auto")
    checks = [Check("devices", True, f"{len(chosen)} x {chosen[0].type}")]
    for device in chosen:
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            checks.append(Check(str(device), True, f"{torch.cuda.get_device_name(device)}, {free >> 20} of {total >> 20} MiB free"))
    return checks


def _folder(name: str, folder: Path) -> Check:
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    return Check(name, free > 1 << 30, f"{folder} ({'exists' if folder.exists() else 'will be created'}), {free >> 30} GiB free")


def _store(store: Path) -> list[Check]:
    """Check conditional writes in a folder."""
    from memtail.storage.local import LocalStore
    from memtail.storage.proof import prove_races

    if not store.is_dir():
        return []

    def writing() -> Check:
        fault = prove_races(LocalStore(store), LocalStore(store))
        return Check(_WRITE, not fault, f"{fault}: use another file system" if fault else _ONE_WINS)

    return [_or_error(_WRITE, writing)]


def _bucket(address: str) -> list[Check]:
    """Check a bucket and its server's clock; S3 refuses requests from clocks that differ by 15 minutes."""
    from memtail.storage import keys

    def clock() -> Check:
        ahead = opened.clock_difference()
        return Check("clock", abs(ahead) <= _CLOCK_TOLERANCE, f"{abs(ahead):.0f} s {'behind' if ahead > 0 else 'ahead of'} the store's")

    def reading() -> Check:
        next(opened.list(keys.probe()), None)
        return Check("store", True, f"{address} can be listed")

    def writing() -> Check:
        opened.verify_contract()
        return Check(_WRITE, True, _ONE_WINS)

    try:
        opened = open_bucket(address, patience=_STORE_TIMEOUT)
        return [clock(), _or_error("store", reading), _or_error(_WRITE, writing)]
    except MemtailError as error:
        return [Check("store", False, str(error))]


def _broker(store: str) -> list[Check]:
    """Check the broker of a store's services, if it is configured. No finding contains its password."""
    try:
        url = secret(BROKER_VARIABLE)
        if url is None:
            return []
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except MemtailError as error:
        return [Check("broker", False, str(error))]
    except ModuleNotFoundError:
        return [Check("broker", False, "unknown: redis is not installed: pip install 'memtail[services]'")]
    malformed = Check("broker", False, f"{BROKER_VARIABLE} is not a Redis URL: use redis://:PASSWORD@HOST:PORT/0, or rediss:// for TLS")
    if "sentinel" in url.partition(":")[0]:
        return [replace(malformed, finding=f"{BROKER_VARIABLE} is the URL of a Redis Sentinel: {_ONE_SERVER}")]
    try:
        if "@" in url and "@" not in urlsplit(url).netloc:  # else a part of the password would be parsed, and shown, as the host
            return [replace(malformed, finding=f"{malformed.finding}, with / # and ? in the password written as %2F %23 and %3F")]
        client = redis.Redis.from_url(
            url, socket_timeout=_BROKER_TIMEOUT, socket_connect_timeout=_BROKER_TIMEOUT, retry=Retry(NoBackoff(), 0)
        )
        place = "{host}:{port}".format_map({"host": "localhost", "port": 6379, **client.connection_pool.connection_kwargs})
        client.ping()
    except (ValueError, TypeError):
        return [malformed]
    except redis.AuthenticationError as error:
        return [Check("broker", False, f"Redis at {place} refuses the password ({error}): correct the password in {BROKER_VARIABLE}")]
    except redis.RedisError as error:
        fix = f"check that Redis runs, and that {BROKER_VARIABLE} is its URL"
        return [Check("broker", False, f"Redis at {place} does not answer ({str(error).rstrip('.')}): {fix}")]
    try:
        opened = open_store(store, verify=False, patience=_STORE_TIMEOUT)
        prefix = key_prefix(opened.address, make_identity(opened))
    except MemtailError as error:
        return [Check("broker", False, f"unknown, because the store gives no prefix of the keys: {error}")]
    return [_broker_rights(client, place, prefix)]


def _broker_rights(client: "redis.Redis", place: str, prefix: str) -> Check:
    """Check that a Redis server runs the services' scripts."""
    import redis

    key = f"{prefix}doctor"
    try:
        mode = client.info("server")["redis_mode"]
        if mode != "standalone":
            return Check("broker", False, f"Redis at {place} runs as a {mode}: {_ONE_SERVER}")
        for script, arguments in TRIAL_RUN:
            client.delete(key)
            client.eval(script, 1, key, *map(str, arguments))
        client.delete(key)
    except redis.RedisError as error:
        fix = f"allow its user all commands on keys that begin with {prefix}, and INFO, TIME and scripts"
        return Check("broker", False, f"Redis at {place} refuses what the services do ({str(error).rstrip('.')}): {fix}")
    return Check("broker", True, f"Redis at {place} answers; keys of this store begin with {prefix}")


def _or_error(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except MemtailError as error:
        return Check(name, False, str(error))
