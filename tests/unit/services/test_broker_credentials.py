import pytest
import redis
from kombu.connection import Connection

from services.common.broker_credentials import FileCredentials, celery_url, client_arguments


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.delenv("MEMTAIL_BROKER", raising=False)
    monkeypatch.setenv("MEMTAIL_BROKER_FILE", str(tmp_path / "url"))
    return tmp_path / "url"


@pytest.mark.parametrize(
    ("url", "credentials"),
    [
        ("redis://user:p%40ss@host:1/0", ("user", "p@ss")),
        ("redis://:pass@host", ("pass",)),
        ("rediss://user:pass@host:1/0?ssl_ca_certs=/ca.pem", ("user", "pass")),
    ],
)
def test_clients_keep_the_address_and_get_the_password_from_the_file(file, url, credentials):
    file.write_text(url)
    connection = Connection(celery_url(url))
    client = redis.Redis.from_url(**client_arguments(url))
    assert connection.hostname == client.connection_pool.connection_kwargs["host"] == "host"
    assert connection.credential_provider == "services.common.broker_credentials:FileCredentials"
    assert "ssl_ca_certs" not in url or (connection.ssl["ssl_ca_certs"] == "/ca.pem")
    assert "pass" not in celery_url(url)
    assert client.connection_pool.connection_kwargs["credential_provider"].get_credentials() == credentials
    file.write_text(url.replace("p%40ss", "new").replace("pass", "new"))
    assert client.connection_pool.connection_kwargs["credential_provider"].get_credentials()[-1] == "new"


def test_a_password_in_a_variable_stays_in_the_url(monkeypatch):
    monkeypatch.setenv("MEMTAIL_BROKER", "redis://:pass@host")
    assert celery_url("redis://:pass@host") == client_arguments("redis://:pass@host")["url"] == "redis://:pass@host"


@pytest.mark.parametrize("content", [b"", b"redis://:pass/word@host", b"http://host", b"\xff"])
def test_a_malformed_file_is_a_refused_password_and_is_not_shown(file, content):
    file.write_bytes(content)
    with pytest.raises(redis.AuthenticationError, match="MEMTAIL_BROKER_FILE") as caught:
        FileCredentials().get_credentials()
    assert "word" not in str(caught.value)
