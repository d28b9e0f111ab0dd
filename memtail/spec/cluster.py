"""Requests to a Kubernetes cluster: number, size and placement of an experiment's workers."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from memtail.spec.base import Part

# How Kubernetes writes an amount of something.
_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"


class Toleration(Part):
    """A taint of nodes that workers are to tolerate, as Kubernetes declares it."""

    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class WorkersSpec(Part):
    """The workers that it asks for in a Kubernetes cluster; what is left out is as the cluster's operator has set it.

    Attributes:
        max: how many at most.
        gpus: of each worker, one process for each; 0: train on the CPU.
        gpu_resource: what GPUs are called there, such as `nvidia.com/gpu` or `nvidia.com/mig-1g.10gb`.
        cpu, memory: of each worker, as Kubernetes writes quantities (`"8"`, `32Gi`).
        image, node_selector, tolerations, priority_class: as in a pod.
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
