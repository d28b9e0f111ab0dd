"""The explorer under clients that send nothing, send slowly or do not read: it goes on serving the others."""

import contextlib
import http.client
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import urllib3

from tests.support.servers import free_port

TOKEN = "a token of sixteen characters"
# Seconds that a client of the server under test has for a request.
SECONDS = 1.0
# Seconds in which a client has to take a part of an answer.
TAKEN_SECONDS = 0.8
# Bytes of `/experiments.csv`, and of all answers that clients have not taken.
ANSWER, MOST_UNSENT = 20 << 20, 40 << 20
# The server, with few file descriptors.
SERVER = f"""
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
from memtail.explorer import connections, server, views
from memtail.storage.local import LocalStore
connections.REQUEST_SECONDS, connections.ANSWER_SECONDS, connections.MOST_UNSENT = {SECONDS}, {TAKEN_SECONDS}, {MOST_UNSENT}
views.csv = lambda *tables: bytes({ANSWER})
server.serve(LocalStore(Path(sys.argv[1])), {TOKEN!r}, server.listen("127.0.0.1", int(sys.argv[2])), log_requests=True)
"""
HEAD = b"Host: localhost\r\n"
LARGE = b"GET /experiments.csv HTTP/1.1\r\n" + HEAD + f"Authorization: Bearer {TOKEN}\r\n\r\n".encode()


