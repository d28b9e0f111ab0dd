"""All object keys, and the check of a key. First and last trial are inclusive and zero-padded, so that keys sort as trials do."""

import re
import uuid

from memtail.errors import StoreError

# End of the keys of checkpoints of second trainings.
_SECOND = "/second.pt"
#: Largest index of a trial: keys hold eight digits, so that they sort as trials do.
LAST_TRIAL = 99_999_999


def check(key: str) -> str:
    """Return a key if it is valid: printable parts with one `/` between them, none of which is `.` or `..`.

    Raises:
        StoreError: the key could leave the store, or stores cannot hold it.
    """
    if not key.isprintable() or any(part in ("", ".", "..") for part in key.split("/")):
        raise StoreError(f"{key!r} is not a key: its parts must be names with one '/' between them")
    return key


def identity() -> str:
    """Return the key of the store's identity."""
    return "store.json"


def datasets() -> str:
    """Return the prefix of all staged datasets."""
    return "datasets/"


def dataset(fingerprint: str, file: str) -> str:
    """Return the key of one file of a staged dataset."""
    return f"{datasets()}{fingerprint}/{file}"


def dataset_part(fingerprint: str, file: str, digest: str) -> str:
    """Return the key of a part of a large file of a staged dataset, by the SHA-256 of the part."""
    return f"{dataset(fingerprint, file)}.{digest}"


def all_masks() -> str:
    """Return the prefix of all masks."""
    return "masks/"


def masks(digest: str) -> str:
    """Return the key of an explicit design's masks, by the SHA-256 of the file."""
    return f"{all_masks()}{digest}.npy"


def all_weights() -> str:
    """Return the prefix of all weights."""
    return "weights/"


def weights(digest: str) -> str:
    """Return the key of the weights that networks start from, by the SHA-256 of the file."""
    return f"{all_weights()}{digest}"


def experiments() -> str:
    """Return the prefix of all experiments."""
    return "experiments/"


def everything(name: str) -> str:
    """Return the prefix of all objects of an experiment."""
    return f"{experiments()}{name}/"


def top_level() -> tuple[str, ...]:
    """Return the first parts of all keys."""
    return identity(), datasets(), all_masks(), all_weights(), experiments(), changes()


def experiment(name: str) -> str:
    """Return the key of an experiment's record: declaration, fingerprint and shard grid."""
    return f"experiments/{name}/experiment.json"


def control(name: str) -> str:
    """Return the key of an experiment's control: state and priority."""
    return f"experiments/{name}/control.json"


def finished(name: str) -> str:
    """Return the key of the record of an experiment's end."""
    return f"experiments/{name}/finished.json"


def changes() -> str:
    """Return the prefix of all change markers."""
    return "changes/"


def change(name: str) -> str:
    """Return the key of the change marker of an experiment: services look at it again, although it was finished."""
    return f"{changes()}{name}"


def device(name: str) -> str:
    """Return the key of the kind of device that an experiment requires, if it requires one."""
    return f"experiments/{name}/device.json"


def notices(name: str) -> str:
    """Return the prefix of all notices."""
    return f"experiments/{name}/notices/"


def notice(name: str, source: str) -> str:
    """Return the key of a service's current notice about an experiment."""
    return f"{notices(name)}{source}.json"


def trials(name: str) -> str:
    """Return the prefix of all trial batches."""
    return f"experiments/{name}/trials/"


def trial_batch(name: str, first: int, last: int) -> str:
    """Return the key of the trial batch of a shard."""
    return f"{trials(name)}{_span(first, last)}.npz"


def checkpoint(name: str, first: int, last: int, second: bool = False) -> str:
    """Return the key of the checkpoint of a shard in training, or of its second training."""
    return f"{checkpoints(name)}{_span(first, last)}{_SECOND if second else '.pt'}"


def is_second_checkpoint(key: str) -> bool:
    """Return whether a key is that of the checkpoint of a second training."""
    return key.endswith(_SECOND)


def checkpoints(name: str) -> str:
    """Return the prefix of all checkpoints."""
    return f"experiments/{name}/checkpoints/"


