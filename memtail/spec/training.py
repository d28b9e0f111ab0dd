"""The `training` part of an experiment: epochs, batches, optimizer and schedule."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from memtail.spec.augmentation import Chain
from memtail.spec.base import Fraction, Part


class Sgd(Part):
    """Stochastic gradient descent as in `torch.optim.SGD`.

    Attributes:
        name: the optimizer.
        lr: learning rate at the peak of the schedule.
        momentum: momentum.
        weight_decay: weight decay, of all parameters.
        nesterov: whether to use Nesterov momentum.
    """

    name: Literal["sgd"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5.0e-4
    nesterov: bool = True

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


_Betas = Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
_Eps = Annotated[float, Field(ge=1e-16)]  # less is 0 beside a gradient of float32


class Adam(Part):
    """Adam as in `torch.optim.Adam`. Its weight decay is part of the gradient, and so scaled like the gradient: see `adamw`.

    Attributes:
        name: the optimizer.
        lr: learning rate at the peak of the schedule.
        betas: decay rates of the means of the gradient and of its square.
        eps: added to the root of the mean square.
        weight_decay: weight decay, of all parameters; it is added to the gradient.
    """

    name: Literal["adam"]
    lr: Annotated[float, Field(gt=0)] = 1.0e-3
    betas: _Betas = [0.9, 0.999]
    eps: _Eps = 1.0e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0


class AdamW(Part):
    """Adam with decoupled weight decay, as in `torch.optim.AdamW`.

    Attributes:
        name: the optimizer.
        lr: learning rate at the peak of the schedule.
        betas: decay rates of the means of the gradient and of its square.
        eps: added to the root of the mean square.
        weight_decay: weight decay, of all parameters; each step multiplies them by 1 - learning rate x weight decay.
    """

    name: Literal["adamw"]
    lr: Annotated[float, Field(gt=0)] = 1.0e-3
    betas: _Betas = [0.9, 0.999]
    eps: _Eps = 1.0e-8
    weight_decay: Annotated[float, Field(ge=0)] = 1.0e-2


def _sgd_unless_named(value: Any) -> Any:
    return {"name": "sgd", **value} if isinstance(value, dict) else value


OptimizerSpec = Annotated[
    Annotated[Sgd | Adam | AdamW, Field(discriminator="name")],
    BeforeValidator(_sgd_unless_named),
]


class Constant(Part):
    """A constant learning rate after the warm-up.

    Attributes:
        name: the schedule.
        warmup: fraction of all steps in which the learning rate rises linearly to its peak.
    """

    name: Literal["constant"]
    warmup: Fraction = 0.0


class Step(Part):
    """A learning rate that is multiplied by `gamma` at each milestone.

    Attributes:
        name: the schedule.
        warmup: fraction of all steps in which the learning rate rises linearly to its peak.
        milestones: fractions of all steps.
        gamma: the factor.
    """

    name: Literal["step"]
    warmup: Fraction = 0.0
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = [0.5, 0.75]
    gamma: Annotated[float, Field(gt=0)] = 0.1


class Cosine(Part):
    """Half a cosine down to 0 after the warm-up.

    Attributes:
        name: the schedule.
        warmup: fraction of all steps in which the learning rate rises linearly to its peak.
    """

    name: Literal["cosine"]
    warmup: Fraction = 0.0


class Linear(Part):
    """A linear decay to 0 after the warm-up.

    Attributes:
        name: the schedule.
        warmup: fraction of all steps in which the learning rate rises linearly to its peak.
    """

    name: Literal["linear"]
    warmup: Fraction = 0.0


ScheduleSpec = Annotated[Constant | Step | Cosine | Linear, Field(discriminator="name")]


class TrainingSpec(Part):
    """The training recipe of every trial.

    Attributes:
        epochs: passes over the subset.
        batch_size: examples per step.
        optimizer: the optimizer.
        schedule: the learning rate over the steps.
        label_smoothing: share of the target distribution that is spread over all classes.
        augmentation: `flip` mirrors images at random; `crop-flip` also shifts them; a list of steps applies one after the other.
        precision: of the factors of products on CUDA: `float32`, `tf32` (11 bits) or `bfloat16` (8 bits). `auto` is `tf32` for stacks of
            linear layers and `bfloat16` for other networks. Elsewhere `tf32` and `auto` are `float32`.
    """

    epochs: Annotated[int, Field(ge=1)] = 20
    batch_size: Annotated[int, Field(ge=1)] = 64
    optimizer: OptimizerSpec = Sgd()
    schedule: ScheduleSpec = Cosine(name="cosine", warmup=0.1)
    label_smoothing: Fraction = 0.0
    augmentation: Annotated[Chain, Field(json_schema_extra={"default": "none"})] = []
    precision: Literal["float32", "tf32", "bfloat16", "auto"] = "float32"
