"""Protocol of the place where the state of one unfinished shard is kept."""

from typing import Protocol

#: Largest state in bytes that a trainer process may have kept.
LARGEST_STATE = 4 << 30


class Checkpoints(Protocol):
    """The place where the state of one unfinished shard is kept."""

    def load(self) -> bytes | None:
        """Return the state saved last, None if there is none."""
        ...

    def save(self, state: bytes) -> None:
        """Replace the saved state."""
        ...
