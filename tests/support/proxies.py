"""A TCP proxy that resets connections."""

import contextlib
import socket
import socketserver
import struct
import threading
import time


class ResettingProxy:
    """Forwards TCP connections to a port of this machine, and resets each after a number of bytes or of seconds.

    Args:
        port: of the server.
        after_bytes: bytes in both directions after which a connection is reset.
        after_seconds: age at which a connection is reset.
        rate: bytes per second of each connection, no limit by default.

    Attributes:
        resets: connections reset.
        requests: first lines of requests.
        passed: bytes in both directions.
    """

    def __init__(
        self, port: int, *, after_bytes: float = float("inf"), after_seconds: float = float("inf"), rate: float = float("inf")
    ) -> None:
        self.resets, self.passed, self.requests = 0, 0, list[bytes]()
        proxy, lock = self, threading.Lock()

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.began, self.bytes, self.over = time.monotonic(), 0, False
                with socket.create_connection(("127.0.0.1", port)) as self.upstream:
                    if after_seconds < float("inf"):
                        alarm = threading.Timer(after_seconds, self.reset)
                        alarm.daemon = True
                        alarm.start()
                    other = threading.Thread(target=self.copy, args=(self.request, self.upstream), daemon=True)
                    other.start()
                    self.copy(self.upstream, self.request)
                    other.join()

            def copy(self, source: socket.socket, sink: socket.socket) -> None:
                with contextlib.suppress(OSError):
                    while data := source.recv(1 << 18):
                        if source is self.request and (head := data.partition(b"\r\n")[0]).endswith(b" HTTP/1.1"):
                            proxy.requests.append(head)
                        if self.bytes + len(data) > after_bytes:
                            sink.sendall(data[: int(after_bytes) - self.bytes])
                            return self.reset()
                        with lock:
                            self.bytes += len(data)
                            proxy.passed += len(data)
                        sink.sendall(data)
                        time.sleep(max(0.0, self.began + self.bytes / rate - time.monotonic()))
                self.close()

            def reset(self) -> None:
                with lock:
                    if self.over:
                        return
                    self.over = True
                    proxy.resets += 1
                with contextlib.suppress(OSError):  # close without sending what is left, by RST
                    self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close()

            def close(self) -> None:
                self.over = True
                for end in (self.request, self.upstream):
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            request_queue_size = 64

            def shutdown_request(self, request: object) -> None:
                self.close_request(request)  # a shutdown would end the connection in order

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "ResettingProxy":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
