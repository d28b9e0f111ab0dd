"""Base class of all parts of a declaration."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

Fraction = Annotated[float, Field(ge=0, lt=1)]

# Keys of 0.1.0, which records and fingerprints always contain. This table never changes: keys that are not in it are later ones.
_FIRST_KEYS = {
    "Experiment": {"name", "dataset", "model", "training", "subsets", "record", "execution"},
    "DatasetSpec": {"name", "root", "max_train", "max_test", "resolution"},
    "Mlp": {"name", "hidden"},
    "Cnn": {"name", "channels", "hidden"},
    "NamedModel": {"name", "options"},
    "Sgd": {"name", "lr", "momentum", "weight_decay", "nesterov"},
    "Constant": {"name", "warmup"},
    "Step": {"name", "warmup", "milestones", "gamma"},
    "Cosine": {"name", "warmup"},
    "Linear": {"name", "warmup"},
    "TrainingSpec": {"epochs", "batch_size", "optimizer", "schedule", "label_smoothing", "augmentation", "precision"},
    "UntilSpec": {"standard_error", "quantile"},
    "SubsetsSpec": {"design", "fraction", "trials", "seed", "masks", "until"},
    "RecordedOutcomes": {"margins"},
    "ExecutionSpec": {"device", "trials_per_shard", "workers"},
    "WorkersSpec": {"max", "gpus", "gpu_resource", "cpu", "memory", "image", "node_selector", "tolerations", "priority_class"},
    "Toleration": {"key", "operator", "value", "effect"},
}


class Part(BaseModel):
    """Immutable part of a declaration that refuses unknown keys and numbers that are not finite.

    A key later than 0.1.0 is written only where it differs from its default. A new key therefore changes no fingerprint, and earlier
    versions read what does not use it. For the same reason the default of a later key never changes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _omit_later_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # a later part is identified by its name, even the default one
        first, fields = _FIRST_KEYS.get(type(self).__name__, {"name"}), type(self).model_fields
        return {
            key: value
            for key, value in serialize(self).items()
            if key in first or getattr(self, key) != fields[key].get_default(call_default_factory=True)
        }
