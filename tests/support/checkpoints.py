"""Checkpoints and models in memory."""


class KeptCheckpoints:
    """`memtail.trainers.checkpoints.Checkpoints` that keeps the last state, and the models."""

    state: bytes | None = None

    def __init__(self) -> None:
        self.models: dict[int, bytes] = {}

    def load(self) -> bytes | None:
        return self.state

    def save(self, state: bytes) -> None:
        self.state = state

    def keep_model(self, trial: int, model: bytes) -> None:
        self.models[trial] = model
