"""HTTP on the loopback interface: requests, replies, and the faults in between."""

from __future__ import annotations

import json
import socket
import socketserver
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.fakes.hub.faults import Request
from tests.fakes.hub.store import CHUNK, read_chunks

if TYPE_CHECKING:
    from tests.fakes.hub import LoopbackHub


class CutError(Exception):
    """Close the connection immediately."""


def header_safe(text: str) -> str:
    return " ".join(text.split()).encode("ascii", "backslashreplace").decode()


class HubError(Exception):
    """An error reply, with the headers by which clients distinguish errors."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: object) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": message, **body}
        self.headers = {"X-Error-Message": header_safe(message)}
        if code is not None:
            self.headers["X-Error-Code"] = code


@dataclass
class Reply:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    file: Path | None = None  # the body is this part of a file instead
    start: int = 0
    length: int = 0

    @property
    def size(self) -> int:
        return len(self.body) if self.file is None else self.length

    def chunks(self) -> Iterator[bytes]:
        if self.file is None:
            yield from (self.body[start : start + CHUNK] for start in range(0, len(self.body), CHUNK))
        else:
            yield from read_chunks(self.file, self.start, self.length)


def as_json(value: object, status: int = 200, **headers: str) -> Reply:
    return Reply(status, {"Content-Type": "application/json; charset=utf-8", **headers}, json.dumps(value).encode())


def ranged(reply: Reply, asked: str | None) -> Reply:
    """Cut a reply to the requested range."""
    if not asked or not asked.startswith("bytes=") or "," in asked or reply.file is None:
        return reply
    first, _, last = asked.removeprefix("bytes=").strip().partition("-")
    size = reply.length
    if first:
        start, end = int(first), min(int(last) if last else size - 1, size - 1)
    else:
        start, end = max(size - int(last), 0), size - 1
    if start > end:
        return Reply(416, {"Content-Range": f"bytes */{size}"})
    headers = {**reply.headers, "Content-Range": f"bytes {start}-{end}/{size}"}
    return Reply(206, headers, file=reply.file, start=start, length=end - start + 1)


def end(connection: socket.socket) -> None:
    """End a connection, even while its thread waits for it."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the other side was faster


