"""The `model` part of an experiment: its architecture, and the weights that it starts from."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from memtail.spec.base import Part

# Names of published weights; all else is a file.
_PUBLISHED = re.compile(r"[A-Z][A-Z0-9_]*")


class _Model(Part):
    @property
    def weights_file(self) -> Path | None:
        """The file of the weights that the network starts from, if any."""
        return None


class Mlp(_Model):
    """Fully connected layers with ReLU between them.

    Attributes:
        name: the architecture.
        hidden: widths of the hidden layers; an empty list is a linear model.
    """

    name: Literal["mlp"] = "mlp"
    hidden: list[Annotated[int, Field(ge=1)]] = [256]


class Cnn(_Model):
    """3x3 convolutions, each followed by ReLU and 2x2 max pooling, then one hidden layer.

    Attributes:
        name: the architecture.
        channels: output channels of the convolutions.
        hidden: width of the hidden layer.
    """

    name: Literal["cnn"] = "cnn"
    channels: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [16, 32]
    hidden: Annotated[int, Field(ge=1)] = 128


class NamedModel(_Model):
    """A larger architecture.

    Attributes:
        name: `convnet8`, `resnet9`, `resnet18`, `resnet50`, `densenet100`, `inception`, a torchvision classification model, or a function
            of your own, `package.module:function`.
        options: keyword arguments of the model's builder. `stem` of `resnet18` and `resnet50` is `cifar`, a 3x3 convolution, or `imagenet`,
            a 7x7 convolution of stride 2 and pooling; by default it is `cifar` for images below 128 pixels.
        weights: weights that the network starts from: a file with a state dict (`torch.save` or safetensors), or the name of published
            weights of a torchvision model, such as `IMAGENET1K_V2`. A last layer for another number of classes starts from initial weights.
        freeze: names of parts or parameters that stay as they are, such as `layer1`; their batch normalisation keeps its statistics, too.
    """

    name: str
    options: dict[str, Any] = {}
    weights: Annotated[str, Field(min_length=1)] | None = None
    freeze: list[Annotated[str, Field(min_length=1)]] = []

    @model_validator(mode="before")
    @classmethod
    def _is_no_other_misspelt(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.keys() - cls.model_fields.keys():
            near = difflib.get_close_matches(str(data.get("name")), ("mlp", "cnn"), n=1)
            if near:  # whose keys these may be
                raise ValueError(f"there is no '{data['name']}': did you mean '{near[0]}'?")
        return data

    @field_validator("weights")
    @classmethod
    def _weights_stay(cls, value: str | None) -> str | None:
        if value == "DEFAULT":
            raise ValueError("are other weights in another version of torchvision: name one version, such as IMAGENET1K_V1")
        return value

    @property
    def is_user_code(self) -> bool:
        """Whether the network is of the user's own; a builder of memtail's may build a `model` of its options, which may be one."""
        return ":" in self.name and (not self.name.startswith("memtail.") or "model" in self.options)

    @property
    def weights_file(self) -> Path | None:
        """The file of the weights that the network starts from, if any."""
        return None if self.weights is None or _PUBLISHED.fullmatch(self.weights) else Path(self.weights)


def _model_kind(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return name if name in ("mlp", "cnn") else "named"


ModelSpec = Annotated[
    Annotated[Mlp, Tag("mlp")] | Annotated[Cnn, Tag("cnn")] | Annotated[NamedModel, Tag("named")],
    Discriminator(_model_kind),
]
