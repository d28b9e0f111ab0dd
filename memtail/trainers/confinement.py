"""What a trainer process gets of its surroundings: an environment without credentials, and no access to key files and to the store."""

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import structlog

from memtail.settings import Settings
from memtail.storage import keys
from memtail.storage.local import UNFINISHED
from memtail.storage.open import is_url
from memtail.trainers import landlock
from memtail.trainers.landlock import Access

log = structlog.get_logger()

# Variables of memtail that user code may need; all others hold addresses or credentials of the store and the broker.
_KEPT = {"MEMTAIL_CACHE", "MEMTAIL_DATA", "MEMTAIL_CODE"}
# Beginnings of the names of variables with addresses and credentials of stores, brokers and clouds.
_REMOVED = (
    "MEMTAIL_",
    "AWS_",
    "AZURE_",
    "ARM_",
    "GOOGLE_",
    "GCLOUD_",
    "CLOUDSDK_",
    "ALIBABA_CLOUD_",
    "OCI_",
    "MINIO_",
    "S3_",
    "REDIS",
    "CELERY_",
    "KUBECONFIG",
    "KUBERNETES_",
    "DOCKER_",
    "VAULT_",
)
# Removed variables that name files or folders with credentials, beside those that end in _FILE; and those that name harmless files.
_OF_CREDENTIALS = {"GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_CONFIG", "AZURE_CONFIG_DIR", "KUBECONFIG", "DOCKER_CONFIG"}
_HARMLESS = {"MEMTAIL_HEARTBEAT_FILE", "MEMTAIL_S3_CA_FILE"}
# Places of credentials: of containers, and in the home folder.
_SECRETS = ("/run/secrets", "/var/run/secrets")
_HOME_SECRETS = (".aws", ".azure", ".config/gcloud", ".docker", ".kube", ".mc")
# Folders of the cache that hold datasets.
_DATASETS = ("datasets", "labels", "masks", "scores", "sources", "weights")
# Folders in the user's cache folder, and variables that name folders, in which libraries keep files from process to process.
_LIBRARIES = ("cuda", "fontconfig", "huggingface", "matplotlib", "torch", "triton")
_CACHES = (
    "CUDA_CACHE_PATH",
    "HF_HOME",
    "MPLCONFIGDIR",
    "TORCH_HOME",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
)


def trainer_environment(environment: Mapping[str, str], scratch: Path) -> dict[str, str]:
    """Return the environment of a trainer process.

    Args:
        environment: of this process.
        scratch: folder of temporary files.
    """
    kept = {name: value for name, value in environment.items() if name in _KEPT or not _is_removed(name)}
    # entries relative to this process's folder would be others in the scratch folder
    path = [str(Path(part).absolute()) for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    caches = _cache_folder(environment)
    defaults = {"CUDA_CACHE_PATH": str(caches / "cuda"), "TRITON_CACHE_DIR": str(caches / "triton")}  # else directly in the home folder
    changed = {"TMPDIR": str(scratch), "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
    if "NUMBA_CACHE_DIR" in environment:  # this process loads, and so runs, compiled code from there
        changed["NUMBA_CACHE_DIR"] = str(scratch / "numba")
    return defaults | kept | changed


def restricted_paths(environment: Mapping[str, str], store: str | None, dataset: Path, code: Path, scratch: Path) -> dict[Path, Access]:
    """Return the files and folders to which a trainer process has an access of its own; to all others it has this process's.

    Folders in which libraries cache files are made, since nothing new can be made beside what is left out.

    Args:
        environment: of this process.
        store: address of the store.
        dataset: folder of the dataset.
        code: folder of the user's code.
        scratch: folder of temporary files.
    """
    home, own = Path.home(), Settings().cache
    caches = [Path(environment[name]) for name in _CACHES if environment.get(name)]
    caches += [_cache_folder(environment) / name for name in _LIBRARIES]
    for folder in caches:
        with suppress(OSError):  # on a read-only file system libraries do without
            folder.mkdir(parents=True, exist_ok=True)
    accesses = dict.fromkeys((home, code, Path(sys.prefix), *caches), Access.ALL)
    accesses |= dict.fromkeys([own / name for name in _DATASETS], Access.READ)
    if environment.get("NUMBA_CACHE_DIR"):
        accesses[Path(environment["NUMBA_CACHE_DIR"])] = Access.READ
    if store is not None and not is_url(store):
        accesses |= dict.fromkeys([Path(store).absolute() / name for name in (*keys.top_level(), UNFINISHED)], Access.NONE)
    accesses |= dict.fromkeys(_key_files(environment, home), Access.NONE)
    return accesses | {dataset: Access.READ, scratch: Access.ALL}


@cache
def has_landlock() -> bool:
    """Return whether the kernel has Landlock; say once that it has not."""
    if landlock.version():
        return True
    log.info("the kernel has no Landlock: user code can read and write all that its user can, key files and the store included")
    return False


def _is_removed(name: str) -> bool:
    return name.upper().startswith(_REMOVED)


def _key_files(environment: Mapping[str, str], home: Path) -> list[Path]:
    removed = set(filter(_is_removed, environment)) - _HARMLESS
    named = [environment[name] for name in removed if name.endswith("_FILE") or name in _OF_CREDENTIALS]
    paths = [Path(path) for paths in named for path in paths.split(os.pathsep) if path]
    return [*paths, *map(Path, _SECRETS), *(home / name for name in _HOME_SECRETS)]


def _cache_folder(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