@dataclass
class Call:
    """A request as the endpoints see it."""

    method: str
    path: str  # still percent-encoded
    query: dict[str, list[str]]
    headers: dict[str, str]
    origin: str
    body: Iterator[bytes]

    def read(self) -> bytes:
        return b"".join(self.body)

    def json(self) -> Any:
        return json.loads(self.read() or b"{}")

    def option(self, name: str, default: str = "") -> str:
        return self.query.get(name, [default])[0]

    def flag(self, name: str) -> bool:
        return self.option(name).lower() in ("1", "true")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.opened(self.connection)

    def finish(self) -> None:
        self.server.closed(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet: the log of the hub holds the requests."""

    def _serve(self) -> None:
        hub = self.server.hub
        split = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        host = split.netloc or self.headers.get("Host", "")
        if self.command == "CONNECT":
            host = self.path
        request = Request(
            self.command,
            unquote(split.path),
            split.query,
            host,
            authorized="authorization" in headers,
            headers={name: value for name, value in headers.items() if name != "authorization"},
        )
        hub.log(request)
        self._request = request
        self._body = self._read_body()
        self._answered = False
        try:
            if hub.is_stray(host):
                # Only a client that uses this server as its proxy requests another host; nothing is forwarded.
                self.close_connection = True
                self._reply(Reply(502 if self.command == "CONNECT" else 404))
            else:
                query = parse_qs(split.query)
                call = Call(self.command, split.path, query, headers, f"http://{host}", self._body)
                self._reply(self._work(call))
        except CutError:
            self._break()
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception:  # a fault of the server itself: kept in `errors`, which every test asserts to be empty
            self._report()

    def _work(self, call: Call) -> Reply:
        hub = self.server.hub
        if (delay := hub.faults.take("delay", self._request)) is not None and hub.closing.wait(delay.seconds):
            raise CutError
        if (fault := hub.faults.take("fail", self._request)) is not None:
            headers = {
                "Content-Type": "application/json",
                "X-Error-Message": header_safe(fault.message),
                **fault.headers,
            }
            return Reply(fault.status, headers, json.dumps({"error": fault.message}).encode())
        try:
            return self.server.answer(call)
        except HubError as error:
            return as_json(error.body, error.status, **error.headers)

    def _reply(self, reply: Reply) -> None:
        hub = self.server.hub
        # Read the rest of this request's body; otherwise it would be parsed as the next request.
        for _ in self._body:
            pass
        if hub.faults.take("drop", self._request) is not None:
            raise CutError
        self._answered = True
        self._request.status = reply.status
        self.send_response(reply.status)
        for name, value in {"X-Request-Id": hub.next_request_id(), **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(reply.size))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        # Redirects and errors are not part of a download.
        whole_or_part = self.command == "GET" and reply.status in (200, 206)
        cut = hub.faults.find("cut", self._request) if whole_or_part else None
        for chunk in reply.chunks():
            allowed = len(chunk) if cut is None else cut.after_bytes - self._request.sent
            self._send(chunk[:allowed])
            if cut is not None and allowed < len(chunk):
                if cut.spend():
                    raise CutError
                cut = None
                self._send(chunk[allowed:])

    def _send(self, chunk: bytes) -> None:
        self._request.sent += len(chunk)  # counted before sending: the reader may check at once
        self.wfile.write(chunk)

    def _read_body(self) -> Iterator[bytes]:
        """Yield the request body in chunks, and cut the connection on a fault."""
        cut = self.server.hub.faults.find("cut", self._request) if self.command in ("POST", "PUT") else None
        for chunk in self._raw_body():
            self._request.received += len(chunk)
            if cut is not None and self._request.received > cut.after_bytes:
                if cut.spend():
                    raise CutError
                cut = None
            yield chunk

    def _raw_body(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            while size := int(self._line().split(b";")[0], 16):
                yield from self._exactly(size)
                self._line()
            while self._line().strip():
                pass  # trailers
        else:
            yield from self._exactly(int(self.headers.get("Content-Length", 0)))

    def _line(self) -> bytes:
        line = self.rfile.readline()
        if not line:
            raise ConnectionAbortedError("the client went away")
        return line

    def _exactly(self, size: int) -> Iterator[bytes]:
        while size > 0:
            chunk = self.rfile.read(min(CHUNK, size))
            if not chunk:
                raise ConnectionAbortedError("the client went away")
            size -= len(chunk)
            yield chunk

    def _break(self) -> None:
        self.close_connection = True
        end(self.connection)

    def _report(self) -> None:
        """Keep a fault of this server itself for the test, and return an error."""
        self.close_connection = True
        text = traceback.format_exc()
        self.server.hub.errors.append(text)
        if not self._answered:
            self._request.status = 500
            self.send_response(500)
            self.send_header("Content-Length", str(len(text.encode())))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(text.encode())

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_CONNECT = _serve  # noqa: N815


class Server(ThreadingHTTPServer):
    """A listener on the loopback interface that ends its connections when it is closed."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: LoopbackHub, answer: Any, port: int = 0) -> None:
        self.hub = hub
        self.answer = answer
        self._lock = threading.Lock()
        self._open: dict[socket.socket, threading.Thread] = {}
        super().__init__(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def server_bind(self) -> None:
        """Bind without the base class's lookup of the host name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    @property
    def netloc(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def opened(self, connection: socket.socket) -> None:
        with self._lock:
            self._open[connection] = threading.current_thread()
        if self.hub.closing.is_set():  # accepted just before the end, so close() may have missed it
            end(connection)

    def closed(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.pop(connection, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep errors outside of a request; clients that closed the connection are no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            self.hub.errors.append(traceback.format_exc())

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()
        with self._lock:
            connections = dict(self._open)
        for connection in connections:
            end(connection)
        for thread in connections.values():
            thread.join(5)
