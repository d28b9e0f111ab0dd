"""Least rights of each component: its objects in the bucket, and its keys in Redis.

`python -m services.tools.rights` writes the files that follow from them: Redis's users for the chart, and a page of the documentation.
`python -m services.tools.rights s3://BUCKET/PREFIX` prints the policies for a bucket of your own, as JSON.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memtail.storage import keys

_PROJECT = Path(__file__).parents[2]
USERS_FILE = _PROJECT / "helm" / "memtail" / "files" / "redis-users.conf"
PAGE = _PROJECT / "docs" / "reference" / "rights.md"


@dataclass(frozen=True)
class Rights:
    """Rights of a component in a bucket, as patterns of keys in which `*` is any text. Every component may list the bucket.

    Attributes:
        read: objects that it reads.
        create: objects that it writes once, under the condition that the key is new.
        write: objects that it also replaces.
        delete: objects that it removes.
    """

    read: tuple[str, ...]
    create: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    delete: tuple[str, ...] = ()


_EXPERIMENT = f"{keys.experiments()}*"
_DATASETS = keys.dataset("*", "*")
_MASKS, _WEIGHTS = keys.masks("*"), keys.weights("*")
_PROBES = f"{keys.probe().partition('/')[0]}/*"
# Record of the end of an experiment, and marks of experiments that changed after it.
_FINISHED, _CHANGES = f"{keys.experiments()}*/finished.json", "changes/*"
_CHECKPOINTS, _MODELS, _FAILURES = (f"{prefix('*')}*" for prefix in (keys.checkpoints, keys.models, keys.failures))
_DISPATCHER_NOTICES = (keys.notice("*", "dispatcher"), keys.notice("*", "fleet"))
_SCORES, _REPORTS = f"{keys.all_scores('*')}*", f"{keys.all_reports('*')}*"

#: Rights by component. A client submits and studies experiments, and operates the service.
RIGHTS = {
    "worker": Rights(
        read=(
            _DATASETS,
            _MASKS,
            _WEIGHTS,
            *(key("*") for key in (keys.experiment, keys.control, keys.device)),
            *(f"{prefix('*')}*" for prefix in (keys.trials, keys.replicas, keys.notices)),
            _CHECKPOINTS,
            _FAILURES,
            _FINISHED,
            _PROBES,
            keys.identity(),
        ),
        create=(f"{keys.trials('*')}*", f"{keys.replicas('*')}*", _FAILURES, keys.device("*")),
        write=(_CHECKPOINTS, _MODELS, keys.notice("*", "worker"), _PROBES),
        delete=(_CHECKPOINTS, keys.notice("*", "worker"), _PROBES),
    ),
    "dispatcher": Rights(
        read=(_EXPERIMENT, _CHANGES, _PROBES, keys.identity()),
        create=(_FAILURES, keys.identity()),
        write=(keys.control("*"), *_DISPATCHER_NOTICES, _PROBES),
        delete=(*_DISPATCHER_NOTICES, _PROBES),
    ),
    "aggregator": Rights(
        read=(_DATASETS, _MASKS, _EXPERIMENT, _CHANGES, _PROBES),
        create=(_FAILURES,),
        write=(
            keys.experiment("*"),
            keys.notice("*", "aggregator"),
            keys.snapshot("*"),
            _SCORES,
            _REPORTS,
            _FINISHED,
            _CHANGES,
            _PROBES,
        ),
        delete=(keys.notice("*", "aggregator"), keys.snapshot("*"), _SCORES, _REPORTS, _FINISHED, _CHANGES, _PROBES),
    ),
    "explorer": Rights(read=(_DATASETS, _EXPERIMENT)),
    "client": Rights(read=("*",), write=("*",), delete=("*",)),
}

# Commands of both users: without CONFIG, FLUSHALL, KEYS and the like, and without changing scripts of others.
_COMMANDS = "+@read +@write +@connection +@transaction +eval +evalsha +script|load +script|exists +time +publish -@dangerous"
_WORKERS_KEYS = " ".join(f"~memtail*:{key}*" for key in ("shards", "leases", "workers", "surplus", "leaving", "unacked", "_kombu"))
#: Rules of Redis's users by component. A worker cannot lead, and sees no keys but those of queues and leases,
#: of all releases: the prefix of a release follows from its bucket, which need not exist when the users are made.
REDIS_RULES = {
    "worker": f"resetchannels {_WORKERS_KEYS} {_COMMANDS} -scan -randomkey",
    "dispatcher": f"resetchannels ~memtail* {_COMMANDS} +info",
}


def user(component: str) -> str:
    """Return the name of a component's user, its access key on the bundled S3 server."""
    return f"memtail-{component}"


