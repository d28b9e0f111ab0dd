"""All exceptions that memtail raises. The text of each is one line that names the thing, the value and the fix.

A library user catches `MemtailError`; the command line prints the line and exits with 2 (1 for `BatchesRefusedError`).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memtail.scores.summary import ScoreSummary


class MemtailError(Exception):
    """Base of every error that a user can fix."""


class SpecError(MemtailError):
    """The experiment file cannot be run as it stands.

    Attributes:
        lines: the text in lines for a terminal, where there are several mistakes; else empty.
    """

    def __init__(self, text: str, lines: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.lines = lines


class DatasetError(MemtailError):
    """A dataset is missing or corrupt, or its content does not fit its declaration."""


class StoreError(MemtailError):
    """The object store cannot be used, or holds an unexpected object."""


class ObjectNotFound(StoreError):  # noqa: N818 - the name that object stores give it
    """There is no object under the key."""


class UnreachableError(StoreError):
    """The server of a store does not respond, or responds with a server error."""


class AccessRefusedError(StoreError):
    """The server of a store does not know the key or the bucket, or does not let the key use it."""


class LocalFileError(StoreError):
    """A file on this machine cannot be written."""


class UnsupportedError(StoreError):
    """An experiment was registered by another version of memtail, and this one cannot serve it."""


class ForeignObjectError(StoreError):
    """The content of an object does not fit its key: damaged, too large, or of another experiment."""


class ScoresError(MemtailError):
    """Published scores are missing, or cannot answer the question."""


class WorkerFaultError(MemtailError):
    """This process can train no shard: its device, disk, cache or installation is at fault. No attempt is charged to the shard."""


class OutcomeError(MemtailError):
    """Training code of the user's own returned something else than the outcomes of its trial."""


class TrainerError(MemtailError):
    """Training code of the user's own failed: it raised, its process died, or it took too long."""


class IncompleteRunError(MemtailError):
    """A run ended without all its trials; the scores of the others are published.

    Attributes:
        summary: summary of the published scores, None if there are none.
    """

    def __init__(self, message: str, summary: "ScoreSummary | None") -> None:
        super().__init__(message)
        self.summary = summary


class ShardsFailedError(IncompleteRunError):
    """Shards failed as often as a run tries them."""


class BatchesRefusedError(IncompleteRunError):
    """Damaged or foreign trial batches were left out."""


class TrainingStopped(Exception):  # noqa: N818 - not an error
    """Training was told to stop; its state is in the checkpoint, if there are checkpoints."""
