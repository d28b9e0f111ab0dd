"""Evaluates the final models of a stack: correctness, predicted classes, and logit margins and probabilities where they are recorded."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import structlog
import torch
from torch import Tensor, nn

from memtail.spec import RecordedOutcomes
from memtail.statistics.soft import ONE
from memtail.trainers.images.devices import is_out_of_memory
from memtail.trainers.images.images import DeviceImages
from memtail.trainers.images.precision import exact_last_layer

log = structlog.get_logger()

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
    range of float16; its logistic function is the probability of the label. On CUDA the last layer computes in float32 at least.

    Args:
        stack: S networks; left in training mode.
        images: the dataset on the device.
        split: "train" or "test".
        record: what to compute beside correctness.
        autocast: the context of the forward pass.
        trained_batch: examples per training step. Evaluation takes at most four times as many at once, so that it fits into memory;
            if it does not, fewer.
        on_batch: called after each batch.

    Returns:
        The outcomes, in host memory.
    """
    split_labels = images.train_labels if split == "train" else images.test_labels
    correct, predicted_class, margin, score, finite = [], [], [], [], []
    size = min(_BATCH[images.device.type], 4 * trained_batch)

    def logits_of(start: int, stop: int) -> Tensor:
        with autocast:
            return cast(Tensor, stack(images.split(split, start, stop)).float())

    stack.eval()
    with exact_last_layer(stack) if images.device.type == "cuda" else nullcontext():
        for start, stop, logits in _in_batches(logits_of, len(split_labels), size):
            labels = split_labels[start:stop]
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


def _in_batches(logits_of: Callable[[int, int], Tensor], count: int, size: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield start, stop and logits of batches of at most `size` examples, which are halved if the device runs out of memory."""
    start = 0
    while start < count:
        stop = min(start + size, count)
        try:
            logits = logits_of(start, stop)
        except Exception as error:
            if stop - start == 1 or not is_out_of_memory(error):
                raise
            size = (stop - start) // 2
            log.warning("out of device memory, halving the batches of the evaluation", examples=stop - start, into=size)
        else:
            yield start, stop, logits
            start = stop
            continue
        torch.cuda.empty_cache()  # when the error has let go of its tensors; does nothing where CUDA was not used


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    label = labels.expand(len(logits), -1)[..., None]
    others = logits.scatter(-1, label, float("-inf")).logsumexp(-1)
    return logits.gather(-1, label).squeeze(-1) - others