def s3_policy(component: str, bucket: str, prefix: str = "", conditional: bool = True) -> dict[str, Any]:
    """Make the policy of a component, in the language of AWS's policies.

    Args:
        component: of `RIGHTS`.
        bucket: name of the bucket.
        prefix: of all keys.
        conditional: whether the server knows the condition on a conditional write; AWS does, MinIO does not.
    """
    rights, start = RIGHTS[component], f"{prefix.strip('/')}/" if prefix.strip("/") else ""

    def allow(name: str, actions: list[str], patterns: tuple[str, ...], **condition: Any) -> dict[str, Any]:
        resources = [f"arn:aws:s3:::{bucket}/{start}{pattern}" for pattern in patterns]
        return {"Sid": name, "Effect": "Allow", "Action": actions, "Resource": resources, **condition}

    # without a right to list, a server answers 403 instead of 404, also under a condition on the prefix
    listing = {
        "Sid": "List",
        "Effect": "Allow",
        # to continue an upload that was cut off, it has to be found
        "Action": ["s3:ListBucket", "s3:GetBucketLocation", *(["s3:ListBucketMultipartUploads"] if rights.write else [])],
        "Resource": [f"arn:aws:s3:::{bucket}"],
    }
    new = {"Condition": {"Null": {"s3:if-none-match": "false"}}} if conditional else {}
    statements = [
        listing,
        allow("Read", ["s3:GetObject"], rights.read),
        allow("Create", ["s3:PutObject"], rights.create, **new),
        allow("Write", ["s3:PutObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"], rights.write),
        allow("Delete", ["s3:DeleteObject"], rights.delete),
    ]
    return {"Version": "2012-10-17", "Statement": [statement for statement in statements if statement["Resource"]]}


def redis_users(passwords: dict[str, str]) -> str:
    """Return the lines of Redis's configuration that declare the users, with the passwords by component."""
    return "".join(f"user {user(component)} on >{passwords[component]} {rules}\n" for component, rules in REDIS_RULES.items())


def rendered() -> dict[Path, str]:
    """Return the text of each generated file by its path. In the chart's, templates replace <COMPONENT> by a password."""
    policies = {component: s3_policy(component, "BUCKET", "PREFIX") for component in RIGHTS}
    parts = [f"## {component.capitalize()}\n\n```json\n{json.dumps(policy, indent=2)}\n```\n" for component, policy in policies.items()]
    return {USERS_FILE: redis_users({component: f"<{component}>" for component in REDIS_RULES}), PAGE: "\n".join([_PAGE, *parts])}


_PAGE = f"""# Rights

Policies of the components for a bucket of your own, with the least rights that each needs. `python -m services.tools.rights
s3://BUCKET/PREFIX` prints them with your names. Compose and the chart install them on the bundled S3 server.

Workers run models that are other people's code: a worker's key cannot change an experiment, its control or its scores, and cannot remove
or, on servers that know the condition `s3:if-none-match`, replace a trial batch. AWS knows it. For MinIO, which refuses it, leave out each
`Condition`, and switch on the versioning of the bucket to keep a replaced batch.

The dispatcher and workers also have a user each in Redis; aggregator and explorer do not connect to it:

```
{redis_users(dict.fromkeys(REDIS_RULES, "PASSWORD"))}```

The prefix of a release's keys follows from its bucket, and is not known when the users are made. If releases that do not trust each other
share a Redis, write the prefix that `memtail doctor` shows in place of `memtail*:`: otherwise a worker of one can read and change queue and
leases of the others, which costs time but no results.
"""


if __name__ == "__main__":
    if sys.argv[1:]:
        _bucket, _, _prefix = sys.argv[1].removeprefix("s3://").partition("/")
        print(json.dumps({component: s3_policy(component, _bucket, _prefix) for component in RIGHTS}, indent=2))
    else:
        for _path, _text in rendered().items():
            _path.write_text(_text)
