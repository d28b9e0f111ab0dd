"""What the final models get right: correctness, and logit margins where they are recorded."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from memtail.trainers.images.images import DeviceImages

# Small enough for what a layer gives to stay in a processor's cache.
_BATCH = {"cpu": 256, "cuda": 2048, "mps": 1024}


@dataclass(frozen=True)
class Outcome:
    """Of S networks on one split: correctness bool [S, N], margins float16 [S, N] or None, and which gave only finite logits, [S].

    `given` is the class that each training image was given, int32 [S, N]; None of test images.
    """

    correct: npt.NDArray[np.bool_]
    margin: npt.NDArray[np.float16] | None
    finite: npt.NDArray[np.bool_]
    given: npt.NDArray[np.int32] | None


@torch.no_grad()
def evaluate(stack: nn.Module, images: DeviceImages, split: str, margins: bool, autocast: torch.autocast, trained_batch: int) -> Outcome:
    """Run a split through a stack of networks, in batches that fit where batches of `trained_batch` were trained.

    An image is classified correctly if its label has the largest logit (the first such, in a tie). The margin is
    z_y - logsumexp of the other logits, clipped to what float16 holds.
    """
    labels = images.train_labels if split == "train" else images.test_labels
    stack.eval()
    correct, margin, given, finite = [], [], [], None
    size = min(_BATCH[images.device.type], 4 * trained_batch)
    for start in range(0, len(labels), size):
        wanted = labels[start : start + size]
        with autocast:
            logits = stack(images.split(split, start, start + len(wanted))).float()
        found = logits.argmax(-1)
        correct.append(found == wanted)
        if split == "train":
            given.append(found.to(torch.int32))
        fine = logits.isfinite().flatten(1).all(1)
        finite = fine if finite is None else finite & fine
        if margins:
            margin.append(_margins(logits, wanted))
    stack.train()
    assert finite is not None
    return Outcome(
        torch.cat(correct, 1).cpu().numpy(),
        torch.cat(margin, 1).cpu().numpy() if margins else None,
        finite.cpu().numpy(),
        torch.cat(given, 1).cpu().numpy() if given else None,
    )


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    own = labels.expand(len(logits), -1)[..., None]
    others = logits.scatter(-1, own, float("-inf")).logsumexp(-1)
    margin = logits.gather(-1, own).squeeze(-1) - others
    largest = torch.finfo(torch.float16).max
    return margin.clamp(-largest, largest).to(torch.float16)