def models(name: str) -> str:
    """Return the prefix of all models that are kept."""
    return f"experiments/{name}/models/"


def model(name: str, trial: int) -> str:
    """Return the key of the weights of a trial's model, if it is kept."""
    return f"{models(name)}{trial:08d}.safetensors"


def probe() -> str:
    """Return a new key of a temporary object by which a store is verified."""
    return f"probe/{uuid.uuid4().hex}"


def discards(name: str) -> str:
    """Return the prefix of all records of discards."""
    return f"experiments/{name}/discarded/"


def discards_of(name: str, first: int, last: int) -> str:
    """Return the prefix of the records of a shard's discards."""
    return f"{discards(name)}{_span(first, last)}/"


def discard(name: str, first: int, last: int, when: str) -> str:
    """Return the key of the record of a discard, which is written before the trial batch is removed."""
    return f"{discards_of(name, first, last)}{when}.json"


def discard_end(key: str) -> str:
    """Return the key of the record that is written after the removal, by the key of the record before it, or its own."""
    return f"{key.removesuffix('.json').removesuffix('-removed')}-removed.json"


def audits(name: str) -> str:
    """Return the prefix of all records of people's actions."""
    return f"experiments/{name}/audit/"


def audit(name: str, action: str) -> str:
    """Return the key of the record of an action, by its time and a random suffix."""
    return f"{audits(name)}{action}.json"


def replicas(name: str) -> str:
    """Return the prefix of all comparisons of second trainings with committed batches."""
    return f"experiments/{name}/replicas/"


def replica(name: str, first: int, last: int, verdict: str) -> str:
    """Return the key of a shard's comparison with the verdict `equal` or `different`."""
    return f"{replicas(name)}{_span(first, last)}/{verdict}.json"


def failures(name: str) -> str:
    """Return the prefix of all failure records."""
    return f"experiments/{name}/failures/"


def failures_of(name: str, first: int, last: int) -> str:
    """Return the prefix of the failure records of a shard."""
    return f"{failures(name)}{_span(first, last)}/"


def failure(name: str, first: int, last: int, attempt: int) -> str:
    """Return the key of the record of one failed attempt at a shard."""
    return f"{failures_of(name, first, last)}{attempt}.json"


def statistics(name: str) -> str:
    """Return the prefix of an experiment's statistics."""
    return f"experiments/{name}/statistics/"


def snapshot(name: str) -> str:
    """Return the key of the snapshot of an experiment's statistics."""
    return f"{statistics(name)}snapshot.npz"


def scores(name: str, version: str) -> str:
    """Return the prefix of one published version of the scores."""
    return f"{all_scores(name)}{version}/"


def all_scores(name: str) -> str:
    """Return the prefix of all published versions of the scores."""
    return f"experiments/{name}/scores/"


def latest_scores(name: str) -> str:
    """Return the key of the pointer to the latest scores."""
    return f"{all_scores(name)}latest.json"


def features(name: str) -> str:
    """Return the key of the pointer to the dataset of features that one model of the experiment computes."""
    return f"experiments/{name}/features.json"


def report(name: str, version: str) -> str:
    """Return the prefix of one version of the report."""
    return f"{all_reports(name)}{version}/"


def all_reports(name: str) -> str:
    """Return the prefix of all versions of the report."""
    return f"experiments/{name}/report/"


def latest_report(name: str) -> str:
    """Return the key of the pointer to the latest report."""
    return f"{all_reports(name)}latest.json"


def studies(name: str) -> str:
    """Return the prefix of the results of all studies of an experiment."""
    return f"experiments/{name}/studies/"


def study(name: str, study: str) -> str:
    """Return the prefix of the result of one study."""
    return f"{studies(name)}{study}/"


def parse_span(key: str) -> tuple[int, int] | None:
    """Return (first, last) of the key of a trial batch, checkpoint, failure record or comparison, None of any other key."""
    match = re.search(r"/(\d+)-(\d+)(?:\.npz|\.pt|/second\.pt|/(?:\d+|equal|different)\.json)$", key)
    return match and (int(match[1]), int(match[2]))


def _span(first: int, last: int) -> str:
    return f"{first:08d}-{last:08d}"