class Explorer:
    """An explorer in a process."""

    def __init__(self, folder: Path) -> None:
        self.port, self.log = free_port(), folder / "log"
        (folder / "store").mkdir()
        with self.log.open("wb") as log:
            command = [sys.executable, "-c", SERVER, str(folder / "store"), str(self.port)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while self.status(timeout=1) != 200:
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def status(self, timeout: float = 10, method: str = "GET", headers: dict[str, str] | None = None) -> int | None:
        """Return the status of a new request, None if there is none in time."""
        headers = {"Authorization": f"Bearer {TOKEN}", **(headers or {})}
        try:
            with urllib3.PoolManager(retries=False) as pool:
                return pool.request(method, f"http://127.0.0.1:{self.port}/experiments.csv", headers=headers, timeout=timeout).status
        except urllib3.exceptions.HTTPError:
            return None

    def connect(self, sent: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(sent)
        return connection

    def memory(self) -> int:
        """Return the resident memory of the process, in bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Explorer]:
    explorer = Explorer(tmp_path_factory.mktemp("explorer"))
    yield explorer
    explorer.process.terminate()
    explorer.process.wait(30)


def is_open(connection: socket.socket) -> bool:
    """Return whether the server keeps a connection open."""
    connection.settimeout(0)
    try:
        while connection.recv(1 << 16):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def seconds_until_closed(connection: socket.socket) -> float:
    began = time.monotonic()
    connection.settimeout(0.05)
    while time.monotonic() < began + 20 * SECONDS:
        with contextlib.suppress(TimeoutError):
            try:
                if not connection.recv(1 << 16):
                    break
            except ConnectionError:
                break
    else:
        raise AssertionError("the connection is still open")
    return time.monotonic() - began


def test_connections_without_a_whole_request_are_closed(explorer):
    starts = {
        "nothing": b"",
        "half a head": b"GET / HTTP/1.1\r\n" + HEAD,
        "no body": b"POST / HTTP/1.1\r\n" + HEAD + b"Content-Length: 4000\r\n\r\n",
        "no large body": b"POST / HTTP/1.1\r\n" + HEAD + b"Content-Length: 400000000\r\n\r\n",
        "no chunk": b"POST / HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
        "half of a second request": b"GET / HTTP/1.1\r\n" + HEAD + b"\r\nGET / HTTP/1.1\r\n" + HEAD,
    }
    with contextlib.ExitStack() as stack:
        connections = {name: stack.enter_context(explorer.connect(sent)) for name, sent in starts.items()}
        for name, connection in connections.items():
            assert seconds_until_closed(connection) < 5 * SECONDS, name


@pytest.mark.parametrize("piece", [b"X-A: b\r\n", b"x"], ids=["head", "body"])
def test_bytes_now_and_then_do_not_keep_a_connection_open(explorer, piece):
    head = b"GET / HTTP/1.1\r\n" + HEAD
    with explorer.connect(head if piece != b"x" else head + b"Content-Length: 4000\r\n\r\n") as connection:
        began = time.monotonic()
        while is_open(connection):
            assert time.monotonic() < began + 5 * SECONDS
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                connection.sendall(piece)


def test_a_connection_is_used_again_for_a_second_request(explorer):
    client = http.client.HTTPConnection("127.0.0.1", explorer.port, timeout=10)
    client.auto_open = False
    client.connect()
    for _ in range(4):
        client.request("GET", "/experiments.csv", headers={"Authorization": f"Bearer {TOKEN}"})
        answer = client.getresponse()
        assert (answer.status, len(answer.read()) > 0) == (200, True)
        time.sleep(0.4 * SECONDS)
    client.close()


def test_more_silent_connections_than_file_descriptors_do_not_keep_others_out(explorer):
    with contextlib.ExitStack() as stack:
        for number in range(140):
            stack.enter_context(explorer.connect(b"POST / HTTP/1.1\r\n" + HEAD + b"Content-Length: 4000\r\n\r\n" if number % 2 else b""))
        assert explorer.status(timeout=5) == 200
    log = explorer.log.read_text()
    assert "Too many open files" not in log
    assert "Traceback" not in log


def test_an_aborted_form_is_logged_in_one_line(explorer):
    before = explorer.log.stat().st_size
    with explorer.connect(b"POST /aborted HTTP/1.1\r\n" + HEAD + b"Content-Length: 4000\r\n\r\n") as connection:
        seconds_until_closed(connection)
    assert explorer.status() == 200
    lines = [line for line in explorer.log.read_bytes()[before:].decode().splitlines() if "/aborted" in line]
    assert len(lines) == 1, lines
    assert "408" in lines[0]


def test_a_slow_reader_gets_the_whole_answer(explorer):
    with explorer.connect(LARGE) as connection:
        began, read = time.monotonic(), 0
        while read < ANSWER:
            data = connection.recv(1 << 18)
            assert data, read
            read += len(data)
            time.sleep(max(0.0, began + read * 2.5 * TAKEN_SECONDS / ANSWER - time.monotonic()))
    assert time.monotonic() - began > 2 * TAKEN_SECONDS


@pytest.mark.parametrize("requests", [1, 5])
def test_a_connection_whose_answer_nobody_takes_is_closed(explorer, requests):
    with explorer.connect(requests * LARGE) as connection:
        time.sleep(2.5 * TAKEN_SECONDS)
        read = 0
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(1 << 20):
                read += len(data)
        assert read < ANSWER


def test_answers_that_nobody_takes_fill_no_memory(explorer):
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(25):
            clients.append(stack.enter_context(explorer.connect(LARGE)))
            time.sleep(0.02)
        assert explorer.status() == 200
        time.sleep(TAKEN_SECONDS / 2)
        assert sum(received(client) >= ANSWER for client in clients) <= MOST_UNSENT // ANSWER + 1
    log = explorer.log.read_text()
    assert "Traceback" not in log


def received(client: socket.socket) -> int:
    """Read until the answer ends or the server closes the connection; return the number of bytes."""
    size = 0
    with contextlib.suppress(OSError):
        while size < ANSWER and (data := client.recv(1 << 20)):
            size += len(data)
    return size


def test_large_heads_and_bodies_and_floods_fill_no_memory(explorer):
    before = explorer.memory()
    with contextlib.suppress(OSError), explorer.connect(b"GET / HTTP/1.1\r\n" + HEAD + b"X-A: " + b"a" * (1 << 20)) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
    with contextlib.suppress(OSError), explorer.connect(b"POST / HTTP/1.1\r\n" + HEAD + b"Content-Length: 100000000\r\n\r\n") as connection:
        for _ in range(100):
            connection.sendall(bytes(1 << 20))
    for method in ("HEAD", "OPTIONS") * 50:
        assert explorer.status(method=method) in (200, 405)
    assert explorer.status(headers={"Cookie": "a=b; " * 1000}) == 200
    assert explorer.memory() - before < 60 << 20
