"""Protocol of the place where the state of one unfinished shard is kept, and the models of its trained trials."""

from typing import Protocol

#: Largest state in bytes that a trainer process may have kept.
LARGEST_STATE = 4 << 30


class Checkpoints(Protocol):
    """The place where the state of one unfinished shard is kept, and the models of its trained trials."""

    def load(self) -> bytes | None:
        """Return the state saved last, None if there is none."""
        ...

    def save(self, state: bytes) -> None:
        """Replace the saved state."""
        ...

    def keep_model(self, trial: int, model: bytes) -> None:
        """Keep the model of a trained trial, as `memtail.models.trained.packed` makes it. A checkpoint that follows does not hold it."""
        ...
