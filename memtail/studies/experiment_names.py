"""Names of the experiments that studies train: `NAME.STUDY-DIGEST` for a study of experiment NAME."""

import re

from memtail.studies import STUDIES

_DERIVED = re.compile(rf"(?P<parent>.+)\.(?:{'|'.join(name for name, study in STUDIES.items() if study.trains)})-[0-9a-f]{{8}}")


def derived_name(name: str, study: str, digest: str) -> str:
    """Name the experiment that a study of experiment `name` trains; `digest` is a hexadecimal hash of its declaration."""
    return f"{name}.{study}-{digest[:8]}"


def parent_of(name: str) -> str | None:
    """Return the experiment whose study trains experiment `name`, or None if no study does."""
    match = _DERIVED.fullmatch(name)
    return match["parent"] if match else None
