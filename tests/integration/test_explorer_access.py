"""Access to the explorer: hosts, tokens, sessions, the limit on failed logins, and what is logged."""

import json
import re

import pytest
from fastapi.testclient import TestClient
from structlog.testing import capture_logs

from memtail.explorer import access
from memtail.explorer.app import create
from memtail.explorer.server import TokenError, token_for
from memtail.explorer.sessions import MOST_OF_ADDRESS, SESSION_SECONDS, LoginLimit, Sessions

TOKEN = "s e;c\u00fcret of sixteen"
HERE = "http://memtail.example"


class Clock:
    """A clock that tests advance."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(access, "Sessions", lambda: Sessions(clock))
    monkeypatch.setattr(access, "LoginLimit", lambda: LoginLimit(clock))
    return clock


def browser(app, address="192.0.2.1"):
    return TestClient(app, base_url=HERE, follow_redirects=False, client=(address, 50_000))


def bearer(token):
    return {"Authorization": f"Bearer {token}".encode()}


def test_without_a_token_it_answers_only_at_localhost_or_an_ip_address(explored):
    app = create(explored)
    hosts = {
        "localhost": 200,
        "localhost:8080": 200,
        "127.0.0.1:8080": 200,
        "[::1]:8080": 200,
        "10.0.0.7": 200,
        "evil.example": 403,
    }
    for host, status in hosts.items():
        assert TestClient(app).get("/", headers={"Host": host}).status_code == status, host


@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize("host", ["x/static/?", "x/static/#", "a@localhost", "localhost/", "[::1", "localhost:8080:1", "local host", ""])
def test_a_host_that_is_no_name_and_no_address_is_refused(explored, token, host):
    answer = TestClient(create(explored, token)).get("/experiments.csv", headers={"Host": host})
    assert answer.status_code == 400
    assert "digits" not in answer.text


def test_with_a_token_every_request_needs_it(explored, clock):
    client = browser(create(explored, TOKEN))
    for path in ("/", "/experiments/digits", "/experiments/digits/images/train/0.png", "/experiments.csv", "/none"):
        clock.now += 3600  # outside of the limit on failed logins
        answer = client.get(path)
        assert answer.status_code == 401
        assert "digits" not in answer.text
        assert client.get(path, headers=bearer("wrong")).status_code == 401
        assert client.get(path, headers={"Cookie": f"{access.COOKIE}=wrong"}).status_code == 401
        assert client.get(path, params={"token": "wrong"}).status_code == 401
    assert client.get("/static/explorer.css").status_code == 200
    assert client.get("/experiments.csv", headers=bearer(TOKEN)).status_code == 200
    answer = client.post("/experiments/digits", data={"token": "x" * 5000})
    assert answer.status_code == 401


def test_a_token_in_an_address_is_removed_from_it(explored):
    client = browser(create(explored, TOKEN))
    answer = client.get("/experiments/digits", params={"token": TOKEN, "class": "3"})
    assert answer.status_code == 303
    assert answer.headers["location"] == "/experiments/digits?class=3"
    assert client.get("/experiments/digits").status_code == 200
    answer = client.post("/experiments/digits?class=3&token=wrong", data={"token": TOKEN})
    assert answer.headers["location"] == "/experiments/digits?class=3"
    assert client.post("/experiments/digits").status_code == 405
    for path in ("//evil.example/x", "/%5cevil.example/x"):
        answer = client.get(f"{HERE}{path}", params={"token": TOKEN})
        assert re.match(r"/(%5C)?evil\.example/x$", answer.headers["location"]), answer.headers["location"]


@pytest.mark.parametrize(
    ("forwarded", "secure"),
    [("", False), ("http", False), ("https", True), ("https, http", True), ("HTTPS,http", True), ("http,https", False)],
)
def test_the_cookie_is_restricted_to_tls_if_the_browser_speaks_it(explored, forwarded, secure):
    headers = {"X-Forwarded-Proto": forwarded} if forwarded else {}
    cookie = browser(create(explored, TOKEN)).post("/", data={"token": TOKEN}, headers=headers).headers["set-cookie"].lower()
    assert ("; secure" in cookie) == secure
    assert "; httponly" in cookie
    assert "; samesite=lax" in cookie
    assert f"; max-age={SESSION_SECONDS}" in cookie


def test_a_session_says_nothing_about_the_token_and_ends(explored, clock):
    app = create(explored, TOKEN)
    first, second = browser(app), browser(app)
    for client in (first, second):
        client.post("/", data={"token": TOKEN})
        assert client.get("/experiments.csv").status_code == 200
    stolen = {"Cookie": f"{access.COOKIE}={first.cookies[access.COOKIE]}"}
    assert first.cookies[access.COOKIE] != second.cookies[access.COOKIE]
    assert "Sign out" in first.get("/").text
    answer = first.post("/logout")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert first.get("/experiments.csv").status_code == 401
    assert browser(app).get("/experiments.csv", headers=stolen).status_code == 401
    assert second.get("/experiments.csv").status_code == 200
    clock.now += SESSION_SECONDS
    assert second.get("/experiments.csv").status_code == 401
    assert "Sign out" not in second.get("/").text


def test_failed_logins_are_limited_by_address_and_keep_no_other_address_out(explored, clock):
    app = create(explored, TOKEN)
    signed_in = browser(app, "192.0.2.99")
    signed_in.post("/", data={"token": TOKEN})

    def guess(address, token="wrong"):
        return browser(app, address).post("/", data={"token": token})

    assert [guess("192.0.2.1").status_code for _ in range(MOST_OF_ADDRESS)] == [401] * MOST_OF_ADDRESS
    answer = guess("192.0.2.1", TOKEN)  # a guess that is right is not told from one that is wrong
    assert answer.status_code == 429
    assert 0 < int(answer.headers["retry-after"]) <= 61
    assert browser(app, "192.0.2.1").get("/", headers=bearer(TOKEN)).status_code == 429
    assert guess("192.0.2.2", TOKEN).status_code == 303
    assert {guess(f"198.51.100.{number % 12}").status_code for number in range(12 * MOST_OF_ADDRESS)} == {401}
    assert guess("198.51.100.7").status_code == 429
    assert guess("192.0.2.2", TOKEN).status_code == 303
    assert browser(app, "192.0.2.2").get("/", headers=bearer(TOKEN)).status_code == 200
    assert signed_in.get("/experiments.csv").status_code == 200
    clock.now += 61
    assert guess("192.0.2.1", TOKEN).status_code == 303


def test_logins_and_requests_are_logged_without_secrets(explored):
    app = create(explored, TOKEN, log_requests=True)
    client = browser(app)
    with capture_logs() as logged:
        client.get("/experiments.csv", params={"token": "guess-in-address"})
        client.post("/", data={"token": "guess-in-form"})
        client.get("/experiments.csv", headers=bearer("guess-in-header"))
        client.get("/experiments.csv", params={"token": TOKEN})
        client.get("/experiments.csv", params={"sort": "x"})
    logins = [(each["event"], each["address"]) for each in logged if each["event"].startswith("login")]
    assert logins == [("login refused", "192.0.2.1")] * 3 + [("login accepted", "192.0.2.1")]
    requests = [(each["method"], each["path"], each["status"], each["address"]) for each in logged if each["event"] == "request"]
    assert requests == [
        ("GET", "/experiments.csv", 401, "192.0.2.1"),
        ("POST", "/", 401, "192.0.2.1"),
        ("GET", "/experiments.csv", 401, "192.0.2.1"),
        ("GET", "/experiments.csv", 303, "192.0.2.1"),
        ("GET", "/experiments.csv", 200, "192.0.2.1"),
    ]
    text = json.dumps(logged)
    assert "guess" not in text
    assert "sixteen" not in text
    assert client.cookies[access.COOKIE] not in text


def test_a_token_that_is_too_short_is_refused(monkeypatch):
    monkeypatch.setenv("MEMTAIL_EXPLORER_TOKEN", "secret")
    with pytest.raises(TokenError, match="MEMTAIL_EXPLORER_TOKEN has 6 characters: set it to 16 random ones or more"):
        token_for("127.0.0.1")
    monkeypatch.delenv("MEMTAIL_EXPLORER_TOKEN")
    assert token_for("127.0.0.1") is None
    assert len(token_for("192.0.2.1") or "") >= 16
