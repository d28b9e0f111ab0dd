"""Augmentations by name: parts of a training recipe -> draws for an epoch, and augmented images.

Draws are made on the host, from a stream of each trial and epoch, and are applied on the device to a batch of all trials of a stack. A step
takes and returns uint8 images. No sum of it depends on the order of its terms, and it rounds after each operation, so that no bit depends
on the stack.

A further augmentation is an entry here and a class in `memtail.spec`, since its constants are declared and validated there.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memtail.randomness import Purpose, stream
from memtail.spec import AugmentationSpec, ColorJitter, CropFlip, Flip, RandomErasing, RandomResizedCrop

#: Draws of a step for the images of an epoch, one entry per position in the epoch's order: arrays [m, ...].
Draws = dict[str, npt.NDArray[Any]]

# Attempts to draw a rectangle that fits into the image, as in torchvision.
_ATTEMPTS = 10


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of one epoch.

    Attributes:
        names: of the steps.
        draws: of each step, arrays [S, m, ...].
    """

    names: tuple[str, ...]
    draws: tuple[Draws, ...]


def epoch_augmentation(
    steps: Sequence[AugmentationSpec], seed: int, trials: Sequence[int], epoch: int, m: int, size: Sequence[int]
) -> Augmentation | None:
    """Draw the augmentation of an epoch: a pure function of (seed, trial, epoch). None if there are no steps.

    Args:
        steps: of the recipe.
        seed: the experiment's seed.
        trials: the S trials of a stack.
        epoch: from 0.
        m: examples in each trial's subset.
        size: height and width of the images.
    """
    if not steps:
        return None
    streams = [stream(seed, Purpose.AUGMENTATION, trial, epoch) for trial in trials]
    draws = []
    for step in steps:
        drawn = [_STEPS[step.name][0](step, draw, m, *size) for draw in streams]
        draws.append({name: np.stack([each[name] for each in drawn]) for name in drawn[0]})
    return Augmentation(tuple(step.name for step in steps), tuple(draws))


def augment(images: Tensor, names: Sequence[str], draws: Sequence[dict[str, Tensor]], mean: Tensor) -> Tensor:
    """Apply the steps to uint8 images [S, B, H, W, C].

    Args:
        images: a batch.
        names: of the steps.
        draws: of the batch, for each step: tensors [S, B, ...].
        mean: float32 [C], the mean pixel.
    """
    for name, drawn in zip(names, draws, strict=True):
        images = _STEPS[name][1](images, drawn, mean)
    return images


def _draw_flip(step: Flip, draw: np.random.Generator, m: int, height: int, width: int) -> Draws:
    return {"flip": draw.random(m) < 0.5}


def _flip(images: Tensor, drawn: dict[str, Tensor], mean: Tensor) -> Tensor:
    return torch.where(drawn["flip"][..., None, None, None], images.flip(3), images)


