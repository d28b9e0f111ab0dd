"""Format of the checkpoints of one unfinished shard.

A checkpoint holds the results of the stacks already trained and the state of the stack in training. Its layout has a number, and
`decode` refuses every other one: a checkpoint that cannot be restored is dropped and costs the time since the shard began, never a result.
"""

import io
from dataclasses import dataclass, field
from typing import Any

import torch

from memtail.trainers.images.evaluation import SplitOutcomes
from memtail.trainers.images.stack_trainer import StackResult

#: Number of the layout; raised whenever a key of a checkpoint, or of a stack's state, changes; readers ignore further keys.
LAYOUT = 2

_OUTCOMES = ("correct", "predicted_class", "margin", "score", "finite")


@dataclass(frozen=True)
class ShardState:
    """Everything that the remaining training of a shard depends on.

    Attributes:
        fingerprint: of the experiment.
        finished: trials and results of the stacks already trained, in order.
        stack: state of the stack in training (see `StackedRun.state`).
        kinds: kinds of the devices so far, in the order of use.
    """

    fingerprint: str
    finished: list[tuple[list[int], StackResult]]
    stack: dict[str, Any]
    kinds: list[str] = field(default_factory=list)


def encode(state: ShardState) -> bytes:
    """Return a checkpoint in the format of `torch.save`."""
    buffer = io.BytesIO()
    finished = [_to_tensors(trials, result) for trials, result in state.finished]
    content = {"layout": LAYOUT, "fingerprint": state.fingerprint, "finished": finished, "stack": state.stack, "kinds": state.kinds}
    torch.save(content, buffer)
    return buffer.getvalue()


def decode(data: bytes, fingerprint: str) -> ShardState:
    """Read a checkpoint into host memory. Its bytes run no code.

    Args:
        data: as `encode` made it.
        fingerprint: of the experiment in training.

    Raises:
        Exception: the checkpoint is damaged, or has another layout or fingerprint. `torch.load` does not limit what it raises.
    """
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if (layout := state.get("layout", 1)) != LAYOUT:
        raise ValueError(f"its layout is {layout}, this version reads {LAYOUT}")
    if state["fingerprint"] != fingerprint:
        raise ValueError("it belongs to another experiment")
    return ShardState(fingerprint, [_from_tensors(entry) for entry in state["finished"]], state["stack"], state.get("kinds", []))


def _to_tensors(trials: list[int], result: StackResult) -> dict[str, Any]:
    state: dict[str, Any] = {"trials": trials, "loss": torch.from_numpy(result.loss)}
    if result.snapshots:
        state["snapshots"] = {epoch: torch.from_numpy(correct) for epoch, correct in result.snapshots.items()}
    for split, outcomes in (("train", result.train), ("test", result.test)):
        for name in _OUTCOMES:
            array = getattr(outcomes, name)
            state[f"{split}_{name}"] = None if array is None else torch.from_numpy(array)
    return state


def _from_tensors(state: dict[str, Any]) -> tuple[list[int], StackResult]:
    arrays: dict[str, Any] = {name: value.cpu().numpy() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
    arrays.setdefault("train_score", None)  # of versions without scores
    arrays.setdefault("test_score", None)
    train, test = (SplitOutcomes(*(arrays[f"{split}_{name}"] for name in _OUTCOMES)) for split in ("train", "test"))
    snapshots = {epoch: correct.cpu().numpy() for epoch, correct in state.get("snapshots", {}).items()}
    return state["trials"], StackResult(train, test, arrays["loss"], snapshots)
