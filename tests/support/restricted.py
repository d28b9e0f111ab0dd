"""A store in a folder with the rights of a component, as the bundled S3 server gives them."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from memtail.storage.local import LocalStore
from services.tools.rights import RIGHTS


class RestrictedStore(LocalStore):
    """Fails the test when the component lacks the right to an object.

    Args:
        root: the folder.
        component: of `RIGHTS`.
    """

    def __init__(self, root: Path, component: str) -> None:
        super().__init__(root)
        self.component = component


def _checked(method: str, *kinds: str) -> Callable[..., Any]:
    """Return a method of the store that needs one of some kinds of rights to its key."""

    def run(store: RestrictedStore, key: str, *arguments: Any, **options: Any) -> Any:
        patterns = [pattern for kind in kinds for pattern in getattr(RIGHTS[store.component], kind)]
        if not any(fnmatchcase(key, pattern) for pattern in patterns):
            pytest.fail(f"the {store.component} has no right to {method} {key}: see services/tools/rights.py")
        return getattr(LocalStore, method)(store, key, *arguments, **options)

    return run


_KINDS = {
    "read": ("get", "get_tagged", "get_range", "exists", "download"),
    "write": ("put", "put_if_match", "upload"),
    "delete": ("delete",),
}
for _kind, _methods in _KINDS.items():
    for _method in _methods:
        setattr(RestrictedStore, _method, _checked(_method, _kind))
RestrictedStore.put_if_absent = _checked("put_if_absent", "create", "write")
