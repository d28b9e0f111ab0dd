"""What a trainer process gets of its surroundings: an environment without credentials, and later no access to the parent's files."""

import os
from collections.abc import Mapping
from pathlib import Path

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
)


def trainer_environment(environment: Mapping[str, str], code: Path, scratch: Path) -> dict[str, str]:
    """Return the environment of a trainer process.

    Args:
        environment: of this process.
        code: folder of the user's code, which comes first on the Python path of commands too.
        scratch: folder of temporary files.
    """
    kept = {name: value for name, value in environment.items() if name in _KEPT or not name.upper().startswith(_REMOVED)}
    # entries relative to this process's folder would be others in the scratch folder
    path = [str(Path(part).absolute()) for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    return kept | {"TMPDIR": str(scratch), "PYTHONPATH": os.pathsep.join([str(code), *path]), "PYTHONUNBUFFERED": "1"}
