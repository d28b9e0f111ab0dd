"""Conformance suites for extensions, to be run by pytest, which must be installed.

A store tests itself against the contract of `memtail.storage.ObjectStore` by a subclass with a fixture `store`:

    import pytest
    from memtail.testing import ObjectStoreContract

    class TestMyStore(ObjectStoreContract):
        @pytest.fixture
        def store(self, tmp_path):
            return MyStore(tmp_path)
"""

import pytest

pytest.register_assert_rewrite("memtail.testing.object_store")

from memtail.testing.object_store import ObjectStoreContract  # noqa: E402 - assertions explain themselves only if rewritten before the import

__all__ = ["ObjectStoreContract"]
