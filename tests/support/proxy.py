"""A reverse proxy such as many servers stand behind: under a path, with another `Host`, or without WebSockets."""

import contextlib
import re
import socket
import socketserver
import threading
from collections.abc import Iterator


class _Handler(socketserver.StreamRequestHandler):
    rbufsize = 0  # what follows the head belongs to the pump

    def handle(self) -> None:
        head = b"".join(iter(self.rfile.readline, b"\r\n"))
        target = head.split(b" ", 2)[1]
        if not target.startswith(self.server.path):
            self._refuse(b"404 Not Found")
            return
        head = head.replace(target, target.removeprefix(self.server.path.rstrip(b"/")), 1)
        if self.server.host:
            head = re.sub(rb"(?im)^Host:.*\r$", b"Host: " + self.server.host + b"\r", head)
        if not self.server.websockets or b"websocket" not in head:
            head = re.sub(rb"(?im)^(Connection|Upgrade):.*\r\n", b"", head) + b"Connection: close\r\n"
        try:
            upstream = socket.create_connection(self.server.upstream)
        except OSError:
            self._refuse(b"502 Bad Gateway")
            return
        with upstream:
            upstream.sendall(head + b"\r\n")
            threading.Thread(target=_pump, args=(self.request, upstream), daemon=True).start()
            _pump(upstream, self.request)

    def _refuse(self, status: bytes) -> None:
        self.wfile.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


class Proxy(socketserver.ThreadingTCPServer):
    """Attributes, to be set before the first request: upstream (address), path, host (None leaves it), websockets; and url."""

    daemon_threads = True
    block_on_close = False
    upstream: tuple[str, int]
    path: bytes = b"/"
    host: bytes | None = None
    websockets = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextlib.contextmanager
def running_proxy() -> Iterator[Proxy]:
    with Proxy(("127.0.0.1", 0), _Handler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
