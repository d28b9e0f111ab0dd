"""Servers that are started once for all integration tests that ask for them, and a store that is made once."""

from collections.abc import Iterator

import pytest

from tests.support.explored import explored  # noqa: F401 - a fixture
from tests.support.servers import MinioServer


@pytest.fixture(scope="session")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MinioServer]:
    with MinioServer(tmp_path_factory.mktemp("minio")) as server:
        yield server
