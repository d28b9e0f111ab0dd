"""A store and a cache for each test."""

import pytest

from tests.support.staged import CountingStore


@pytest.fixture
def store(tmp_path):
    return CountingStore(tmp_path / "store")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"
