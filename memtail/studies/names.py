"""The names of the experiments in which studies train their models: NAME.PURPOSE-DIGEST, of NAME's study."""

import re

_NAME = re.compile(r"(?P<of>.+)\.(?:removal|last-layer)-[0-9a-f]{8}")


def derived_name(name: str, purpose: str, digest: str) -> str:
    """The name of the experiment that a study of experiment `name` trains; `digest`, hexadecimal, is of what makes it another one."""
    return f"{name}.{purpose}-{digest[:8]}"


def parent_of(name: str) -> str | None:
    """The experiment whose study trains the experiment `name`; None if it has no such name."""
    found = _NAME.fullmatch(name)
    return found["of"] if found else None
