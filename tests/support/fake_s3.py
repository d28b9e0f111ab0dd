"""An S3 server with injected faults."""

import contextlib
import hashlib
import re
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from memtail.settings import S3Settings


class FakeS3(ThreadingHTTPServer):
    """The part of S3 that a store with one bucket uses, with injected faults.

    Faults: `ignores-condition`, `ignores-match`, `ignores-range`, `drops-metadata`, `repeats`, `refuses`, `refuses-parts`, `fails-late` (an
    upload in parts ends with an error, status 200), `loses-uploads` (in parts), `sends-less` (than a range: 1 MiB at most), `races` and
    `races-match` (a condition is tested some time before the write), and `answers-STATUS` (to a write whose condition is not met, which is
    not made).
    `failures`, as (status, code), are the first responses; `clock` is the number of seconds by which the server's clock is ahead.
    """

    daemon_threads = True
    request_queue_size = 64  # with the default of 5, some of many concurrent connections wait for a second

    def __init__(self, *faults: str, failures: Iterable[tuple[int, str]] = (), clock: float = 0.0) -> None:
        self.faults, self.failures, self.clock = faults, list(failures), clock
        self.objects: dict[str, Any] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _FakeHandler)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def settings(self):
        return S3Settings(endpoint=f"http://127.0.0.1:{self.server_port}", access_key="a" * 20, secret_key="b" * 40)


def tag_of(data):
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


class _FakeHandler(BaseHTTPRequestHandler):
    server: FakeS3
    protocol_version = "HTTP/1.1"

    def do_any(self):
        url = urlsplit(self.path)
        query = parse_qs(url.query, keep_blank_values=True)
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(self.command)
        if "location" in query:
            return self.answer(200, b"<LocationConstraint/>")
        if self.server.failures and self.command != "HEAD":  # responses to HEAD have no error code
            status, code = self.server.failures.pop(0)
            return self.answer(status, f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode())
        if "list-type" in query:
            return self.answer(200, b"<ListBucketResult><Name>b</Name><IsTruncated>false</IsTruncated></ListBucketResult>")
        if "uploads" in query:
            return self.answer(200, b"<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>")
        if self.command == "POST" and "fails-late" in self.server.faults:
            self.server.faults = ()
            return self.answer(200, b"<Error><Code>InternalError</Code><Message>m</Message></Error>")
        if self.command == "POST" and "loses-uploads" in self.server.faults:
            return self.answer(404, b"<Error><Code>NoSuchUpload</Code><Message>m</Message></Error>")
        if self.command == "POST":
            self.server.objects[url.path] = (data, "")
            return self.answer(200, b"<CompleteMultipartUploadResult><ETag>x-1</ETag></CompleteMultipartUploadResult>")
        if "partNumber" in query and "refuses-parts" in self.server.faults:
            return self.answer(403, b"<Error><Code>AccessDenied</Code><Message>m</Message></Error>")
        if "partNumber" in query:
            return self.answer(200, ETag='"x"')
        if self.command == "PUT":
            return [self.put(url.path, data) for _ in range(1 + ("repeats" in self.server.faults))][-1]()
        if self.command == "DELETE":
            self.server.objects.pop(url.path, None)
            return self.answer(204)
        if url.path not in self.server.objects:
            return self.answer(404, b"" if self.command == "HEAD" else b"<Error><Code>NoSuchKey</Code></Error>")
        data, writer = self.server.objects[url.path]
        headers = {"ETag": tag_of(data), **({"x-amz-meta-writer": writer} if writer else {})}
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span and "ignores-range" not in self.server.faults:
            part = data[int(span[1]) : int(span[2]) + 1]
            return self.answer(206, part[: 1 << 20] if "sends-less" in self.server.faults else part, **headers)
        return self.answer(200, data, **headers)

    def put(self, path, data):
        faults = self.server.faults
        races = "races" in faults or ("races-match" in faults and "If-Match" in self.headers)
        with contextlib.nullcontext() if races else self.server.lock:
            held = self.server.objects.get(path)
            met = self.is_met(held, faults)
            if races:
                time.sleep(0.1)
            if not met:
                status = next((int(fault.removeprefix("answers-")) for fault in faults if fault.startswith("answers-")), 412)
                return lambda: self.answer(status, b"" if status in (200, 304) else b"<Error><Code>Conflict</Code></Error>", ETag='"x"')
            writer = self.headers.get("x-amz-meta-writer", "")
            self.server.objects[path] = (data, "" if "drops-metadata" in faults else writer)
        return lambda: self.answer(200, ETag=tag_of(data))

    def is_met(self, held, faults):
        if self.headers.get("If-None-Match") == "*" and "ignores-condition" not in faults:
            return held is None and "refuses" not in faults
        if (tag := self.headers.get("If-Match")) and "ignores-match" not in faults:
            return held is not None and tag == tag_of(held[0])
        return True

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Type": "application/xml", "Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def date_time_string(self, timestamp=None):
        return super().date_time_string(time.time() + self.server.clock)

    def log_message(self, *_):
        pass

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = do_any  # noqa: N815 - the names that http.server calls
