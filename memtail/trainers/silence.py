"""Silence of training: how long it may show no progress before it counts as hung."""

import time

# Training may be silent for this many times its longest silence before.
_FACTOR = 5


class Silence:
    """The silence of one training. One thread reports progress, any may ask.

    Args:
        seconds: silence after which training counts as hung; longer if it was silent for long before.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._progressed_at: float | None = None
        self._longest = 0.0

    def progress(self) -> None:
        """Report that training advances; silence counts from the first call on."""
        now = time.monotonic()
        if self._progressed_at is not None:
            self._longest = max(self._longest, now - self._progressed_at)
        self._progressed_at = now

    def end(self) -> None:
        """Report that training has ended, so that silence is no hang any more."""
        self._progressed_at = None

    def hung(self) -> float | None:
        """Return the seconds of silence if they are too many, else None."""
        progressed_at = self._progressed_at
        if progressed_at is None:
            return None
        silence = time.monotonic() - progressed_at
        return silence if silence > max(self._seconds, _FACTOR * self._longest) else None
