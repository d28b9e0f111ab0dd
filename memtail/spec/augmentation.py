"""The `training.augmentation` part of an experiment: steps that change the images of a batch at random."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, SerializerFunctionWrapHandler, WrapSerializer, model_validator

from memtail.spec.base import Part


def _ordered(bounds: list[float]) -> list[float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"goes from the smallest to the largest value, not from {bounds[0]} to {bounds[1]}")
    return bounds


_Two = Field(min_length=2, max_length=2)
_Shares = Annotated[list[Annotated[float, Field(gt=0, le=1)]], _Two, AfterValidator(_ordered)]
_Ratios = Annotated[list[Annotated[float, Field(gt=0)]], _Two, AfterValidator(_ordered)]
_Reach = Annotated[float, Field(ge=0)]


class Flip(Part):
    """Mirrors half of the images left to right.

    Attributes:
        name: the augmentation.
    """

    name: Literal["flip"]


class CropFlip(Part):
    """Mirrors half of the images left to right, and shifts all by up to an eighth of their height; shifts fill with 0.

    Attributes:
        name: the augmentation.
    """

    name: Literal["crop-flip"]


class RandomResizedCrop(Part):
    """Resizes a random part of each image to the size of the image, as torchvision does: the recipe of ImageNet.

    Attributes:
        name: the augmentation.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest ratio of width to height.
    """

    name: Literal["random-resized-crop"]
    scale: _Shares = [0.08, 1.0]
    ratio: _Ratios = [0.75, 4 / 3]


class ColorJitter(Part):
    """Changes brightness, contrast, saturation and hue of each image in random order, as torchvision does.

    Attributes:
        name: the augmentation.
        brightness: largest change of the factor of all pixels, which is 1 without a change.
        contrast: largest change of the factor of the distance from the mean grey.
        saturation: largest change of the factor of the distance from grey; of images with three channels.
        hue: largest shift of the hue, as a share of the circle of hues; of images with three channels.
    """

    name: Literal["color-jitter"]
    brightness: _Reach = 0.0
    contrast: _Reach = 0.0
    saturation: _Reach = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if not (self.brightness or self.contrast or self.saturation or self.hue):
            raise ValueError("color-jitter changes nothing: set brightness, contrast, saturation or hue")
        return self


class RandomErasing(Part):
    """Replaces a random rectangle of some images by the mean pixel of the training images, as torchvision does after normalisation.

    Attributes:
        name: the augmentation.
        probability: share of the images.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest ratio of height to width.
    """

    name: Literal["random-erasing"]
    probability: Annotated[float, Field(gt=0, le=1)] = 0.5
    scale: _Shares = [0.02, 0.33]
    ratio: _Ratios = [0.3, 3.3]


AugmentationSpec = Annotated[Flip | CropFlip | RandomResizedCrop | ColorJitter | RandomErasing, Field(discriminator="name")]


def _as_list(value: Any) -> Any:
    if value == "none":
        return []
    steps = value if isinstance(value, list) else [value]
    return [{"name": step} if isinstance(step, str) else step for step in steps]


def _as_name(steps: list[AugmentationSpec], serialize: SerializerFunctionWrapHandler) -> Any:
    if not steps:
        return "none"
    return steps[0].name if len(steps) == 1 and isinstance(steps[0], Flip | CropFlip) else serialize(steps)


# Written as in 0.1.0, which knew `none`, `flip` and `crop-flip`, where that is possible.
Chain = Annotated[
    list[AugmentationSpec],
    BeforeValidator(_as_list, json_schema_input_type=Literal["none", "flip", "crop-flip"] | list[AugmentationSpec]),
    WrapSerializer(_as_name),
]
