"""Changes of a declaration from a command line: `training.epochs=5`."""

from collections.abc import Sequence
from typing import Any

import yaml

from memtail.errors import SpecError


def changed(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return a declaration with some keys set.

    Args:
        data: keys and values, as in the YAML file.
        assignments: as `KEY=VALUE`; parts of the key are separated by dots, and the value is YAML.

    Raises:
        SpecError: an assignment is none, its value is not YAML, or a part of its key has a value that holds no keys.
    """
    result = dict(data)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        *folders, last = parts = key.strip().split(".")
        if not equals or not all(parts):
            raise SpecError(f"--set {assignment}: is no assignment: write KEY=VALUE, such as training.epochs=5")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise SpecError(f"--set {assignment}: the value is not valid YAML: quote it") from None
        place = result
        for folder in folders:
            inner = place.get(folder)
            if not isinstance(inner, dict | None):
                raise SpecError(f"--set {assignment}: {folder} is '{inner}' in the file, which holds no keys: set {folder} as a whole")
            place[folder] = place = dict(inner or {})
        place[last] = value
    return result
