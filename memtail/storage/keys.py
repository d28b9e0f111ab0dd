"""Every object key there is, and what a key is. First and last trial are inclusive and zero-padded, so that keys sort as trials do."""

import re
import uuid

from memtail.errors import StoreError


def check(key: str) -> str:
    """The key itself. Raises: StoreError: it could leave the store, or no store could hold it."""
    if not key.isprintable() or any(part in ("", ".", "..") for part in key.split("/")):
        raise StoreError(f"{key!r} is not a key: its parts must be names with one '/' between them")
    return key


def dataset(fingerprint: str, file: str) -> str:
    """One file of a staged dataset."""
    return f"datasets/{fingerprint}/{file}"


def masks(digest: str) -> str:
    """The subsets of an explicit design, by the SHA-256 of the file."""
    return f"masks/{digest}.npy"


def experiments() -> str:
    """Prefix of all experiments."""
    return "experiments/"


def experiment(name: str) -> str:
    """The declaration, its fingerprint and the shard grid."""
    return f"experiments/{name}/experiment.json"


def control(name: str) -> str:
    """Whether the experiment is to run, and how urgently."""
    return f"experiments/{name}/control.json"


def notices(name: str) -> str:
    """Prefix of all notices."""
    return f"experiments/{name}/notices/"


def notice(name: str, source: str) -> str:
    """What a service has to say about the experiment at present."""
    return f"{notices(name)}{source}.json"


def trials(name: str) -> str:
    """Prefix of all trial batches."""
    return f"experiments/{name}/trials/"


def trial_batch(name: str, first: int, last: int) -> str:
    """One trial batch."""
    return f"{trials(name)}{_span(first, last)}.npz"


def checkpoint(name: str, first: int, last: int) -> str:
    """The state of a shard in training."""
    return f"{checkpoints(name)}{_span(first, last)}.pt"


def checkpoints(name: str) -> str:
    """Prefix of all checkpoints."""
    return f"experiments/{name}/checkpoints/"


def probe() -> str:
    """An object that tries out the store, removed at once."""
    return f"probe/{uuid.uuid4().hex}"


def failures(name: str) -> str:
    """Prefix of all failure records."""
    return f"experiments/{name}/failures/"


def failure(name: str, first: int, last: int, attempt: int) -> str:
    """The record of one failed attempt at a shard."""
    return f"{failures(name)}{_span(first, last)}/{attempt}.json"


def scores(name: str, version: str) -> str:
    """Prefix of one published version of the scores."""
    return f"{all_scores(name)}{version}/"


def all_scores(name: str) -> str:
    """Prefix of all published versions."""
    return f"experiments/{name}/scores/"


def latest_scores(name: str) -> str:
    """The pointer to the version that readers are to use."""
    return f"{all_scores(name)}latest.json"


def report(name: str, version: str) -> str:
    """Prefix of one version of the report."""
    return f"{all_reports(name)}{version}/"


def all_reports(name: str) -> str:
    """Prefix of all versions of the report."""
    return f"experiments/{name}/report/"


def latest_report(name: str) -> str:
    """The pointer to the version of the report that readers are to use."""
    return f"{all_reports(name)}latest.json"


def studies(name: str) -> str:
    """Prefix of the results of all studies of the experiment."""
    return f"experiments/{name}/studies/"


def study(name: str, study: str) -> str:
    """Prefix of the result of one study."""
    return f"{studies(name)}{study}/"


def parse_span(key: str) -> tuple[int, int] | None:
    """(first, last) in the key of a trial batch, checkpoint or failure record; None if it is another key."""
    match = re.search(r"/(\d+)-(\d+)(?:\.npz|\.pt|/\d+\.json)$", key)
    return match and (int(match[1]), int(match[2]))


def _span(first: int, last: int) -> str:
    return f"{first:08d}-{last:08d}"
