"""Fixtures of the monitoring tests."""

from tests.integration.conftest import minio  # noqa: F401 - a fixture
from tests.services.conftest import cluster  # noqa: F401 - a fixture
