"""Evaluates the final models of a stack: correctness, predicted classes, and logit margins and probabilities where they are recorded."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from memtail.spec import RecordedOutcomes
from memtail.statistics.soft import ONE
from memtail.trainers.images.images import DeviceImages

_LARGEST = torch.finfo(torch.float16).max
# Images per forward pass: few enough for a layer's outputs to stay in a processor's cache.
_BATCH = {"cpu": 256, "cuda": 2048, "mps": 1024}


@dataclass(frozen=True)
class SplitOutcomes:
    """Outcomes of S networks on the N examples of one split.

    Attributes:
        correct: bool [S, N]; the predicted class is the label.
        predicted_class: int32 [S, N].
        margin: float16 [S, N]; None where margins are not recorded.
        score: uint8 [S, N], the probability of the label in 255ths; None where scores are not recorded.
        finite: bool [S]; all logits of the network are finite.
    """

    correct: npt.NDArray[np.bool_]
    predicted_class: npt.NDArray[np.int32]
    margin: npt.NDArray[np.float16] | None
    score: npt.NDArray[np.uint8] | None
    finite: npt.NDArray[np.bool_]

    @classmethod
    def of_none(cls, networks: int, record: RecordedOutcomes) -> "SplitOutcomes":
        """Return the outcomes on a split without examples, as the test split of a dataset without a test set."""
        none = (networks, 0)
        margin = np.empty(none, np.float16) if record.margins else None
        score = np.empty(none, np.uint8) if record.keeps_scores else None
        return cls(np.empty(none, np.bool_), np.empty(none, np.int32), margin, score, np.ones(networks, np.bool_))


@torch.no_grad()
def evaluate(
    stack: nn.Module,
    images: DeviceImages,
    split: str,
    record: RecordedOutcomes,
    autocast: torch.autocast,
    trained_batch: int,
    on_batch: Callable[[], object] = lambda: None,
) -> SplitOutcomes:
    """Run a split through a stack of networks.

    The predicted class has the largest logit (the first of several). The margin is z_y - logsumexp of the other logits, clipped to the
    range of float16; its logistic function is the probability of the label.

    Args:
        stack: S networks; left in training mode.
        images: the dataset on the device.
        split: "train" or "test".
        record: what to compute beside correctness.
        autocast: the context of the forward pass.
        trained_batch: examples per training step. Evaluation takes at most four times as many at once, so that it fits into memory.
        on_batch: called after each batch.

    Returns:
        The outcomes, in host memory.
    """
    split_labels = images.train_labels if split == "train" else images.test_labels
    correct, predicted_class, margin, score, finite = [], [], [], [], []
    size = min(_BATCH[images.device.type], 4 * trained_batch)
    stack.eval()
    for start in range(0, len(split_labels), size):
        labels = split_labels[start : start + size]
        with autocast:
            logits = stack(images.split(split, start, start + len(labels))).float()
        predicted = logits.argmax(-1)
        correct.append(predicted == labels)
        predicted_class.append(predicted.to(torch.int32))
        finite.append(logits.isfinite().flatten(1).all(1))
        if record.margins or record.keeps_scores:
            margins = _margins(logits, labels)
            margin.append(margins.clamp(-_LARGEST, _LARGEST).to(torch.float16))
            score.append((margins.sigmoid() * ONE).round().to(torch.uint8))
        on_batch()
    stack.train()
    return SplitOutcomes(
        torch.cat(correct, 1).cpu().numpy(),
        torch.cat(predicted_class, 1).cpu().numpy(),
        torch.cat(margin, 1).cpu().numpy() if record.margins else None,
        torch.cat(score, 1).cpu().numpy() if record.keeps_scores else None,
        torch.stack(finite).all(0).cpu().numpy(),
    )


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    label = labels.expand(len(logits), -1)[..., None]
    others = logits.scatter(-1, label, float("-inf")).logsumexp(-1)
    return logits.gather(-1, label).squeeze(-1) - others