def _draw_crop_flip(step: CropFlip, draw: np.random.Generator, m: int, height: int, width: int) -> Draws:
    flip = draw.random(m) < 0.5
    reach = max(1, height // 8)
    down, right = draw.integers(-reach, reach + 1, (2, m))
    return {"flip": flip, "down": down, "right": right}


def _crop_flip(images: Tensor, drawn: dict[str, Tensor], mean: Tensor) -> Tensor:
    """Mirror, then shift; shifts fill with 0."""
    height, width = images.shape[2:4]
    row = torch.arange(height, device=images.device) - drawn["down"][..., None]
    columns = torch.arange(width, device=images.device)
    column = torch.where(drawn["flip"][..., None], width - 1 - columns, columns) - drawn["right"][..., None]
    inside = ((row >= 0) & (row < height))[..., :, None] & ((column >= 0) & (column < width))[..., None, :]
    moved = images.take_along_dim(row.clamp(0, height - 1)[:, :, :, None, None], dim=2)
    moved = moved.take_along_dim(column.clamp(0, width - 1)[:, :, None, :, None], dim=3)
    return moved * inside[..., None]


def _draw_rectangles(
    draw: np.random.Generator, m: int, area: int, scale: Sequence[float], ratio: Sequence[float]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Draw rectangles.

    Returns:
        Two sides [attempts, m], first the one that grows with the ratio; and a place [2, m], each in [0, 1).
    """
    areas = area * draw.uniform(scale[0], scale[1], (_ATTEMPTS, m))
    ratios = np.exp(draw.uniform(math.log(ratio[0]), math.log(ratio[1]), (_ATTEMPTS, m)))
    sides = np.sqrt(areas * ratios).round().astype(np.int64), np.sqrt(areas / ratios).round().astype(np.int64)
    return *sides, draw.random((2, m))


def _draw_resized_crop(step: RandomResizedCrop, draw: np.random.Generator, m: int, height: int, width: int) -> Draws:
    across, down, place = _draw_rectangles(draw, m, height * width, step.scale, step.ratio)
    fits = (across > 0) & (across <= width) & (down > 0) & (down <= height)
    first, column = fits.argmax(0), np.arange(m)
    none = ~fits.any(0)  # the largest crop of a permitted ratio then, at the centre
    across = np.where(none, min(width, max(1, round(height * step.ratio[1]))), across[first, column])
    down = np.where(none, min(height, max(1, round(width / step.ratio[0]))), down[first, column])
    place[:, none] = 0.5
    top, left = (place * (np.array([height - down, width - across]) + ~none)).astype(np.int64)
    return {"top": top, "left": left, "height": down, "width": across}


def _resized_crop(images: Tensor, drawn: dict[str, Tensor], mean: Tensor) -> Tensor:
    """Resize parts of the images to the size of the whole, by bilinear interpolation."""
    down = _resized(images.flatten(0, 1), drawn["top"], drawn["height"])
    across = _resized(down.transpose(1, 2), drawn["left"], drawn["width"])
    return across.round().to(torch.uint8).transpose(1, 2).reshape(images.shape)


def _resized(images: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """Resize a part of the first side of images [N, L, ...] to the whole side, in float32."""
    n, side = images.shape[:2]
    points = (torch.arange(side, device=images.device) + 0.5) * length.reshape(n, 1) / side - 0.5
    points = points.clamp(min=0)
    low = points.floor()
    high = torch.minimum(low + 1, length.reshape(n, 1) - 1)
    first = torch.arange(n, device=images.device)[:, None] * side + start.reshape(n, 1)
    rows = images.reshape(n * side, -1)  # whole rows are faster to gather than pixels
    below, above = (rows.index_select(0, (first + each.long()).flatten()).float() for each in (low, high))
    share = (points - low).reshape(-1, 1)
    return below.mul_(1 - share).add_(above.mul_(share)).view(images.shape)


def _draw_color_jitter(step: ColorJitter, draw: np.random.Generator, m: int, height: int, width: int) -> Draws:
    reaches = [step.brightness, step.contrast, step.saturation, step.hue]
    centres = [1.0, 1.0, 1.0, 0.0]
    bounds = [(max(0.0, centre - reach) if centre else -reach, centre + reach) for centre, reach in zip(centres, reaches, strict=True)]
    factors = np.stack([draw.uniform(low, high, m) for low, high in bounds], 1).astype(np.float32)
    order = draw.random((m, 4)).argsort(1)
    changed = [place for place, reach in enumerate(reaches) if reach]
    # those that change nothing come out of the order
    kept = order[np.isin(order, changed)].reshape(m, len(changed))
    return {"factors": factors, "order": kept}


def _color_jitter(images: Tensor, drawn: dict[str, Tensor], mean: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of each image in its drawn order."""
    flat = images.flatten(0, 1).clone()
    factors, order = drawn["factors"].flatten(0, 1), drawn["order"].flatten(0, 1)
    for slot in range(order.shape[1]):
        for change, function in enumerate((_brightness, _contrast, _saturation, _hue)):
            if len(chosen := (order[:, slot] == change).nonzero()[:, 0]):
                flat[chosen] = function(flat[chosen].float(), factors[chosen, change, None, None, None])
    return flat.view(images.shape)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return _bytes(images * factor)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    grey = _grey(images) if images.shape[-1] == 3 else images
    mean = grey.long().sum((1, 2, 3), keepdim=True) / grey[0].numel()  # whole numbers: their sum is exact in any order
    return _bytes(images * factor + mean * (1 - factor))


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _bytes(images * factor + _grey(images) * (1 - factor)) if images.shape[-1] == 3 else _bytes(images)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    if images.shape[-1] != 3:
        return _bytes(images)
    red, green, blue = images.unbind(-1)
    most, least = images.amax(-1), images.amin(-1)
    spread = most - least
    divisor = spread.clamp(min=1)
    sixth = torch.where(
        most == red, (green - blue) / divisor, torch.where(most == green, (blue - red) / divisor + 2, (red - green) / divisor + 4)
    )
    places = (torch.tensor([5.0, 3.0, 1.0], device=images.device) + (sixth[..., None] + 6 * shift)).remainder(6)
    return (most[..., None] - spread[..., None] * torch.minimum(places, 4 - places).clamp(0, 1)).round().to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(-1)
    return (red * 0.2989 + green * 0.587 + blue * 0.114).floor()[..., None]


def _bytes(images: Tensor) -> Tensor:
    return images.clamp(0, 255).to(torch.uint8)


def _draw_erasing(step: RandomErasing, draw: np.random.Generator, m: int, height: int, width: int) -> Draws:
    erased = draw.random(m) < step.probability
    down, across, place = _draw_rectangles(draw, m, height * width, step.scale, step.ratio)
    fits = (across < width) & (down < height)
    first, column = fits.argmax(0), np.arange(m)
    erased &= fits.any(0)
    down, across = (np.where(erased, side[first, column], 0) for side in (down, across))
    top, left = (place * np.array([height - down + 1, width - across + 1])).astype(np.int64)
    return {"top": top, "left": left, "height": down, "width": across}


def _erasing(images: Tensor, drawn: dict[str, Tensor], mean: Tensor) -> Tensor:
    """Replace rectangles by the mean pixel."""
    rows = _within(images.shape[2], drawn["top"], drawn["height"])
    columns = _within(images.shape[3], drawn["left"], drawn["width"])
    erased = rows[:, :, :, None, None] & columns[:, :, None, :, None]
    return torch.where(erased, mean.round().to(torch.uint8), images)


def _within(size: int, start: Tensor, length: Tensor) -> Tensor:
    """Return which of `size` places lie within a length from a start on: bool [S, B, size]."""
    place = torch.arange(size, device=start.device) - start[..., None]
    return (place >= 0) & (place < length[..., None])


_Draw = Callable[[Any, np.random.Generator, int, int, int], Draws]
_Apply = Callable[[Tensor, dict[str, Tensor], Tensor], Tensor]

# Each is drawn by its own class of `memtail.spec`, for m images of a height and a width.
_STEPS: dict[str, tuple[_Draw, _Apply]] = {
    "flip": (_draw_flip, _flip),
    "crop-flip": (_draw_crop_flip, _crop_flip),
    "random-resized-crop": (_draw_resized_crop, _resized_crop),
    "color-jitter": (_draw_color_jitter, _color_jitter),
    "random-erasing": (_draw_erasing, _erasing),
}
