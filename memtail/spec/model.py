"""The `model` part of an experiment: its architecture."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from memtail.spec.base import Part


class Mlp(Part):
    """Fully connected layers with ReLU between them.

    Attributes:
        name: the architecture.
        hidden: widths of the hidden layers; an empty list is a linear model.
    """

    name: Literal["mlp"] = "mlp"
    hidden: list[Annotated[int, Field(ge=1)]] = [256]


class Cnn(Part):
    """3x3 convolutions, each followed by ReLU and 2x2 max pooling, then one hidden layer.

    Attributes:
        name: the architecture.
        channels: output channels of the convolutions.
        hidden: width of the hidden layer.
    """

    name: Literal["cnn"] = "cnn"
    channels: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [16, 32]
    hidden: Annotated[int, Field(ge=1)] = 128


class NamedModel(Part):
    """A larger architecture.

    Attributes:
        name: `resnet9`, `resnet18`, `resnet50`, `densenet100`, `inception`, a torchvision classification model, or a function of your own,
            `package.module:function`.
        options: keyword arguments of the model's builder.
    """

    name: str
    options: dict[str, Any] = {}


def _model_kind(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return name if name in ("mlp", "cnn") else "named"


ModelSpec = Annotated[
    Annotated[Mlp, Tag("mlp")] | Annotated[Cnn, Tag("cnn")] | Annotated[NamedModel, Tag("named")],
    Discriminator(_model_kind),
]
