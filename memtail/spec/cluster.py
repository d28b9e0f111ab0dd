"""Requests to a Kubernetes cluster: number, size and placement of an experiment's workers."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from memtail.spec.base import Part

# Quantities as Kubernetes writes them.
_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"


class Toleration(Part):
    """A toleration of node taints, as in a Kubernetes pod.

    Attributes:
        key: key of the taint.
        operator: `Exists` tolerates every value, `Equal` only `value`.
        value: value of the taint.
        effect: effect of the taint; every effect by default.
    """

    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="after")
    def _value_needs_equal(self) -> Self:
        if self.value and self.operator == "Exists":
            raise ValueError(
                f"toleration of {self.key} has value {self.value}, and operator Exists, the default, tolerates every value: "
                "set operator: Equal, or remove the value"
            )
        return self


class WorkersSpec(Part):
    """Workers requested from a Kubernetes cluster. Defaults are those of the chart's values.

    Attributes:
        max: maximum number of workers.
        gpus: GPUs of a worker, each with one training process; 0 trains on the CPU.
        gpu_resource: resource name of a GPU, such as `nvidia.com/gpu` or `nvidia.com/mig-1g.10gb`.
        cpu: CPU cores of a worker, as a Kubernetes quantity such as `"8"` or `500m`.
        memory: memory of a worker, as a Kubernetes quantity such as `32Gi`.
        image: container image; one of those that the chart's `workers.limits.images` allows.
        node_selector: labels of the nodes that may run workers.
        tolerations: taints that workers tolerate.
        priority_class: priority class of the pods.
    """

    max: Annotated[int, Field(ge=1)] | None = None
    gpus: Annotated[int, Field(ge=0)] | None = None
    gpu_resource: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")] | None = None
    cpu: Annotated[str, Field(pattern=_QUANTITY)] | None = None
    memory: Annotated[str, Field(pattern=_QUANTITY)] | None = None
    image: str | None = None
    node_selector: dict[str, str] = {}
    tolerations: list[Toleration] = []
    priority_class: str | None = None

    @field_validator("cpu", "memory", mode="before")
    @classmethod
    def _quantity_is_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int | float) else value
